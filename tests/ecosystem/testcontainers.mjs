// The usual calls of testcontainers for Node.js against the engine at DOCKER_HOST.
//
// `testcontainers.mjs` starts the library's reaper (RYUK_CONTAINER_IMAGE) unless TESTCONTAINERS_RYUK_DISABLED is true;
// `testcontainers.mjs leave` starts a container and ends without stopping it, which is for the reaper to do.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import Docker from "dockerode";
import tar from "tar-fs";
import { GenericContainer, Network, Wait, getContainerRuntimeClient } from "testcontainers";

const IMAGE = "alpine:latest";
const SERVER = "mkdir /www; cp /etc/page /www/index.html; echo started; exec httpd -f -p 80 -h /www";
const STARTUP = 180_000;

async function server() {
  const streamed = [];
  const container = await new GenericContainer(IMAGE)
    .withCommand(["sh", "-c", SERVER])
    .withEnvironment({ GREETING: "two words" })
    .withLabels({ purpose: "test" })
    .withTmpFs({ "/scratch": "size=1m" })
    .withCopyContentToContainer([{ content: "page\n", target: "/etc/page" }])
    .withExposedPorts(80)
    .withLogConsumer((stream) => stream.on("data", (data) => streamed.push(data.toString())))
    .withWaitStrategy(Wait.forAll([Wait.forLogMessage("started"), Wait.forHttp("/", 80)]))
    .withStartupTimeout(STARTUP)
    .start();
  const url = `http://${container.getHost()}:${container.getMappedPort(80)}/`;
  assert.equal(await (await fetch(url)).text(), "page\n");
  assert.match(streamed.join(""), /started/);

  const ran = await container.exec(["sh", "-c", "echo $GREETING; echo bad >&2; exit 4"]);
  assert.deepEqual([ran.stdout, ran.stderr, ran.exitCode], ["two words\n", "bad\n", 4]);
  assert.match((await container.exec(["cat", "/proc/self/uid_map"])).stdout, /^ +0 +[1-9]\d{4,} +65536\n$/);
  await container.copyContentToContainer([{ content: "kept", target: "/tmp/note" }]);
  const directory = mkdtempSync(join(tmpdir(), "testcontainers-"));
  try {
    const archive = await container.copyArchiveFromContainer("/tmp/note");
    await once(archive.pipe(tar.extract(directory)), "finish");
    assert.equal(readFileSync(join(directory, "note"), "utf8"), "kept");
  } finally {
    rmSync(directory, { recursive: true });
  }
  const id = container.getId();
  await container.stop({ timeout: 1000 });
  const client = await getContainerRuntimeClient();
  await assert.rejects(client.container.inspect(client.container.getById(id)), { statusCode: 404 });
}

async function network() {
  const network = await new Network().start();
  const first = await new GenericContainer(IMAGE).withNetwork(network).withNetworkAliases("alias")
    .withCommand(["sleep", "600"]).start();
  const second = await new GenericContainer(IMAGE).withNetwork(network).withCommand(["sleep", "600"]).start();
  const ran = await second.exec(["ping", "-c", "1", "alias"]);
  assert.equal(ran.exitCode, 0, ran.output);
  await second.stop({ timeout: 1 });
  await first.stop({ timeout: 1 });
  await network.stop();
}

async function build() {
  const context = fileURLToPath(new URL("context", import.meta.url));
  const builder = GenericContainer.fromDockerfile(context).withBuildArgs({ NAME: "built" });
  const image = await builder.build("testcontainers-built");
  const container = await image.withCommand(["sleep", "600"]).start();
  assert.equal((await container.exec(["cat", "/name", "/note"])).stdout, "built\ncopied\n");
  await container.stop({ timeout: 1 });
  // With the reaper this is its part.
  await new Docker().getImage("testcontainers-built").remove();
}

// The reaper removes the container of a program that has ended, and then itself.
async function reaper() {
  const id = execFileSync(process.execPath, [fileURLToPath(import.meta.url), "leave"], { encoding: "utf8" }).trim();
  const client = await getContainerRuntimeClient();
  const left = async () => (await client.container.list())
    .filter(({ Id, Names }) => Id === id || Names.some((name) => name.startsWith("/testcontainers-ryuk-")))
    .map(({ Names }) => Names[0]);
  assert.equal((await left()).length, 2);
  for (const end = Date.now() + STARTUP; (await left()).length;) {
    assert.ok(Date.now() < end, `the reaper left ${await left()}`);
    await sleep(500);
  }
}

async function leave() {
  const container = await new GenericContainer(IMAGE).withCommand(["sleep", "600"]).start();
  process.stdout.write(`${container.getId()}\n`, () => process.exit(0));
}

if (process.argv[2] === "leave") {
  await leave();
} else {
  const parts = process.env.TESTCONTAINERS_RYUK_DISABLED === "true" ? [server, network, build] : [reaper];
  for (const part of parts) {
    const started = Date.now();
    await part();
    console.log(`${part.name} (${((Date.now() - started) / 1000).toFixed(1)} s)`);
  }
  console.log("passed");
  process.exit(0);
}

// The usual calls of dockerode, the Docker client for Node.js, against the engine at DOCKER_HOST.
//
// An assertion or an exception of the library ends the program with status 1, and `passed` is the last line otherwise.

import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { get } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { buffer, text } from "node:stream/consumers";
import Docker from "dockerode";
import tar from "tar-fs";

const IMAGE = "alpine:latest";
const PREFIX = "dockerode-";
const docker = new Docker();

async function clean() {
  const filters = { name: [PREFIX] };
  for (const { Id } of await docker.listContainers({ all: true, filters })) {
    await docker.getContainer(Id).remove({ force: true, v: true });
  }
  for (const { Id } of await docker.listNetworks({ filters })) await docker.getNetwork(Id).remove();
  const { Volumes } = await docker.listVolumes({ filters });
  for (const { Name } of Volumes ?? []) await docker.getVolume(Name).remove();
}

// Both streams of an attach or an exec, until their end.
async function output(stream, modem = docker.modem) {
  const [out, error] = [new PassThrough(), new PassThrough()];
  modem.demuxStream(stream, out, error);
  stream.on("end", () => { out.end(); error.end(); });
  return Promise.all([text(out), text(error)]);
}

async function execute(container, Cmd, input) {
  const exec = await container.exec({ Cmd, AttachStdin: input !== undefined, AttachStdout: true, AttachStderr: true });
  const stream = await exec.start({ hijack: true, stdin: input !== undefined });
  const reading = output(stream);
  if (input !== undefined) stream.end(input);
  const [out, error] = await reading;
  return { out, error, code: (await exec.inspect()).ExitCode };
}

// Makes a directory with these files, which is gone when `use` has returned.
async function withFiles(files, use) {
  const directory = mkdtempSync(join(tmpdir(), PREFIX));
  try {
    for (const [name, content] of Object.entries(files)) writeFileSync(join(directory, name), content);
    return await use(directory);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

async function engine() {
  assert.equal((await docker.ping()).toString(), "OK");
  assert.equal((await docker.version()).Os, "linux");
  assert.equal((await docker.info()).OSType, "linux");
  assert.ok((await docker.listImages()).some(({ RepoTags }) => RepoTags?.includes(IMAGE)));
  assert.ok((await docker.df()).Images.length > 0);
}

async function run() {
  const out = new PassThrough();
  const [{ StatusCode }] = await docker.run(IMAGE, ["sh", "-c", "echo hello; exit 3"], out, { name: `${PREFIX}run` });
  assert.equal(StatusCode, 3);
  assert.equal((await buffer(out.end())).toString().trim(), "hello");
}

async function container() {
  const made = await docker.createContainer({
    Image: IMAGE,
    name: `${PREFIX}main`,
    Cmd: ["sh", "-c", "mkdir /www; echo page >/www/index.html; echo started; echo oh >&2; exec httpd -f -p 80 -h /www"],
    Env: ["GREETING=two words"],
    Labels: { purpose: "test" },
    ExposedPorts: { "80/tcp": {} },
    HostConfig: {
      Init: true,
      Memory: 64 << 20,
      NanoCpus: 500_000_000,
      PidsLimit: 50,
      CapDrop: ["ALL"],
      CapAdd: ["NET_BIND_SERVICE"],
      Mounts: [{ Type: "volume", Source: `${PREFIX}data`, Target: "/data" }],
      Tmpfs: { "/scratch": "size=1m" },
      PortBindings: { "80/tcp": [{ HostIp: "127.0.0.1", HostPort: "" }] },
      RestartPolicy: { Name: "on-failure", MaximumRetryCount: 2 },
    },
  });
  await made.start();
  const facts = await made.inspect();
  assert.equal(facts.State.Status, "running");
  assert.equal(facts.HostConfig.Runtime, "sysbox-runc", "isolation is on");

  const followed = await made.logs({ follow: true, stdout: true, stderr: true });
  const seen = [];
  const watch = new PassThrough().on("data", (data) => seen.push(data.toString()));
  docker.modem.demuxStream(followed, watch, watch);
  while (!seen.join("").includes("started") || !seen.join("").includes("oh")) await once(watch, "data");
  followed.destroy();

  await published(facts.NetworkSettings.Ports["80/tcp"][0].HostPort);

  assert.deepEqual(await execute(made, ["sh", "-c", "echo $GREETING; echo bad >&2; exit 4"]),
    { out: "two words\n", error: "bad\n", code: 4 });
  assert.equal((await execute(made, ["cat"], "piped")).out, "piped");
  assert.match((await execute(made, ["cat", "/proc/self/uid_map"])).out, /^ +0 +[1-9]\d{4,} +65536\n$/);

  await withFiles({ note: "kept" }, (directory) => made.putArchive(tar.pack(directory), { path: "/tmp" }));
  assert.equal((await execute(made, ["cat", "/tmp/note"])).out, "kept");
  await withFiles({}, async (directory) => {
    const archive = await made.getArchive({ path: "/tmp/note" });
    await once(archive.pipe(tar.extract(directory)), "finish");
    assert.equal(readFileSync(join(directory, "note"), "utf8"), "kept");
  });

  assert.ok((await made.top()).Processes.length > 0);
  assert.ok((await made.stats({ stream: false })).memory_stats.usage > 0);
  assert.ok((await made.changes()).some(({ Path }) => Path === "/tmp/note"));
  await made.update({ Memory: 96 << 20, MemorySwap: 192 << 20 });
  await made.pause();
  await made.unpause();
  const ended = made.wait();
  await made.kill();
  assert.equal((await ended).StatusCode, 137);
  await made.remove({ v: true });
  await assert.rejects(made.inspect(), { statusCode: 404 });
}

// The port listens on the loopback of the machine that Bulkhead runs on.
async function published(port) {
  const answer = await new Promise((resolve, reject) => {
    get({ host: "127.0.0.1", port, timeout: 60_000 }, resolve).on("error", reject);
  });
  assert.equal(await text(answer), "page\n");
}

async function networks() {
  const network = await docker.createNetwork({ Name: `${PREFIX}net`, CheckDuplicate: true, Labels: { a: "b" } });
  const HostConfig = { NetworkMode: network.id };
  const first = await docker.createContainer({
    Image: IMAGE, name: `${PREFIX}first`, Cmd: ["sleep", "600"], HostConfig: { ...HostConfig, Init: true },
    NetworkingConfig: { EndpointsConfig: { [`${PREFIX}net`]: { Aliases: ["alias"] } } },
  });
  await first.start();
  const second = await docker.createContainer({
    Image: IMAGE, name: `${PREFIX}second`, Cmd: ["ping", "-c", "1", "alias"], HostConfig,
  });
  await second.start();
  assert.equal((await second.wait()).StatusCode, 0);
  assert.ok(first.id in (await network.inspect()).Containers);
  await second.remove();
  await first.remove({ force: true });
  await network.remove();
}

async function build() {
  const files = {
    Dockerfile: "FROM alpine\nARG NAME\nCOPY note /note\nRUN echo $NAME >/name\nCMD cat /name /note\n",
    note: "copied\n",
  };
  const lines = await withFiles(files, async (context) => {
    const options = { t: `${PREFIX}built`, buildargs: JSON.stringify({ NAME: "built" }) };
    const stream = await docker.buildImage({ context, src: Object.keys(files) }, options);
    return new Promise((resolve, reject) => {
      docker.modem.followProgress(stream, (error, all) => (error ? reject(error) : resolve(all)));
    });
  });
  assert.ok(lines.some(({ aux }) => aux?.ID?.startsWith("sha256:")), JSON.stringify(lines.at(-1)));
  const out = new PassThrough();
  const events = await docker.getEvents({ filters: { type: ["container"], event: ["create"] } });
  await docker.run(`${PREFIX}built`, [], out, { name: `${PREFIX}of-built`, Tty: false });
  const [event] = await once(events, "data");
  assert.equal(JSON.parse(event).Actor.Attributes.name, `${PREFIX}of-built`);
  events.destroy();
  assert.match((await buffer(out.end())).toString(), /built\n.*copied\n/s);
  await docker.getContainer(`${PREFIX}of-built`).remove();
  await docker.getImage(`${PREFIX}built`).remove();
}

// Refusals of isolation arrive as errors with the engine's status and text.
async function refusals() {
  const refused = async (HostConfig, message) => assert.rejects(async () => {
    const made = await docker.createContainer({ Image: IMAGE, name: `${PREFIX}refused`, HostConfig });
    try { await made.start(); } finally { await made.remove(); }
  }, message);
  await refused({ PidMode: "host" }, /sysbox containers can't share\s+namespaces \[pid\] with the host/);
  await refused({ Binds: ["/var/run/docker.sock:/var/run/docker.sock"] }, /docker socket mount denied/);
}

await clean();
try {
  for (const part of [engine, run, container, networks, build, refusals]) {
    const started = Date.now();
    await part();
    console.log(`${part.name} (${((Date.now() - started) / 1000).toFixed(1)} s)`);
  }
} finally {
  await clean();
}
console.log("passed");

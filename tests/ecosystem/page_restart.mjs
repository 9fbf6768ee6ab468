// Apply & restart on the dashboard's page, with an engine: `bulkhead` and `docker` reach it, and so does Chromium.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { promisify } from "node:util";
import { firstLine, launch, text, view } from "../dashboard/harness.mjs";

const RESTART_MS = 600_000;
const NAME = "kept-by-the-page";
const [port] = process.argv.slice(2);
const run = promisify(execFile);
const output = async (...command) => (await run(command[0], command.slice(1))).stdout.trim();
const status = async () => JSON.parse(await output("bulkhead", "status", "--format", "json"));
const cpus = async () => Number(await output("docker", "info", "--format", "{{.NCPU}}"));

// It ends by itself when the browser has gone.
const dashboard = spawn("bulkhead", ["dashboard", "--no-browser", "--port", port, "--idle-timeout", "30"],
  { stdio: ["ignore", "pipe", "inherit"] });
const address = await firstLine(dashboard);

const before = await status();
const wanted = await cpus() === 1 ? 2 : 1;
await output("docker", "run", "--detach", "--init", "--restart", "always", "--name", NAME, "alpine", "sleep", "infinity");
const browser = await launch();
try {
  const tab = await browser.newPage();
  tab.setDefaultTimeout(RESTART_MS);
  await tab.goto(address);
  await text(tab, "state-text", "running");
  await view(tab, "Containers");
  await text(tab, "container-rows", NAME);
  await view(tab, "Settings");
  await tab.locator("#setting-cpus").fill(String(wanted));
  await tab.getByRole("button", { name: "Apply & restart" }).click();
  await text(tab, "state-text", "starting");
  await text(tab, "state-text", "running");
  const after = await status();
  assert.deepEqual([after.state, after.boot], ["running", before.boot + 1]);
  assert.equal(await cpus(), wanted);
  // The page has the engine's containers again, and the engine has started this one.
  await view(tab, "Containers");
  await text(tab, "container-rows", NAME);
  assert.equal(await output("docker", "exec", NAME, "echo", "again"), "again");
  console.log(`boot ${before.boot} to ${after.boot} from the page, ${wanted} CPU(s)`);
} finally {
  await browser.close();
  await run("docker", ["rm", "--force", NAME]);
  await run("bulkhead", ["settings", "unset", "cpus"]);
}
console.log("passed");
// The dashboard's end is not waited for.
process.exit(0);

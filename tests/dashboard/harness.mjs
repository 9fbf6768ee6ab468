// The program in directories of a test, and Debian's Chromium.

import { execFile, spawn } from "node:child_process";
import { mkdtempSync, mkdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import { chromium } from "playwright-core";

const PROGRAM = process.env.BULKHEAD_TEST_PROGRAM;
const CHROMIUM = process.env.BULKHEAD_TEST_CHROMIUM ?? "/usr/bin/chromium";
const run = promisify(execFile);

// As in tests/host/policy.rs: the program runs where /etc is another one.
const UNDER_POLICY = "umask 022 && mount -t tmpfs none /etc && mkdir /etc/bulkhead && "
  + "printf %s \"$1\" >/etc/bulkhead/admin-settings.json && shift && exec \"$@\"";

export function launch() {
  return chromium.launch({
    executablePath: CHROMIUM,
    args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync",
      // A name of somebody's own for this machine.
      "--host-resolver-rules=MAP rebound.example 127.0.0.1"],
  });
}

// The first line that a program prints.
export async function firstLine(child) {
  for await (const line of createInterface({ input: child.stdout })) return line;
  throw new Error(`${child.spawnargs} printed nothing`);
}

// Waits until an element of the page has these words.
export const text = (tab, id, expected) => tab.waitForFunction(
  ([name, words]) => document.getElementById(name)?.textContent.includes(words), [id, expected]);

export const view = (tab, name) => tab.getByRole("link", { name, exact: true }).click();

// The directories of one test; `end` ends what was started in them.
export class Home {
  constructor(policy) {
    this.policy = policy;
    this.root = mkdtempSync(join(tmpdir(), "bhd"));
    this.children = [];
    for (const name of ["config", "data", "state", "cache", "run", "docker"]) mkdirSync(this.path(name));
  }

  path(name) {
    return join(this.root, name);
  }

  get environment() {
    const names = { CONFIG: "config", DATA: "data", STATE: "state", CACHE: "cache" };
    const xdg = Object.entries(names).map(([key, name]) => [`XDG_${key}_HOME`, this.path(name)]);
    return { ...Object.fromEntries(xdg), PATH: process.env.PATH, HOME: this.root, XDG_RUNTIME_DIR: this.path("run"),
      DOCKER_CONFIG: this.path("docker"), BULKHEAD_TRY_ANY_KVM: "1" };
  }

  words(words) {
    if (this.policy === undefined) return [PROGRAM, words];
    return ["unshare", ["--map-root-user", "--mount", "sh", "-c", UNDER_POLICY, "sh", this.policy, PROGRAM, ...words]];
  }

  // Runs the program to its end; returns its output.
  async bulkhead(...words) {
    const [program, all] = this.words(words);
    const { stdout } = await run(program, all, { env: this.environment });
    return stdout.trim();
  }

  // Starts the program and returns it with its first line.
  async start(...words) {
    const [program, all] = this.words(words);
    const child = spawn(program, all, { env: this.environment, stdio: ["ignore", "pipe", "ignore"] });
    this.children.push(child);
    return { child, line: await firstLine(child) };
  }

  backend() {
    return this.start("backend");
  }

  async dashboard(...words) {
    const { child, line } = await this.start("dashboard", "--no-browser", ...words);
    return { child, address: line, origin: new URL(line).origin };
  }

  async status() {
    return JSON.parse(await this.bulkhead("status", "--format", "json"));
  }

  async end() {
    // A backend that the page started is nobody's child here.
    await this.bulkhead("stop", "--force").catch(() => {});
    for (const child of this.children) await kill(child);
    rmSync(this.root, { recursive: true, force: true });
  }
}

// Ends a child and waits for it.
export function kill(child) {
  if (child.exitCode !== null || child.signalCode !== null) return undefined;
  return new Promise((resolve) => {
    child.once("exit", resolve);
    child.kill("SIGKILL");
  });
}

// The dashboard's page in a browser: each control, who can use it, and what it makes of hostile input.

import assert from "node:assert/strict";
import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { after, afterEach, before, test } from "node:test";
import { join } from "node:path";
import { Home, kill, launch, text, view } from "./harness.mjs";

const LOCKED = JSON.stringify({ enhancedContainerIsolation: { value: true, locked: true } });
const FILE = "/etc/bulkhead/admin-settings.json";
const ISOLATION = "Use Enhanced Container Isolation";

let browser;
let ends = [];

before(async () => { browser = await launch(); });
after(() => browser.close());
afterEach(async () => {
  for (const end of ends.reverse()) await end();
  ends = [];
});

function newHome(policy) {
  const home = new Home(policy);
  ends.push(() => home.end());
  return home;
}

// A new browser profile, in which every request to another machine and every message of the console is an error.
async function newTab(origin, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1180, height: 860 }, ...options });
  ends.push(() => context.close());
  const tab = await context.newPage();
  tab.setDefaultTimeout(20_000);
  tab.complaints = [];
  tab.on("pageerror", (error) => tab.complaints.push(String(error)));
  tab.on("console", (message) => {
    // The browser's own note of a status code, which the page shows as well.
    if (message.type() === "error" && !message.text().startsWith("Failed to load resource")) {
      tab.complaints.push(message.text());
    }
  });
  tab.on("request", (request) => {
    const url = new URL(request.url());
    if (url.origin !== origin && url.protocol !== "blob:") tab.complaints.push(`asked ${request.url()}`);
  });
  return tab;
}

// A page with a session. `setUp` may prepare the tab before the address is opened.
async function opened(home, { setUp, ...options } = {}) {
  const dashboard = await home.dashboard();
  const tab = await newTab(dashboard.origin, options);
  await setUp?.(tab);
  await tab.goto(dashboard.address);
  return { ...dashboard, tab };
}

async function settings(tab) {
  await view(tab, "Settings");
  await tab.getByLabel(ISOLATION, { exact: true }).waitFor();
}

test("the address leads to a page without a secret in its own address", async () => {
  const { tab, origin, address } = await opened(newHome());
  await text(tab, "state-text", "stopped");
  assert.equal(tab.url(), `${origin}/`);
  const [cookie, ...others] = await tab.context().cookies();
  assert.deepEqual([cookie.httpOnly, cookie.sameSite, cookie.expires, others.length], [true, "Strict", -1, 0]);
  assert.equal(await tab.evaluate(() => document.cookie), "");
  assert.deepEqual(tab.complaints, []);
  // The browser that has the session may come back to the address; another one may not.
  await tab.goto(address);
  await text(tab, "state-text", "stopped");
  const stranger = await newTab(origin);
  for (const wrong of [address, `${origin}/open?token=0`, `${origin}/open`]) {
    const answer = await stranger.goto(wrong);
    assert.equal(answer.status(), 403);
    assert.match(await stranger.textContent("body"), /run `bulkhead dashboard`/);
  }
  await stranger.goto(origin);
  await text(stranger, "lost", "session has ended");
  assert.equal(await stranger.locator("button:enabled").count(), 0);
});

test("a setting is changed and returned to its default with the keyboard alone", async () => {
  const home = newHome();
  const { tab } = await opened(home);
  await settings(tab);
  const box = tab.getByLabel(ISOLATION, { exact: true });
  await box.focus();
  await tab.keyboard.press("Space");
  await text(tab, "apply-count", "1 change");
  await tab.locator("#apply").focus();
  await tab.keyboard.press("Enter");
  await text(tab, "apply-count", "Saved");
  assert.equal(await home.bulkhead("settings", "get", "enhancedContainerIsolation"), "false");
  await tab.getByText("Set by you").waitFor();
  await tab.getByRole("button", { name: `Return to the default: ${ISOLATION}` }).focus();
  await tab.keyboard.press("Enter");
  assert.equal(await box.isChecked(), true);
  await tab.locator("#apply").click();
  await text(tab, "apply-count", "Saved");
  assert.equal(await home.bulkhead("settings", "get", "enhancedContainerIsolation"), "true");
  assert.equal(readFileSync(home.path("config/bulkhead/default/settings.json"), "utf8"), "{}\n");
  assert.deepEqual(tab.complaints, []);
});

test("each setting has a control that saves it", async () => {
  const home = newHome();
  const { tab } = await opened(home);
  await settings(tab);
  const values = {
    enhancedContainerIsolation: false,
    dockerSocketMount: '{"imageList": {"images": ["docker:cli"]}}',
    blockDockerLoad: true,
    cpus: 2,
    memoryMiB: 1024,
    diskGiB: 10,
    filesharingDirectories: [],
    filesharingHostLocks: true,
    filesharingSockets: ["/run/user/1000/app.sock"],
    sshAgent: "/run/user/1000/agent",
    timeZone: "Europe/Berlin",
    network: "none",
    vpnkitCIDR: "10.1.0.0/24",
    portBindingBehavior: "local-only-port-binding",
    vmPorts: ["2377:2377/tcp", "127.0.0.1:8080:80/udp"],
    hostLoopback: false,
    proxyHttpMode: "manual",
    overrideProxyHttp: "http://proxy.example.org:3128",
    overrideProxyHttps: "http://proxy.example.org:3129",
    overrideProxyExclude: [".example.org", "10.0.0.0/8"],
    containersProxy: true,
    dockerDaemonOptions: '{"debug": true}',
  };
  const keys = Object.keys(JSON.parse(await home.bulkhead("settings", "list", "--format", "json")));
  assert.deepEqual(Object.keys(values).sort(), keys.sort(), "a new setting needs a value here");
  for (const [key, value] of Object.entries(values)) {
    const control = tab.locator(`#setting-${key}`);
    const kind = await control.evaluate((element) => element.type);
    if (kind === "checkbox") await control.setChecked(value);
    else if (kind === "select-one") await control.selectOption(value);
    else if (["overrideProxyExclude", "vmPorts"].includes(key)) await control.fill(value.join(", "));
    else await control.fill(typeof value === "string" ? value : JSON.stringify(value));
  }
  await text(tab, "apply-count", `${keys.length} changes`);
  await tab.locator("#apply").click();
  await text(tab, "apply-count", "Saved");
  const saved = JSON.parse(readFileSync(home.path("config/bulkhead/default/settings.json"), "utf8"));
  assert.deepEqual(saved, values);
  assert.deepEqual(tab.complaints, []);
});

test("a wrong value stays in the form with the reason, and a hidden password is not saved", async () => {
  const home = newHome();
  await home.bulkhead("settings", "set", "overrideProxyHttp", "http://me:s3cret@proxy.example.org:3128");
  const { tab } = await opened(home);
  await settings(tab);
  await tab.locator("#setting-cpus").fill("99");
  await tab.locator("#apply").click();
  await text(tab, "problem-text", "must be a whole number from 1 to 32");
  assert.equal(await tab.evaluate(() => document.activeElement.id), "setting-cpus");
  assert.equal(await tab.getAttribute("#setting-cpus", "aria-invalid"), "true");
  await tab.locator("#discard").click();
  assert.equal(await tab.inputValue("#setting-cpus"), "");
  assert.equal(await tab.getAttribute("#setting-cpus", "aria-invalid"), null);
  const proxy = tab.locator("#setting-overrideProxyHttp");
  assert.equal(await proxy.inputValue(), "http://***@proxy.example.org:3128");
  await proxy.fill("http://***@other.example.org:3128");
  await tab.locator("#apply").click();
  await text(tab, "problem-text", "hidden password");
  await tab.locator("#discard").click();
  assert.match(await proxy.inputValue(), /@proxy\./);
  await tab.locator("#setting-filesharingDirectories").fill("[");
  await tab.locator("#apply").click();
  await text(tab, "problem-text", "must be JSON");
  assert.match(await home.bulkhead("settings", "get", "overrideProxyHttp"), /s3cret/);
  assert.equal(await home.bulkhead("settings", "get", "cpus"), "auto");
});

test("a locked setting is greyed out, names the administrator's file and cannot be changed around the page", async () => {
  const { tab } = await opened(newHome(LOCKED));
  await settings(tab);
  const box = tab.getByLabel(ISOLATION, { exact: true });
  assert.deepEqual([await box.isDisabled(), await box.isChecked()], [true, true]);
  const described = await box.evaluate((element) => element.getAttribute("aria-describedby").split(" ")
    .map((id) => document.getElementById(id).textContent).join(" "));
  assert.match(described, new RegExp(`Locked by the administrator: ${FILE}`));
  assert.equal(await tab.locator("#setting-cpus").isDisabled(), false);
  // Both of the one lock.
  assert.equal(await tab.locator("#setting-dockerSocketMount").isDisabled(), true);
  const answer = await tab.evaluate(async () => {
    const response = await fetch("/v1/settings/enhancedContainerIsolation",
      { method: "PUT", body: JSON.stringify({ value: false }) });
    return { status: response.status, ...await response.json() };
  });
  assert.equal(answer.status, 403);
  assert.match(answer.message, new RegExp(`is locked by ${FILE}`));
  await view(tab, "Policy");
  await text(tab, "policy-lead", FILE);
});

test("apply and restart saves, restarts, and shows why the VM cannot start", async () => {
  const home = newHome();
  await home.backend();
  const { tab } = await opened(home);
  await text(tab, "state-text", "stopped");
  await settings(tab);
  await tab.locator("#setting-cpus").fill("1");
  await tab.getByRole("button", { name: "Apply & restart" }).click();
  // There is no guest image in the test's directories, and perhaps no KVM.
  await text(tab, "state-text", "failed");
  assert.equal(await home.bulkhead("settings", "get", "cpus"), "1");
  await view(tab, "Overview");
  const { state, boot, reason } = await home.status();
  assert.deepEqual([state, boot, Boolean(reason)], ["failed", 1, true]);
  assert.equal(await tab.locator("#reason").textContent(), reason);
  assert.equal(await tab.locator("#reason").isVisible(), true);
  // Again from the button of every view.
  await tab.locator("#start").click();
  const deadline = Date.now() + 20_000;
  while ((await home.status()).boot < 2) assert.ok(Date.now() < deadline);
  assert.deepEqual(tab.complaints, []);
});

test("stop ends the backend, and the page goes on with settings and the reason of a start that fails", async () => {
  const home = newHome();
  const { child } = await home.backend();
  const { tab } = await opened(home);
  await text(tab, "facts", `process ${child.pid}`);
  await tab.locator("#stop").click();
  await text(tab, "facts", "not running");
  await text(tab, "state-text", "stopped");
  await tab.locator("#start").click();
  await tab.locator("#problem").waitFor();
  assert.notEqual(await tab.locator("#problem-text").textContent(), "");
  await tab.getByRole("button", { name: "Dismiss the message" }).click();
  assert.equal(await tab.locator("#problem").isVisible(), false);
  await settings(tab);
  await home.backend();
  await tab.waitForFunction(() => !document.getElementById("stop").disabled);
  assert.deepEqual(tab.complaints, []);
});

const HOSTILE = "<img src=x onerror=\"window.owned=1\"><script>window.owned=1</script>\"'`${1}";

test("log lines are text, and new ones follow", async () => {
  const home = newHome();
  mkdirSync(home.path("state/bulkhead/default"), { recursive: true });
  const log = home.path("state/bulkhead/default/console.log");
  writeFileSync(log, `first \u001b[31mred\u001b[0m\n${HOSTILE}\n`);
  const { tab } = await opened(home);
  await view(tab, "Logs");
  await text(tab, "log", HOSTILE);
  await text(tab, "log", "first red");
  appendFileSync(log, "the newest line\n");
  await text(tab, "log", "the newest line");
  await tab.getByLabel("Follow", { exact: true }).focus();
  await tab.keyboard.press("Space");
  await tab.getByRole("combobox", { name: "Log" }).selectOption("backend");
  await tab.locator("#log-empty").waitFor();
  assert.equal(await tab.evaluate(() => window.owned), undefined);
  assert.deepEqual(tab.complaints, []);
});

const ID = "0123456789abcdef".repeat(4);

const WEB = { Id: ID, Names: ["/web"], Image: "nginx:1.29", State: "running", Status: "Up 3 minutes", Created: 1,
  NetworkSettings: { Networks: { bridge: { IPAddress: "172.17.0.2", GlobalIPv6Address: "" } } } };
const ORDINARY = [WEB,
  { ...WEB, Id: ID.replace("0", "1"), Names: ["/database"], Image: "postgres:18", NetworkSettings: {} },
  { Id: ID.replace("0", "2"), Names: ["/import"], Image: "registry.example.org/importer:2026.11", State: "exited",
    Status: "Exited (0) 2 hours ago", Created: 1 }];
// Names that try everything, and values of other kinds than they should be.
const UNRULY = [WEB,
  { Id: ID.replace("0", "1"), Names: [`/${HOSTILE}`], Image: HOSTILE, State: "running", Status: HOSTILE, Created: 1 },
  { Id: "../../v1/stop", Names: null, Image: 7, State: "exited", Status: "Exited (0) 2 days ago", Created: {} }];

// The answers of an engine with these containers; `second` is the user of a process in the second.
const guest = (containers, second) => async (tab) => {
  const json = (body) => ({ contentType: "application/json", body: JSON.stringify(body) });
  const status = { profile: "default", state: "running", boot: 1, ending: false, dockerHost: "unix:///run/user/1000/"
    + "bulkhead/default/docker.sock", context: "bulkhead", backendPid: 4242, vmmPid: 4250,
  stages: [["kernel", 211], ["agent", 268], ["disk", 402], ["engine", 1631]].map(([stage, ms]) => ({ stage, ms })),
  vm: { cpus: 4, memoryMiB: 8192, diskGiB: 64, enhancedContainerIsolation: true, kernel: "6.12.48-bulkhead",
    startedUnix: 1_790_000_000 } };
  await tab.route("**/v1/events", (route) => route.fulfill({ contentType: "application/x-ndjson",
    body: `${JSON.stringify(status)}\n` }));
  let sample = 0;
  await tab.route("**/v1/usage", (route) => {
    sample += 1;
    const wave = Math.sin(sample / 9) + Math.sin(sample / 4) / 3;
    return route.fulfill(json({ memory: { sizeBytes: 8192 * 2 ** 20, residentBytes: (1900 + 700 * wave) * 2 ** 20 },
      disk: { sizeBytes: 64 * 2 ** 30, allocatedBytes: (7 + sample / 60) * 2 ** 30, freeBytes: 212 * 2 ** 30 } }));
  });
  await tab.route("**/v1/ports", (route) => route.fulfill(json({ ports: [
    { protocol: "tcp", hostIp: "0.0.0.0", hostPort: 8080, containerIp: "172.17.0.2", containerPort: 80 },
    { protocol: "tcp", hostIp: "::", hostPort: 8080, containerIp: "172.17.0.2", containerPort: 80 },
    { protocol: "udp", hostIp: "127.0.0.1", hostPort: 7946, containerIp: "192.168.65.3", containerPort: 7946,
      ofVm: true }] })));
  await tab.route("**/docker/containers", (route) => route.fulfill(json(containers)));
  await tab.route(`**/docker/containers/${ID}/processes`, (route) => route.fulfill(json({
    Titles: ["PID", "UID"], Processes: [["700", "165536"], ["731", "165637"]] })));
  await tab.route(`**/docker/containers/${ID.replace("0", "1")}/processes`, (route) => route.fulfill(json({
    Titles: ["PID", "UID"], Processes: [["702", second]] })));
};

test("containers are listed with their ids and ports, and hostile names are text", async () => {
  const { tab } = await opened(newHome(), { setUp: guest(UNRULY, HOSTILE) });
  await text(tab, "state-text", "running");
  await view(tab, "Containers");
  await text(tab, "container-rows", "165536 – 231071");
  const row = await tab.getByRole("row", { name: /^web / }).textContent();
  assert.match(row, /0\.0\.0\.0:8080 → 80\/tcp\[::\]:8080 → 80\/tcp$/);
  assert.equal(await tab.locator("#vm-port-list").textContent(), "127.0.0.1:7946 → 7946/udp");
  await text(tab, "container-rows", HOSTILE);
  assert.equal(await tab.locator("#container-rows img, #container-rows script").count(), 0);
  assert.equal(await tab.evaluate(() => window.owned), undefined);
  assert.deepEqual(tab.complaints, []);
});

// Applies another number of CPUs, and keeps the answer to the request for `path` back; returns what lets it go.
const applied = async (tab, path) => {
  let answer;
  const asked = new Promise((resolve) => { answer = resolve; });
  await tab.route(path, async (route) => {
    const response = await route.fetch();
    answer(() => route.fulfill({ response }));
  }, { times: 1 });
  await tab.locator("#setting-cpus").fill("2");
  await tab.locator("#apply").click();
  return asked;
};

test("a text that is typed while the settings are read stays in the form", async () => {
  const { tab } = await opened(newHome());
  await settings(tab);
  const go = await applied(tab, "**/v1/settings");
  await tab.locator("#setting-memoryMiB").fill("2048");
  const [answered] = await Promise.all([tab.waitForResponse("**/v1/settings"), go()]);
  await answered.finished();
  await text(tab, "apply-count", "1 change");
  assert.equal(await tab.inputValue("#setting-memoryMiB"), "2048");
  await tab.locator("#discard").click();
  assert.equal(await tab.inputValue("#setting-memoryMiB"), "");
  assert.equal(await tab.inputValue("#setting-cpus"), "2");
  assert.deepEqual(tab.complaints, []);
});

test("a text that is typed into the field that is being saved stays there as a change", async () => {
  const { tab } = await opened(newHome());
  await settings(tab);
  const go = await applied(tab, "**/v1/settings/cpus");
  await tab.locator("#setting-cpus").fill("1");
  // The list of settings is read when all of them are saved.
  await Promise.all([tab.waitForResponse("**/v1/settings"), go()]);
  await text(tab, "apply-count", "1 change");
  assert.equal(await tab.inputValue("#setting-cpus"), "1");
  await tab.locator("#apply").click();
  await text(tab, "apply-count", "Saved");
  assert.equal(await tab.inputValue("#setting-cpus"), "1");
  assert.deepEqual(tab.complaints, []);
});

test("a policy is checked and downloaded as it is in the editor", async () => {
  const { tab } = await opened(newHome());
  await view(tab, "Policy");
  await text(tab, "policy-result", "Valid.");
  const templates = await tab.locator("#policy-template option").evaluateAll((all) => all.map((one) => one.value));
  for (const template of templates) {
    await tab.locator("#policy-template").selectOption(template);
    await tab.locator("#policy-text").fill("");
    await tab.locator("#policy-fill").click();
    await text(tab, "policy-result", "Valid.");
  }
  await tab.locator("#policy-text").fill("{\n  \"proxy\": }");
  await tab.locator("#policy-download").click();
  await text(tab, "policy-result", "line 2");
  assert.equal(await tab.evaluate(() => document.activeElement.id), "policy-text");
  const policy = `${LOCKED}\n`;
  await tab.locator("#policy-text").fill(policy);
  const [download] = await Promise.all([tab.waitForEvent("download"), tab.locator("#policy-download").click()]);
  assert.equal(download.suggestedFilename(), "admin-settings.json");
  assert.equal(readFileSync(await download.path(), "utf8"), policy);
});

test("a page of another origin, on another port or by another name, can neither read nor change anything", async () => {
  const home = newHome();
  const { child } = await home.backend();
  const { tab, origin, address } = await opened(home);
  await text(tab, "state-text", "stopped");
  const server = createServer((_, response) => {
    response.setHeader("content-type", "text/html");
    response.end(`<form method=post action="${origin}/v1/stop"></form><iframe src="${origin}/"></iframe>`);
  }).listen(0, "127.0.0.1");
  ends.push(() => new Promise((resolve) => server.close(resolve)));
  await new Promise((resolve) => server.once("listening", resolve));
  // In the same browser profile, with the session's cookie.
  const foreign = await tab.context().newPage();
  await foreign.goto(`http://127.0.0.1:${server.address().port}/`);
  const outcome = await foreign.evaluate(async (target) => {
    const attempt = (path, options) => fetch(target + path, { credentials: "include", ...options })
      .then((answer) => `${answer.status} ${answer.type}`, () => "refused");
    return [await attempt("/v1/status"), await attempt("/v1/stop", { method: "POST" }),
      await attempt("/v1/settings/cpus", { method: "PUT", body: "{\"value\":1}" }),
      await attempt("/v1/stop", { method: "POST", mode: "no-cors" }).then((end) => end.replace("0 opaque", "refused"))];
  }, origin);
  assert.deepEqual(outcome, ["refused", "refused", "refused", "refused"]);
  assert.equal(foreign.frames()[1]?.url() === `${origin}/`, false, "the page is in no frame");
  const [answer] = await Promise.all([foreign.waitForResponse(`${origin}/v1/stop`),
    foreign.evaluate(() => document.forms[0].submit())]);
  assert.equal(answer.status(), 403);
  const other = await tab.context().newPage();
  const rebound = await other.goto(address.replace("127.0.0.1", "rebound.example"));
  assert.equal(rebound.status(), 403);
  assert.equal((await home.status()).backendPid, child.pid);
  assert.equal(await home.bulkhead("settings", "get", "cpus"), "auto");
});

test("a stale tab says so, and its session opens nothing of the next dashboard", async () => {
  const home = newHome();
  const { tab, child, origin } = await opened(home);
  await text(tab, "state-text", "stopped");
  await kill(child);
  await text(tab, "lost", "server has ended");
  assert.equal(await tab.locator("button:enabled, input:enabled").count(), 0);
  await home.dashboard("--port", new URL(origin).port);
  await tab.reload();
  await text(tab, "lost", "session has ended");
});

test("every control has a name, and the keyboard reaches the content first", async () => {
  const { tab } = await opened(newHome());
  await settings(tab);
  for (const name of ["Logs", "Policy", "Overview"]) await view(tab, name);
  const nameless = await tab.evaluate(() => [...document.querySelectorAll("button, input, select, textarea, a, svg")]
    .filter((one) => !(one.labels?.[0]?.textContent || one.getAttribute("aria-label") || one.textContent).trim())
    .map((one) => one.outerHTML));
  assert.deepEqual(nameless, []);
  await tab.reload();
  await tab.keyboard.press("Tab");
  await tab.keyboard.press("Enter");
  assert.equal(await tab.evaluate(() => document.activeElement.id), "main");
  const live = await tab.evaluate(() => ["state", "apply-count", "policy-result", "problem"].map((id) => {
    const element = document.getElementById(id);
    return element.getAttribute("aria-live") ?? element.getAttribute("role");
  }));
  assert.deepEqual(live, ["polite", "polite", "polite", "alert"]);
  assert.equal(await tab.getAttribute("nav a[href='#overview']", "aria-current"), "page");
});

// The pictures of the documentation; only where they are asked for.
test("pictures", { skip: process.env.BULKHEAD_TEST_PICTURES ? false : "without BULKHEAD_TEST_PICTURES" }, async () => {
  const directory = process.env.BULKHEAD_TEST_PICTURES;
  const small = { width: 1040, height: 720 };
  const prepared = async (tab) => {
    await tab.clock.install({ time: new Date("2026-11-30T09:00:00") });
    await guest(ORDINARY, "231171")(tab);
  };
  for (const scheme of ["light", "dark"]) {
    const { tab } = await opened(newHome(), { setUp: prepared, colorScheme: scheme, viewport: small });
    await text(tab, "state-text", "running");
    for (let step = 0; step < 120; step += 1) {
      await tab.clock.runFor(5000);
      await tab.evaluate(() => Promise.resolve());
    }
    if (scheme === "light") await tab.screenshot({ path: join(directory, "dashboard-light.png") });
    else {
      await view(tab, "Containers");
      await tab.clock.runFor(5000);
      await text(tab, "container-rows", "165536");
      await text(tab, "container-rows", "231072");
      await tab.screenshot({ path: join(directory, "dashboard-dark.png") });
    }
  }
  const { tab } = await opened(newHome(LOCKED), { viewport: small });
  await settings(tab);
  await tab.locator("#setting-cpus").fill("4");
  await tab.screenshot({ path: join(directory, "dashboard-locked.png") });
});

// Settings: a form made from the list that the API has, and what a user changed in it.

import { Refused, get, post, put, remove } from "./api.js";
import { find, make, say } from "./dom.js";

// The order and the words of the settings that this page knows. Any other one has its own name and comes last.
const GROUPS = [
  ["Isolation", {
    enhancedContainerIsolation: "Use Enhanced Container Isolation",
    dockerSocketMount: "Containers that may use the Docker socket",
    blockDockerLoad: "Block docker load",
  }],
  ["Resources", { cpus: "CPUs", memoryMiB: "Memory in MiB", diskGiB: "Disk limit in GiB" }],
  ["Files", {
    filesharingDirectories: "Directories that containers may mount",
    filesharingHostLocks: "Let locks hold against programs of this machine",
    filesharingSockets: "Sockets that containers may mount",
    sshAgent: "ssh-agent for containers",
    timeZone: "Time zone for containers",
  }],
  ["Network", {
    network: "Network of the VM",
    vpnkitCIDR: "Addresses of the VM",
    portBindingBehavior: "Where published ports listen",
    vmPorts: "Ports of the VM to publish, without isolation only",
    hostLoopback: "Let containers reach services of this machine",
  }],
  ["Proxy", {
    proxyHttpMode: "Proxy",
    overrideProxyHttp: "Proxy for HTTP",
    overrideProxyHttps: "Proxy for HTTPS",
    overrideProxyExclude: "Without the proxy",
    containersProxy: "Set the proxy in new containers",
  }],
  ["Engine", { dockerDaemonOptions: "Options of dockerd" }],
];

const CHOICES = {
  "default-port-binding": "On all addresses, unless a container names one",
  "default-local-port-binding": "On the loopback, unless a container names one",
  "local-only-port-binding": "On the loopback only",
  system: "As in the environment that starts the engine",
  manual: "As set below",
};

const SECRET = "***";

// Key → { setting, control, read, reset }.
const fields = new Map();
// The settings that return to their defaults.
const resets = new Set();

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// The control of a setting, how its value is written into it and read from it.
function control(setting) {
  const { type } = setting.accepts;
  const id = `setting-${setting.key}`;
  const common = { id, name: setting.key, autocomplete: "off", disabled: Boolean(setting.lockedBy) };
  const fill = (element, write, read) => ({ element, write, read });
  if (type === "bool") {
    const element = make("input", { ...common, type: "checkbox" });
    return fill(element, (value) => { element.checked = value; }, () => element.checked);
  }
  if (type === "integer") {
    const { min, max } = setting.accepts;
    const element = make("input", { ...common, type: "number", min, max, step: 1, placeholder: "automatic" });
    return fill(element, (value) => { element.value = value ?? ""; },
      () => (element.value === "" ? null : Number(element.value)));
  }
  if (type === "choice") {
    const options = setting.accepts.values.map((value) => make("option", { value }, CHOICES[value] ?? value));
    const element = make("select", common, ...options);
    return fill(element, (value) => { element.value = value; }, () => element.value);
  }
  if (type === "list") {
    const element = make("input", { ...common, type: "text", spellcheck: "false" });
    const words = () => element.value.split(",").map((word) => word.trim()).filter(Boolean);
    return fill(element, (value) => { element.value = value.join(", "); }, words);
  }
  const long = type === "json" || ["dockerSocketMount", "dockerDaemonOptions"].includes(setting.key);
  const element = long ? make("textarea", { ...common, rows: 3, spellcheck: "false" })
    : make("input", { ...common, type: "text", spellcheck: "false" });
  if (type !== "json") return fill(element, (value) => { element.value = value; }, () => element.value);
  return fill(element, (value) => { element.value = JSON.stringify(value, null, 2); }, () => JSON.parse(element.value));
}

function origin(setting) {
  switch (setting.origin) {
    case "locked": return "Locked by the administrator: ";
    case "policy": return "Suggested by the administrator";
    case "user": return "Set by you";
    default: return "Default";
  }
}

// What a control shows, as it is typed or chosen.
const shown = (element) => (element.type === "checkbox" ? element.checked : element.value);

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

function field(setting, label) {
  const { element, write, read } = control(setting);
  const hint = `hint-${setting.key}`;
  const note = `origin-${setting.key}`;
  element.setAttribute("aria-describedby", `${hint} ${note}`);
  write(setting.value);
  const entry = { setting, element, write, read };
  fields.set(setting.key, entry);
  const bool = setting.accepts.type === "bool";
  const name = make("label", { for: element.id }, label);
  const back = make("button", { type: "button", class: "link", "aria-label": `Return to the default: ${label}` },
    "Return to the default");
  back.hidden = setting.origin !== "user";
  back.addEventListener("click", () => {
    resets.add(setting.key);
    write(setting.default);
    changed();
  });
  element.addEventListener("input", () => {
    resets.delete(setting.key);
    element.removeAttribute("aria-invalid");
    changed();
  });
  return make("div", { class: `field${bool ? " switch" : ""}${setting.lockedBy ? " locked" : ""}`,
    "data-key": setting.key },
    make("div", { class: "words" }, name,
      make("p", { class: "hint", id: hint }, `${sentence(setting.description)}.`),
      make("p", { class: "origin", id: note, "data-origin": setting.origin }, origin(setting),
        setting.lockedBy && make("span", { class: "path" }, setting.lockedBy), " ", back)),
    make("div", { class: "value" }, element));
}

// What differs from the settings as they were read. A text that is not JSON is a difference as well.
function changes() {
  const found = [];
  for (const [key, { setting, element, read }] of fields) {
    if (setting.lockedBy) continue;
    if (resets.has(key)) found.push({ key, reset: true });
    else {
      let value;
      try {
        value = read();
      } catch {
        found.push({ key, wrong: "must be JSON", element });
        continue;
      }
      if (same(value, setting.value)) continue;
      // "Automatic" is the absence of a value.
      if (value === null) found.push({ key, reset: true });
      else if (JSON.stringify(value).includes(SECRET)) {
        found.push({ key, wrong: "has a hidden password; type the whole value", element });
      } else found.push({ key, value, element });
    }
  }
  return found;
}

function changed() {
  const count = changes().length;
  say(find("apply-count"), count === 0 ? "No changes" : count === 1 ? "1 change" : `${count} changes`);
  for (const id of ["discard", "apply", "apply-restart"]) find(id).disabled = count === 0;
}

function draw({ settings, policy }, status) {
  const focused = document.activeElement?.id;
  fields.clear();
  resets.clear();
  const rest = new Map(settings.map((setting) => [setting.key, setting]));
  const groups = GROUPS.map(([title, labels]) => [title, Object.entries(labels)
    .filter(([key]) => rest.has(key))
    .map(([key, label]) => {
      const setting = rest.get(key);
      rest.delete(key);
      return field(setting, label);
    })]);
  groups.push(["Others", [...rest.values()].map((setting) => field(setting, setting.key))]);
  find("settings-form").replaceChildren(...groups.filter(([, list]) => list.length > 0).map(([title, list]) =>
    make("fieldset", { class: "card" }, make("legend", {}, title), ...list)));
  const outdated = status?.backendPid != null && (policy?.digest !== status.policy?.digest);
  say(find("settings-lead"), outdated
    ? "The administrator’s policy has changed since the engine’s backend started; it counts after a stop and a start."
    : "Changes take effect when the engine starts again.");
  changed();
  if (focused) find(focused)?.focus();
}

// Draws the settings as they are now, unless there are changes that a user has typed meanwhile.
async function read(page) {
  const now = await get("/v1/settings");
  if (changes().length === 0) draw(now, page.status);
}

// Takes all changes back, at once: what is typed while a request is under way would be lost.
function discard() {
  resets.clear();
  for (const { setting, element, write } of fields.values()) {
    write(setting.value);
    element.removeAttribute("aria-invalid");
  }
  changed();
}

// Writes the changes one after the other; the first that is refused ends it, and the others stay in the form.
async function save() {
  const list = changes().map((change) => ({ ...change, sent: shown(fields.get(change.key).element) }));
  const wrong = list.find((change) => change.wrong);
  const refuse = (key, reason) => {
    const { element } = fields.get(key);
    element.setAttribute("aria-invalid", "true");
    element.focus();
    throw new Error(reason);
  };
  if (wrong) refuse(wrong.key, `${wrong.key}: ${wrong.wrong}`);
  for (const { key, value, reset, sent } of list) {
    let now;
    try {
      now = await (reset ? remove(`/v1/settings/${key}`) : put(`/v1/settings/${key}`, { value }));
    } catch (error) {
      changed();
      if (error instanceof Refused) refuse(key, error.message);
      throw error;
    }
    const entry = fields.get(key);
    entry.setting = now;
    // What was typed meanwhile is a change of its own.
    if (shown(entry.element) !== sent) continue;
    resets.delete(key);
    entry.write(now.value);
  }
}

async function apply(page, restart) {
  const buttons = ["apply", "apply-restart"].map(find);
  for (const button of buttons) button.disabled = true;
  await page.attempt(async () => {
    await save();
    await read(page);
    say(find("apply-count"), restart ? "Saved; the engine restarts" : "Saved; in effect at the next start");
    if (restart) await post("/v1/restart");
  });
  if (changes().length > 0) changed();
}

export function enter(page) {
  page.attempt(() => read(page));
}

export function begin(page) {
  find("settings-form").addEventListener("submit", (event) => event.preventDefault());
  find("discard").addEventListener("click", () => page.attempt(() => {
    discard();
    return read(page);
  }));
  find("apply").addEventListener("click", () => apply(page, false));
  find("apply-restart").addEventListener("click", () => apply(page, true));
}

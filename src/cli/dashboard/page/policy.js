// An editor of policies, for the person who prepares one: it checks and downloads, and changes nothing.

import { get, post } from "./api.js";
import { find, say } from "./dom.js";

const locked = (value) => ({ locked: true, value });

const isolation = () => ({ configurationFileVersion: 2, enhancedContainerIsolation: locked(true) });

const TEMPLATES = {
  isolation,
  socket: () => {
    const policy = isolation();
    policy.enhancedContainerIsolation.dockerSocketMount = {
      imageList: { images: ["docker.io/library/docker:cli"] },
      commandList: { type: "deny", commands: ["push", "build"] },
    };
    return policy;
  },
  network: () => ({
    ...isolation(),
    portBindingBehavior: locked("default-local-port-binding"),
    blockDockerLoad: locked(true),
    proxy: { locked: true, mode: "manual", http: "http://proxy.example.org:3128",
      https: "http://proxy.example.org:3128", exclude: [".example.org"] },
    linuxVM: { vpnkitCIDR: locked("192.168.65.0/24") },
  }),
  settings: async () => {
    const { settings } = await get("/v1/settings");
    const value = (key) => settings.find((setting) => setting.key === key)?.value;
    return {
      configurationFileVersion: 2,
      enhancedContainerIsolation: locked(value("enhancedContainerIsolation")),
      blockDockerLoad: locked(value("blockDockerLoad")),
      portBindingBehavior: locked(value("portBindingBehavior")),
      linuxVM: { vpnkitCIDR: locked(value("vpnkitCIDR")) },
    };
  },
};

function result(kind, text) {
  find("policy-result").dataset.kind = kind;
  say(find("policy-result"), text);
}

// Returns whether the text is a policy.
async function check() {
  const { valid, problem, unknown } = await post("/v1/policy/validate", find("policy-text").value);
  find("policy-text").setAttribute("aria-invalid", String(!valid));
  if (!valid) result("bad", `Not valid: ${problem}`);
  else if (unknown.length > 0) result("warn", `Valid; keys without a meaning here: ${unknown.join(", ")}`);
  else result("good", "Valid.");
  return valid;
}

function download(text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = "admin-settings.json";
  link.click();
  // After the browser has begun to read it.
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

async function fill(page) {
  await page.attempt(async () => {
    const policy = await TEMPLATES[find("policy-template").value]();
    find("policy-text").value = `${JSON.stringify(policy, null, 2)}\n`;
    await check();
  });
}

export function take(status) {
  const file = status.policy?.file;
  say(find("policy-lead"), file
    ? `This machine has a policy: ${file}. “bulkhead policy show” lists what is in force.`
    : "This machine has no policy: its users can change all settings. Prepare one here for its administrator.");
}

export function begin(page) {
  find("policy-fill").addEventListener("click", () => fill(page));
  find("policy-check").addEventListener("click", () => page.attempt(check));
  find("policy-text").addEventListener("input", () => {
    find("policy-text").removeAttribute("aria-invalid");
    result("", "Not checked since the last change.");
  });
  find("policy-download").addEventListener("click", () => page.attempt(async () => {
    if (await check()) download(find("policy-text").value);
    else find("policy-text").focus();
  }));
}

export function enter(page) {
  if (find("policy-text").value === "") fill(page);
}

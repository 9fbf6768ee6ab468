// The frame of the page: the state, the engine's buttons, the views, and what happens when the server is gone.

import { Lost, follow, post } from "./api.js";
import * as containers from "./containers.js";
import { find, say, show } from "./dom.js";
import * as logs from "./logs.js";
import * as overview from "./overview.js";
import * as policy from "./policy.js";
import * as settings from "./settings.js";

const VIEWS = { overview, containers, logs, settings, policy };
const RETRY_MS = 400;

const page = {
  status: null,
  view: "overview",

  // Runs something that a user asked for, and shows why it failed.
  async attempt(work) {
    show(find("problem"), false);
    try {
      return await work();
    } catch (error) {
      if (error instanceof Lost) lose(error.message);
      else {
        say(find("problem-text"), error.message);
        show(find("problem"), true);
      }
      return undefined;
    }
  },

  // Runs something that happens by itself; the next time may be better.
  async quietly(work) {
    try {
      return await work();
    } catch (error) {
      if (error instanceof Lost) lose(error.message);
      return undefined;
    }
  },

  note(text) {
    say(find("note"), text);
    show(find("note"), text !== "");
  },
};

let lost = false;

function lose(message) {
  lost = true;
  say(find("lost"), message);
  show(find("lost"), true);
  say(find("state-text"), "disconnected");
  find("state").dataset.state = "lost";
  for (const control of document.querySelectorAll("button, input, select, textarea")) control.disabled = true;
}

function describe(status) {
  if (status.state === "starting" && status.waitingFor) return `starting, waiting for ${status.waitingFor}`;
  return status.state;
}

function take(status) {
  page.status = status;
  say(find("profile"), status.profile === "default" ? "" : status.profile);
  say(find("state-text"), describe(status));
  find("state").dataset.state = status.state;
  document.title = `Bulkhead: ${status.state}`;
  const down = status.state === "stopped" || status.state === "failed";
  find("start").disabled = !down || status.ending;
  find("restart").disabled = status.state !== "running" && status.state !== "starting";
  find("stop").disabled = (down && status.backendPid == null) || status.ending;
  const policyNow = status.policy?.problem;
  page.note([status.warning, policyNow && `The policy ${status.policy.file} cannot be used: ${policyNow}`]
    .filter(Boolean).join(" "));
  for (const view of Object.values(VIEWS)) view.take?.(status, page);
}

// The stream ends with the backend; the server's own stream stands in for one until there is another.
async function watch() {
  while (!lost) {
    await page.quietly(() => follow(take));
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

function turn() {
  const wanted = location.hash.slice(1);
  if (wanted === "main") return;
  page.view = Object.hasOwn(VIEWS, wanted) ? wanted : "overview";
  for (const name of Object.keys(VIEWS)) show(find(name), name === page.view);
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.getAttribute("href") === `#${page.view}`;
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  window.scrollTo(0, 0);
  VIEWS[page.view].enter?.(page);
}

find("start").addEventListener("click", () => page.attempt(() => post("/v1/start")));
find("restart").addEventListener("click", () => page.attempt(() => post("/v1/restart")));
find("stop").addEventListener("click", () => page.attempt(() => post("/v1/stop")));
find("problem-close").addEventListener("click", () => show(find("problem"), false));
window.addEventListener("hashchange", turn);

for (const view of Object.values(VIEWS)) view.begin?.(page);
turn();
watch();

// State, stages, numbers.

import { get } from "./api.js";
import { find, make, plot, say, show, size } from "./dom.js";

const STAGES = ["kernel", "agent", "disk", "engine"];
const PERIOD_MS = 5000;
const SAMPLES = 120;

const history = { memory: [], disk: [] };

function stage(name, status) {
  const reached = (status.stages ?? []).find((one) => one.stage === name);
  const waits = status.waitingFor === name;
  const state = reached ? "done" : waits ? "now" : "open";
  const words = reached ? `${(reached.ms / 1000).toFixed(2)} s` : waits ? "waiting…" : "–";
  return make("li", { class: state, "aria-current": waits ? "step" : null },
    make("span", { class: "stage" }, name), make("span", { class: "time" }, words));
}

function facts(status) {
  const vm = status.vm;
  const rows = [
    ["Machine", vm && `${vm.cpus} CPUs, ${size(vm.memoryMiB * 2 ** 20)} memory, ${vm.diskGiB} GiB disk`],
    ["Isolation", vm && (vm.enhancedContainerIsolation ? "on: each container has user ids of its own" : "off")],
    ["Kernel", vm?.kernel],
    ["Started", vm && new Date(vm.startedUnix * 1000).toLocaleString()],
    ["Docker context", status.context],
    ["DOCKER_HOST", status.dockerHost],
    ["Policy", status.policy?.file],
    ["Backend", status.backendPid == null ? "not running" : `process ${status.backendPid}`],
  ];
  return rows.filter(([, text]) => text).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]);
}

export function take(status) {
  find("stages").replaceChildren(...STAGES.map((name) => stage(name, status)));
  say(find("reason"), status.reason ?? "");
  show(find("reason"), Boolean(status.reason));
  const lines = status.console ?? [];
  say(find("console-lines"), lines.join("\n"));
  show(find("console"), lines.length > 0);
  find("facts").replaceChildren(...facts(status));
}

function draw(name, used, top, now, hint) {
  if (used != null) history[name].push(used);
  history[name].splice(0, history[name].length - SAMPLES);
  say(find(`${name}-now`), now);
  say(find(`${name}-hint`), hint);
  plot(find(`${name}-plot`), used == null ? [] : history[name], top, SAMPLES);
}

async function sample() {
  const { memory, disk } = await get("/v1/usage");
  if (memory) {
    const { residentBytes: used, sizeBytes: all } = memory;
    draw("memory", used, all, size(used), `of ${size(all)} that the VM may use`);
  } else {
    history.memory.length = 0;
    draw("memory", null, 1, "–", "The VM is not running.");
  }
  if (disk) {
    const { allocatedBytes: used, sizeBytes: all, freeBytes: free } = disk;
    draw("disk", used, all, size(used), `of ${size(all)} that it may grow to; ${size(free)} left on this machine`);
  } else {
    draw("disk", null, 1, "–", "The data disk is made at the first start.");
  }
}

export function begin(page) {
  const again = () => page.quietly(sample);
  setInterval(() => document.hidden || again(), PERIOD_MS);
  again();
}

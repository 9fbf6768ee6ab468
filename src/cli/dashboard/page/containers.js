// The containers, with the user ids that each has in the VM and the ports that lead to it; and the ports
// of the VM itself.

import { get } from "./api.js";
import { find, make, say, show } from "./dom.js";

const PERIOD_MS = 4000;
// Sizes of the runtime's ranges: docs/isolation.md.
const FIRST_ID = 100000;
const IDS = 65536;
const MAX_LOOKUPS = 20;

// The range of each container since it was started, by its id and its start.
const ranges = new Map();

// From the user of a process in the VM.
function rangeOf(uid) {
  if (!Number.isInteger(uid) || uid < 0) return "–";
  if (uid < FIRST_ID) return "shared with the VM";
  const start = FIRST_ID + Math.floor((uid - FIRST_ID) / IDS) * IDS;
  return `${start} – ${start + IDS - 1}`;
}

async function lookUp(container) {
  const { Titles: titles, Processes: processes } = await get(`/docker/containers/${container.Id}/processes`);
  const column = titles.indexOf("UID");
  // The highest: a process that came from the VM, by `docker exec` for a moment, still has a low one.
  const uids = processes.map((row) => Number(row[column]));
  return rangeOf(Math.max(...uids));
}

// A long name breaks behind its separators.
const breakable = (name) => name.split(/(?<=[/:@])/).flatMap((part) => [part, make("wbr")]);

const text = (value) => String(value ?? "");
const nameOf = (container) => text(container.Names?.[0]).replace(/^\//, "");

function portsOf(container, ports) {
  const networks = Object.values(container.NetworkSettings?.Networks ?? {});
  const addresses = networks.flatMap((network) => [network.IPAddress, network.GlobalIPv6Address]).filter(Boolean);
  return ports.filter((port) => addresses.includes(port.containerIp));
}

const words = ({ hostIp, hostPort, containerPort, protocol }) =>
  `${hostIp.includes(":") ? `[${hostIp}]` : hostIp}:${hostPort} → ${containerPort}/${protocol}`;

function drawOwn(ports) {
  const own = ports.filter((port) => port.ofVm);
  find("vm-port-list").replaceChildren(...own.map((port) => make("li", { class: "mono" }, words(port))));
  show(find("vm-ports"), own.length > 0);
}

function row(container, ports) {
  const key = container.Id + text(container.Created);
  const running = container.State === "running";
  return make("tr", {},
    make("th", { scope: "row" }, nameOf(container)),
    make("td", { class: "image" }, ...breakable(text(container.Image))),
    make("td", {}, make("span", { class: `pill ${running ? "good" : ""}` }, text(container.Status || container.State))),
    make("td", { class: "mono" }, running ? ranges.get(key) ?? "…" : "–"),
    make("td", { class: "mono" }, ...portsOf(container, ports).map((port) => make("div", {}, words(port)))));
}

function empty(words) {
  find("container-rows").replaceChildren();
  say(find("containers-empty"), words);
  show(find("containers-empty"), true);
}

async function refresh(page) {
  if (page.status?.state !== "running") {
    drawOwn([]);
    return empty("The engine is not running.");
  }
  const [list, { ports }] = await Promise.all([get("/docker/containers"), get("/v1/ports")]);
  drawOwn(ports);
  if (list.length === 0) return empty("There are no containers.");
  show(find("containers-empty"), false);
  const draw = () => find("container-rows").replaceChildren(...list.map((container) => row(container, ports)));
  draw();
  const key = (container) => container.Id + text(container.Created);
  for (const known of ranges.keys()) {
    // A container that was stopped may get another range.
    if (!list.some((container) => key(container) === known && container.State === "running")) ranges.delete(known);
  }
  const unknown = list.filter((container) => container.State === "running" && !ranges.has(key(container)));
  for (const container of unknown.slice(0, MAX_LOOKUPS)) {
    const range = await page.quietly(() => lookUp(container));
    if (range) ranges.set(key(container), range);
  }
  if (unknown.length > 0) draw();
  return undefined;
}

let busy = false;

async function again(page) {
  if (busy || page.view !== "containers" || document.hidden) return;
  busy = true;
  await page.quietly(() => refresh(page));
  busy = false;
}

export const enter = again;
export const take = (_, page) => again(page);
export const begin = (page) => setInterval(() => again(page), PERIOD_MS);

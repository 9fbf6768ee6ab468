// The end of a log.

import { get } from "./api.js";
import { find, say, show } from "./dom.js";

const PERIOD_MS = 2000;

async function refresh(page) {
  const { lines } = await get(`/v1/logs?source=${find("log-source").value}&lines=${find("log-lines").value}`);
  const log = find("log");
  // A reader who scrolled up stays there.
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  const chosen = document.getSelection()?.toString() && log.contains(document.getSelection().anchorNode);
  show(log, lines.length > 0);
  show(find("log-empty"), lines.length === 0);
  if (chosen && page.logShown) return;
  say(log, lines.join("\n"));
  if (atEnd || !page.logShown) log.scrollTop = log.scrollHeight;
  page.logShown = true;
}

export function enter(page) {
  page.logShown = false;
  page.quietly(() => refresh(page));
}

export function begin(page) {
  for (const id of ["log-source", "log-lines"]) find(id).addEventListener("change", () => enter(page));
  setInterval(() => {
    if (page.view === "logs" && find("log-follow").checked && !document.hidden) page.quietly(() => refresh(page));
  }, PERIOD_MS);
}

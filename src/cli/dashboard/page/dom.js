// Elements, made from text only: names of containers, log lines and messages come from others.

export const find = (id) => document.getElementById(id);

// Makes an element. Attributes are plain strings; children are elements or texts.
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// Sets a text only where it differs: a live region would be read out again, and a selection would be lost.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function show(element, visible) {
  element.hidden = !visible;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

// Bytes for people.
export function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${bytes >= 100 || unit === 0 ? Math.round(bytes) : bytes.toFixed(1)} ${UNITS[unit]}`;
}

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 320;
const HEIGHT = 72;

// Draws values from 0 to `top` as an area, the newest at the right edge.
export function plot(svg, values, top, room) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const step = WIDTH / (room - 1);
  const x = (index) => (WIDTH - (values.length - 1 - index) * step).toFixed(1);
  const y = (value) => (HEIGHT - 2 - (Math.min(value, top) / (top || 1)) * (HEIGHT - 6)).toFixed(1);
  const points = values.map((value, index) => `${x(index)},${y(value)}`);
  const line = svg.ownerDocument.createElementNS(SVG, "polyline");
  line.setAttribute("class", "line");
  line.setAttribute("points", points.join(" "));
  const area = svg.ownerDocument.createElementNS(SVG, "polygon");
  area.setAttribute("class", "area");
  if (points.length > 1) area.setAttribute("points", `${x(0)},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`);
  svg.replaceChildren(area, line);
}

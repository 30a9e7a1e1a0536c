"use strict";
// Draws the pictures from their points. The axes are those of the SVG pictures (chart/scale.rs); lines can be hidden, a range of x
// looked at closely, and values read off.
const { pictures, palette } = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const media = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme ?? (media.matches ? "dark" : "light")) === "dark";
const redraws = [];
const redraw = () => redraws.forEach((draw) => draw());

function make(name, attributes = {}, parent = null, text = "") {
  const svg = ["svg", "path", "line", "circle", "text", "rect", "clipPath", "g"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  parent?.append(element);
  return element;
}

// Light lines on dark paper, dark ones on light.
function colorOf(line) {
  const hex = palette[line.color % palette.length];
  if (!dark()) return hex;
  const part = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).map((c) => Math.round(c + (255 - c) * 0.42));
  return `rgb(${part.join(",")})`;
}
const dashOf = (line) => (line.color < palette.length ? "none" : "6 4");

// Numbers as people read them.
const trimmed = (x, digits) => (digits > 0 ? String(Number(x.toFixed(digits))) : x.toFixed(0));
function scaled(x, base, limit, units, digits) {
  let unit = 0;
  while (Math.abs(x) >= limit && unit + 1 < units.length) { x /= base; unit += 1; }
  return trimmed(x, unit ? digits : Math.min(digits, 2)) + units[unit];
}
const power = (x) => (x === 0 ? "0" : x.toExponential(1).replace(".0e", "e").replace("e+", "e"));
const units = {
  plain: (x) => (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? power(x) : trimmed(x, 4)),
  count: (x) => scaled(x, 1e3, 1e3, ["", "k", "M", "B", "T"], 3),
  binary: (x) => scaled(Math.round(x), 1024, 1024, ["", "k", "M", "G"], 2),
  power,
  seconds: (s) => (s >= 7200 ? `${trimmed(s / 3600, 1)} h` : s >= 120 ? `${trimmed(s / 60, 1)} min` : `${trimmed(s, 2)} s`),
  bytes: (x) => scaled(x, 1024, 1000, [" B", " KiB", " MiB", " GiB", " TiB"], 2),
};

const holds = (axis, x) => Number.isFinite(x) && (axis.scale === "linear" || x > 0);
const along = (axis, x, [low, high]) =>
  axis.scale === "linear" ? (x - low) / (high - low) : Math.log(x / low) / Math.log(high / low);
const back = (axis, part, [low, high]) =>
  axis.scale === "linear" ? low + part * (high - low) : low * Math.pow(high / low, part);

function rangeOf(axis, values, air) {
  const held = values.filter((x) => holds(axis, x));
  if (!held.length) return axis.scale === "log" ? [1, 10] : [0, 1];
  let [low, high] = held.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  if (axis.most !== null && axis.most > low) high = Math.min(high, axis.most);
  if (axis.scale === "log") {
    const factor = high > low ? Math.pow(high / low, air) : 2;
    return [low / factor, high * factor];
  }
  if (axis.from_zero) return [Math.min(low, 0), high > 0 ? high * (1 + air) : 1];
  const margin = high > low ? air * (high - low) : Math.max(0.05 * Math.abs(high), 1e-3);
  return [low - margin, high + margin];
}

// Ends of intervals, but none further from the lines than half of what these span: one wide interval would flatten all lines.
function reach(axis, values, ends) {
  const held = values.filter((x) => holds(axis, x));
  const [low, high] = [Math.min(...held), Math.max(...held)];
  const more = (high - low) / 2;
  return ends.filter((x) => holds(axis, x)).map((x) => Math.min(Math.max(x, low - more), high + more)).filter((x) => holds(axis, x));
}

function ticksOf(axis, [low, high], most) {
  const powers = (base) => {
    const exponent = (x) => Math.log(x) / Math.log(base);
    const [first, last] = [Math.ceil(exponent(low) - 1e-9), Math.floor(exponent(high) + 1e-9)];
    const gap = Math.max(1, Math.ceil((last - first + 1) / most));
    const all = [];
    for (let n = first; n <= last; n += gap) all.push(Math.pow(base, n));
    return all;
  };
  if (axis.scale === "log") {
    if (axis.unit === "binary" || axis.unit === "bytes") {
      const all = powers(2);
      if (all.length > 1) return all;
    } else if (high / low >= 10) {
      const fine = powers(10).length > 0 ? [] : null;
      for (let n = Math.floor(Math.log10(low)); fine && n <= Math.ceil(Math.log10(high)); n += 1) {
        for (const factor of [1, 2, 5]) fine.push(factor * Math.pow(10, n));
      }
      const inside = (fine ?? []).filter((x) => x >= low && x <= high);
      return inside.length <= most ? inside : powers(10);
    }
  }
  const wanted = (high - low) / Math.max(most, 2);
  const decimal = Math.pow(10, Math.floor(Math.log10(wanted)));
  let step = [1, 2, 5, 10].map((f) => f * decimal).find((s) => s >= wanted * (1 - 1e-9)) ?? wanted;
  if (axis.unit === "seconds" && wanted > 5) {
    step = [10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400].find((s) => s >= wanted) ?? step;
  } else if ((axis.unit === "bytes" || axis.unit === "binary") && wanted > 1) {
    step = Math.pow(2, Math.ceil(Math.log2(wanted)));
  }
  const all = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9) && all.length < 40; i += 1) all.push(i * step);
  return all;
}

// One plot: `view` holds the chosen range of x and the hidden lines, shared by all plots of a grid.
let clips = 0;
function addPlot(parent, plot, small, view) {
  const box = make("div", { class: "plot" }, parent);
  const svg = make("svg", { role: "img", "aria-label": plot.title || plot.y.label }, box);
  const tip = make("div", { class: "tip", hidden: "" }, box);
  const clip = `clip${(clips += 1)}`;
  let place = null;

  function draw() {
    const width = Math.max(box.clientWidth, 200);
    const height = small ? 190 : Math.round(Math.min(Math.max(width * 0.52, 260), 440));
    const [right, top, bottom] = small ? [8, 22, 24] : [12, 10, 46];
    const x = { ...plot.x, scale: view.log ? "log" : plot.x.scale };
    const lines = plot.lines.filter((line) => !view.hidden.has(line.name));
    const points = lines.flatMap((line) => line.points).filter(([px, py]) => holds(x, px) && holds(plot.y, py));
    const xs = view.range ?? rangeOf(x, points.map((p) => p[0]), 0.015);
    const seen = points.filter((p) => p[0] >= xs[0] && p[0] <= xs[1]);
    const bands = lines.flatMap((line) => line.band).filter((b) => b[0] >= xs[0] && b[0] <= xs[1]).flatMap((b) => [b[1], b[2]]);
    const y = view.range ? { ...plot.y, from_zero: false } : plot.y;
    const own = seen.map((p) => p[1]);
    const ys = rangeOf(y, own.concat(reach(y, own, bands)), 0.05);
    const yTicks = ticksOf(y, ys, small ? 4 : 7);
    const longest = Math.max(...yTicks.map((value) => units[y.unit](value).length), 1);
    const left = (small ? 12 : 30) + 7 * longest;
    const px = (value) => left + along(x, value, xs) * (width - left - right);
    const py = (value) => height - bottom - along(y, value, ys) * (height - top - bottom);
    place = { x, y, xs, ys, px, py, left, right, top, bottom, width, height, lines };

    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    make("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom }, make("clipPath", { id: clip }, svg));
    if (small) make("text", { class: "title", x: left, y: 14 }, svg, plot.title);
    for (const value of ticksOf(x, xs, small ? 4 : Math.max(3, Math.floor(width / 95)))) {
      make("line", { class: "rule", x1: px(value), x2: px(value), y1: top, y2: height - bottom }, svg);
      make("text", { x: px(value), y: height - bottom + 17, "text-anchor": "middle" }, svg, units[x.unit](value));
    }
    for (const value of yTicks) {
      make("line", { class: "rule", x1: left, x2: width - right, y1: py(value), y2: py(value) }, svg);
      make("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, svg, units[y.unit](value));
    }
    make("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }, svg);
    make("line", { class: "axis", x1: left, x2: left, y1: top, y2: height - bottom }, svg);
    if (!small) {
      make("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, svg, x.label);
      make("text", { transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg, y.label);
    }
    const inside = make("g", { "clip-path": `url(#${clip})` }, svg);
    const level = (value) => Math.min(Math.max(value, ys[0]), ys[1]);
    for (const line of lines) {
      const band = line.band.filter((b) => holds(x, b[0]) && holds(y, b[1]) && holds(y, b[2]));
      if (band.length < 2) continue;
      const around = [...band.map((b) => [b[0], b[2]]), ...band.slice().reverse().map((b) => [b[0], b[1]])];
      const d = around.map((p, i) => `${i ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(level(p[1])).toFixed(1)}`).join("") + "Z";
      make("path", { d, fill: colorOf(line), opacity: 0.18 }, inside);
    }
    for (const line of lines) {
      const held = line.points.filter((p) => holds(x, p[0]) && holds(y, p[1])).map((p) => [px(p[0]), py(level(p[1]))]);
      const d = held.map((p, i) => `${i ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}`).join("");
      const stroke = { stroke: colorOf(line), "stroke-width": line.faint ? 1 : 2, "stroke-dasharray": dashOf(line), "stroke-linejoin": "round" };
      make("path", { d, fill: "none", ...stroke, opacity: line.faint ? 0.45 : 1 }, inside);
      if (line.marks || (held.length === 1 && !line.faint)) for (const p of held) make("circle", { cx: p[0], cy: p[1], r: 2.6, fill: colorOf(line) }, inside);
    }
    make("g", { class: "over" }, svg);
  }

  const within = (event) => (event.clientX - svg.getBoundingClientRect().left) * (place.width / svg.getBoundingClientRect().width);
  const over = () => svg.querySelector(".over");
  let from = null;

  function show(event) {
    const at = within(event);
    const { x, y, px, py, lines, left, right, top, bottom, width, height } = place;
    over().replaceChildren();
    if (from !== null) {
      const [a, b] = [Math.min(from, at), Math.max(from, at)];
      make("rect", { class: "zoom", x: a, y: top, width: b - a, height: height - top - bottom }, over());
    }
    const near = (line) => {
      const held = line.points.filter((p) => holds(x, p[0]) && holds(y, p[1]));
      return held.length ? held.reduce((best, p) => (Math.abs(px(p[0]) - at) < Math.abs(px(best[0]) - at) ? p : best)) : null;
    };
    const rows = lines.map((line) => [line, near(line)]).filter(([, p]) => p && Math.abs(px(p[0]) - at) < width / 8);
    if (!rows.length || at < left || at > width - right) return hide();
    const [, nearest] = rows.reduce((best, row) => (Math.abs(px(row[1][0]) - at) < Math.abs(px(best[1][0]) - at) ? row : best));
    make("line", { class: "cursor", x1: px(nearest[0]), x2: px(nearest[0]), y1: top, y2: height - bottom }, over());
    tip.replaceChildren(make("b", {}, null, `${units[x.unit](nearest[0])}`));
    for (const [line, p] of rows) {
      make("circle", { cx: px(p[0]), cy: py(Math.min(p[1], place.ys[1])), r: 4, fill: "none", stroke: colorOf(line), "stroke-width": 2 }, over());
      const row = make("div", {}, tip);
      make("i", { style: `background:${colorOf(line)}` }, row);
      row.append(`${line.name}: `);
      make("b", {}, row, units[y.unit](p[1]));
      const band = line.band.find((b) => b[0] === p[0]);
      if (band) row.append(` ± ${units[y.unit]((band[2] - band[1]) / 2)}`);
    }
    tip.hidden = false;
    const side = (px(nearest[0]) / width) * box.clientWidth;
    tip.style.left = `${Math.max(0, Math.min(side + 12, box.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${top + 4}px`;
    if (side + 12 + tip.offsetWidth > box.clientWidth && side - 12 - tip.offsetWidth >= 0) tip.style.left = `${side - 12 - tip.offsetWidth}px`;
  }
  function hide() {
    tip.hidden = true;
    over()?.replaceChildren();
  }
  svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse" && event.button === 0) from = within(event); });
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerleave", () => { from = null; hide(); });
  svg.addEventListener("pointerup", (event) => {
    const to = within(event);
    if (from !== null && Math.abs(to - from) > 12) {
      const part = (at) => Math.min(Math.max((at - place.left) / (place.width - place.left - place.right), 0), 1);
      const ends = [part(Math.min(from, to)), part(Math.max(from, to))];
      view.range = ends.map((p) => back(place.x, p, place.xs));
      view.changed();
    }
    from = null;
  });
  svg.addEventListener("dblclick", () => { view.range = null; view.changed(); });
  return draw;
}

function addGrid(parent, grid) {
  const view = { hidden: new Set(), range: null, log: false, changed: () => {} };
  const legend = make("div", { class: "legend" }, parent);
  const area = make("div", { class: grid.columns > 1 ? "grid" : "grid single" }, parent);
  const draws = grid.plots.map((plot) => addPlot(area, plot, grid.columns > 1, view));
  const lines = new Map(grid.plots.flatMap((plot) => plot.lines).reverse().map((line) => [line.name, line]));
  const keys = [...lines.values()].reverse().map((line) => {
    const button = make("button", { type: "button", "aria-pressed": "true", title: "show or hide" }, legend);
    const key = make("svg", { width: 22, height: 4, "aria-hidden": "true" }, button);
    button.append(line.name);
    button.addEventListener("click", () => {
      if (!view.hidden.delete(line.name)) view.hidden.add(line.name);
      button.setAttribute("aria-pressed", String(!view.hidden.has(line.name)));
      view.changed();
    });
    return () => {
      key.replaceChildren();
      make("path", { d: "M0 2H22", stroke: colorOf(line), "stroke-width": 3, "stroke-dasharray": dashOf(line) }, key);
    };
  });
  const tools = make("span", { class: "tools" }, legend);
  const tool = (label, pressed, click) => {
    const button = make("button", { type: "button", class: "tool", ...pressed }, tools, label);
    button.addEventListener("click", () => { click(button); view.changed(); });
    return button;
  };
  if (grid.plots.every((plot) => plot.x.scale === "linear")) {
    tool("log x", { "aria-pressed": "false" }, (button) => {
      view.log = !view.log;
      view.range = null;
      button.setAttribute("aria-pressed", String(view.log));
    });
  }
  const reset = tool("whole range", {}, () => { view.range = null; });
  view.changed = () => {
    keys.forEach((draw) => draw());
    draws.forEach((draw) => draw());
    reset.hidden = view.range === null;
  };
  redraws.push(view.changed);
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(area.clientWidth - width) < 1) return;
    width = area.clientWidth;
    view.changed();
  }).observe(area);
}

for (const element of document.querySelectorAll("[data-picture]")) {
  for (const grid of pictures[element.dataset.picture]) addGrid(element, grid);
}
const theme = document.getElementById("theme");
const name = () => { theme.textContent = dark() ? "light" : "dark"; };
theme.hidden = false;
theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); redraw(); });
media.addEventListener("change", () => { name(); redraw(); });
name();

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const hidden = new Set(); // tags of lines that are switched off
const charts = []; // all that are drawn
let range = null; // the tokens that were chosen with the mouse; null: all

// ---- numbers, as saekit/reports/numbers.py writes them

function trimmed(value, digits) {
  return Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 10 });
}
function shortCount(value) {
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= 0.9995 * unit) return trimmed(value / unit, 3) + letter;
  }
  return trimmed(value, 3);
}
function number(value) {
  const size = Math.abs(value);
  if (!isFinite(value)) return "nan";
  if (size === 0) return "0";
  if (size >= 999.95 && size < 999999.5) return Math.round(value).toLocaleString("en-US");
  if (size >= 1e-4 && size < 999.95) return Number(value.toPrecision(4)).toFixed(10).replace(/0+$/, "").replace(/\.$/, "");
  if (size >= 1e15 || size < 1e-4) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  return shortCount(value);
}
const texts = { number, count: (v) => Math.round(v).toLocaleString("en-US"), fraction: (v) => v.toFixed(3) };

// ---- pieces of pages and pictures

function make(name, attributes, parent, text) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "clipPath"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}
function own(line) {
  return `--light:${line.light};--dark:${line.dark}`;
}
const shapes = {
  o: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  s: (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  "^": (r) => `M0,${-1.2 * r}L${1.15 * r},${0.9 * r}H${-1.15 * r}z`,
  v: (r) => `M0,${1.2 * r}L${1.15 * r},${-0.9 * r}H${-1.15 * r}z`,
  D: (r) => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0z`,
  "<": (r) => `M${-1.2 * r},0L${0.9 * r},${-1.15 * r}V${1.15 * r}z`,
  ">": (r) => `M${1.2 * r},0L${-0.9 * r},${-1.15 * r}V${1.15 * r}z`,
  p: (r) => `M0,${-1.2 * r}L${1.14 * r},${-0.37 * r}L${0.7 * r},${0.97 * r}H${-0.7 * r}L${-1.14 * r},${-0.37 * r}z`,
  P: (r) => `M${-0.4 * r},${-1.2 * r}h${0.8 * r}v${0.8 * r}h${0.8 * r}v${0.8 * r}h${-0.8 * r}v${0.8 * r}h${-0.8 * r}v${-0.8 * r}h${-0.8 * r}v${-0.8 * r}h${0.8 * r}z`,
  X: (r) => `M${-r},${-1.2 * r}L0,${-0.4 * r}L${r},${-1.2 * r}L${1.2 * r},${-r}L${0.4 * r},0L${1.2 * r},${r}L${r},${1.2 * r}L0,${0.4 * r}L${-r},${1.2 * r}L${-1.2 * r},${r}L${-0.4 * r},0L${-1.2 * r},${-r}z`,
};

// ---- axes

function linearTicks(low, high, about, whole) {
  const raw = Math.max((high - low) / about || 1, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = (whole && raw < 10 ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10]).map((m) => m * power).find((s) => s >= raw * 0.999) || raw;
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) ticks.push(n * step);
  return ticks;
}
function logTicks(low, high) {
  const every = high / low < 200 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const m of every) if (m * 10 ** power >= low * 0.999 && m * 10 ** power <= high * 1.001) ticks.push(m * 10 ** power);
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high, 3);
}
function axis(low, high, from, to, log) {
  if (log) [low, high] = [Math.log(low), Math.log(high)];
  const at = (value) => from + (((log ? Math.log(value) : value) - low) / (high - low || 1)) * (to - from);
  at.back = (place) => {
    const value = low + ((place - from) / (to - from)) * (high - low);
    return log ? Math.exp(value) : value;
  };
  return at;
}
function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) if (value !== null && isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  return low > high ? [0, 1] : [low, high];
}
const shown = (chart) => chart.lines.filter((line) => !(line.tags || []).some((tag) => hidden.has(tag)));

function* seen(chart, lines, [from, to]) {
  for (const line of lines) {
    for (let i = 0; i < line.x.length; i++) {
      if (line.x[i] < from || line.x[i] > to) continue;
      yield line.low ? line.low[i] : line.bars ? line.bars.y[i][0] : line.y[i];
      yield line.high ? line.high[i] : line.bars ? line.bars.y[i][1] : line.y[i];
    }
  }
}
function heights(chart, lines, xs) {
  let [low, high] = extent(seen(chart, lines, xs));
  if (chart.isLog) {
    if (!(low > 0)) return [1, 10]; // all lines are switched off
    const room = (high / low) ** 0.06 || 1.05;
    return [low / room, high * (low === high ? 1.5 : room)];
  }
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [chart.lower !== null ? chart.lower : low - room, chart.upper !== null && !range ? chart.upper : chart.upper === 1 ? 1 : high + room];
}
function widths(chart, lines) {
  if (chart.kind === "curves") return range || [0, 1.015 * extent(chart.lines.flatMap((line) => line.x))[1] || 1];
  const [low, high] = extent(lines.flatMap((line) => (line.bars ? line.bars.x.flat() : line.x)));
  if (chart.xlog && !(low > 0)) return [1, 10];
  if (chart.xlog) return [low / (high / low) ** 0.08 || low / 1.1, high * (high / low) ** 0.08 || high * 1.1];
  const room = (high - low) * 0.1 || high * 0.1 || 1;
  return [low - room, high + room];
}

// ---- drawing

function draw(chart) {
  const lines = shown(chart);
  const width = Math.max(chart.box.clientWidth - 20, 200), height = chart.kind === "curves" ? 190 : 300;
  const ends = chart.kind === "curves" ? lines.map((line) => line.end || "") : [];
  const room = { left: 46, right: Math.max(12, Math.min(90, Math.max(0, ...ends.map((t) => t.length)) * 7 + 10)), top: 8, bottom: chart.xlabel ? 38 : 22 };
  const xs = widths(chart, lines), ys = heights(chart, lines, xs);
  const x = axis(...xs, room.left, width - room.right, chart.xlog);
  const y = axis(...ys, height - room.bottom, room.top, chart.isLog);
  Object.assign(chart, { x, y, room, width, height });
  chart.svg.replaceChildren();
  chart.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.svg.setAttribute("height", height);
  const clip = make("clipPath", { id: `c${charts.indexOf(chart)}` }, chart.svg);
  make("rect", { x: room.left, y: 0, width: width - room.left - room.right, height: height - room.bottom }, clip);
  for (const tick of chart.isLog ? logTicks(...ys) : linearTicks(...ys, height / 45, chart.format === "count")) {
    make("line", { class: "grid", x1: room.left, x2: width - room.right, y1: y(tick), y2: y(tick) }, chart.svg);
    make("text", { x: room.left - 6, y: y(tick) + 4, "text-anchor": "end" }, chart.svg, chart.format === "fraction" ? trimmed(tick, 3) : number(tick));
  }
  for (const tick of chart.xlog ? logTicks(...xs) : linearTicks(...xs, Math.max(2, Math.floor(width / (chart.kind === "curves" ? 110 : 75))))) {
    make("line", { class: "grid", x1: x(tick), x2: x(tick), y1: room.top, y2: height - room.bottom }, chart.svg);
    make("text", { x: x(tick), y: height - room.bottom + 16, "text-anchor": "middle" }, chart.svg, chart.kind === "curves" ? shortCount(tick) : number(tick));
  }
  if (chart.xlabel) make("text", { x: (room.left + width - room.right) / 2, y: height - 5, "text-anchor": "middle" }, chart.svg, chart.xlabel);
  for (const mark of chart.kind === "curves" ? data.marks : []) {
    if (mark.x > xs[0] && mark.x < xs[1]) make("line", { class: "mark", x1: x(mark.x), x2: x(mark.x), y1: room.top, y2: height - room.bottom }, chart.svg);
  }
  const inside = make("g", { "clip-path": `url(#c${charts.indexOf(chart)})` }, chart.svg);
  for (const line of lines) drawLine(chart, line, line.look === "points" ? chart.svg : inside);
  if (chart.kind === "curves") writeEnds(chart, lines, xs);
  else writeLabels(chart, lines);
  chart.over = make("g", {}, chart.svg);
}
function drawLine(chart, line, parent) {
  const { x, y } = chart;
  const group = make("g", { class: "own", style: own(line) }, parent);
  const stroke = (values) => {
    let text = "", open = false;
    values.forEach((value, i) => {
      const fine = value !== null && !(chart.isLog && value <= 0);
      if (fine) text += `${open ? "L" : "M"}${x(line.x[i]).toFixed(1)},${y(value).toFixed(1)}`;
      open = fine;
    });
    return text;
  };
  if (line.low) {
    const floor = chart.isLog ? extent(line.y)[0] : -Infinity;
    const there = line.x.map((_, i) => i).filter((i) => line.low[i] !== null);
    const up = there.map((i) => `${x(line.x[i]).toFixed(1)},${y(line.high[i]).toFixed(1)}`);
    const down = there.reverse().map((i) => `${x(line.x[i]).toFixed(1)},${y(Math.max(line.low[i], floor)).toFixed(1)}`);
    if (up.length) make("path", { class: "band", d: `M${up.join("L")}L${down.join("L")}z` }, group);
  }
  const dots = ["held out", "recovered", "points"].includes(line.look) && line.x.length <= 60;
  if (line.look === "points" && line.x.length > 1) make("path", { class: "path", d: stroke(line.y) }, group);
  if (!dots) make("path", { class: `curve ${line.look === "dashed" ? "dashed" : ""}`, d: stroke(line.y) }, group);
  if (dots || line.x.length <= 12) {
    const shape = shapes[line.marker || (line.look === "recovered" ? "D" : "o")](line.look === "points" ? 5.2 : dots ? 4 : 2.6);
    if (line.bars) line.y.forEach((_, i) => drawBars(chart, line, i, group));
    line.y.forEach((value, i) => {
      if (value !== null) make("path", { class: "dot", d: shape, transform: `translate(${x(line.x[i]).toFixed(1)},${y(value).toFixed(1)})` }, group);
    });
  }
}
function drawBars({ x, y }, line, i, group) {
  const [left, right] = line.bars.x[i].map(x), [bottom, top] = line.bars.y[i].map(y);
  make("path", { class: "bar", d: `M${left},${y(line.y[i])}H${right}M${x(line.x[i])},${bottom}V${top}` }, group);
}
function writeEnds(chart, lines, xs) {
  const { y, room, width, height } = chart;
  const ends = [];
  for (const line of lines) {
    const last = line.y.findLastIndex((value, i) => value !== null && line.x[i] <= xs[1]);
    if (last < 0 || !line.end) continue;
    const value = line.y[last], whole = last === line.y.findLastIndex((v) => v !== null);
    const at = y(chart.isLog ? Math.max(value, 1e-300) : value);
    ends.push({ line, text: whole ? line.end : texts[chart.format](value), at: Math.min(Math.max(at, room.top + 4), height - room.bottom) });
  }
  ends.sort((a, b) => b.at - a.at);
  ends.forEach((end, i) => { if (i) end.at = Math.min(end.at, ends[i - 1].at - 13); });
  const over = ends.length ? room.top + 2 - ends[ends.length - 1].at : 0;
  for (const end of ends) {
    const group = make("g", { class: "own", style: own(end.line) }, chart.svg);
    make("text", { class: "last", x: width - room.right + 5, y: end.at + Math.max(over, 0) + 4 }, group, end.text);
  }
}
function writeLabels(chart, lines) {
  const taken = [], said = [];
  const free = (box) => box.x >= chart.room.left && box.x + box.w <= chart.width && box.y >= 0 && box.y + box.h <= chart.height - chart.room.bottom &&
    !taken.some((o) => box.x < o.x + o.w && o.x < box.x + box.w && box.y < o.y + o.h && o.y < box.y + box.h);
  const points = lines.flatMap((line) => line.x.map((_, i) => ({ line, i, px: chart.x(line.x[i]), py: chart.y(line.y[i]) })));
  for (const { px, py } of points) taken.push({ x: px - 6, y: py - 6, w: 12, h: 12 });
  for (const { line, i, px, py } of points) {
    const text = (line.labels || [])[i];
    if (!text || said.some((one) => one.text === text && Math.hypot(one.px - px, one.py - py) < 26)) continue;
    const w = text.length * 6.6, h = 13, up = line.bars ? 11 : 7; // clear of the bars
    for (const [dx, dy] of [[8, -up], [-8 - w, -up], [8, up + 1], [-8 - w, up + 1], [-w / 2, -14], [-w / 2, 15]]) {
      const box = { x: px + dx, y: py + dy - h / 2, w, h };
      if (!free(box)) continue;
      taken.push(box);
      said.push({ text, px, py });
      make("text", { class: "label", x: box.x, y: box.y + 10 }, chart.svg, text);
      break;
    }
  }
}

// ---- the mouse, and fingers

function nearest(xs, value) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - xs[low - 1] < xs[low] - value ? low - 1 : low;
}
function readAt(value) {
  for (const chart of charts.filter((one) => one.kind === "curves")) {
    chart.over.replaceChildren();
    chart.read.replaceChildren();
    if (value === null) {
      if (chart.note) make("span", { class: "note" }, chart.read, chart.note);
      continue;
    }
    const at = chart.x(value);
    make("line", { class: "cross", x1: at, x2: at, y1: chart.room.top, y2: chart.height - chart.room.bottom }, chart.over);
    for (const line of shown(chart).slice(0, 6)) {
      const i = nearest(line.x, value);
      if (line.y[i] === null || line.y[i] === undefined) continue;
      const name = line.name && chart.lines.length > 1 ? `${line.name} ` : "";
      make("span", { class: "own", style: own(line) }, chart.read, name + texts[chart.format](line.y[i]));
    }
    make("span", {}, chart.read, `at ${shortCount(value)} tokens`);
  }
}
function pointAt(chart, px, py) {
  let best = null;
  for (const line of shown(chart)) {
    for (let i = 0; i < line.x.length; i++) {
      const far = Math.hypot(chart.x(line.x[i]) - px, chart.y(line.y[i]) - py);
      if (far < 28 && (!best || far < best.far)) best = { far, line, i };
    }
  }
  chart.tip.hidden = !best;
  if (!best) return;
  chart.tip.textContent = best.line.hover[best.i];
  const left = chart.x(best.line.x[best.i]), top = chart.y(best.line.y[best.i]);
  chart.tip.style.left = `${Math.min(Math.max(left - 60, 4), Math.max(chart.width - chart.tip.offsetWidth - 4, 4))}px`;
  chart.tip.style.top = `${top + (top > 150 ? 26 - chart.tip.offsetHeight : 56)}px`;
}
function listen(chart) {
  let from = null;
  const place = (event) => {
    const box = chart.svg.getBoundingClientRect();
    return [((event.clientX - box.left) * chart.width) / box.width, ((event.clientY - box.top) * chart.height) / box.height];
  };
  const bounded = (px) => Math.min(Math.max(px, chart.room.left), chart.width - chart.room.right);
  chart.svg.addEventListener("pointermove", (event) => {
    const [px, py] = place(event);
    if (chart.kind !== "curves") return pointAt(chart, px, py);
    readAt(chart.x.back(bounded(px)));
    if (from !== null) {
      const [a, b] = [from, bounded(px)].sort((one, other) => one - other);
      make("rect", { class: "zoom", x: a, width: b - a, y: chart.room.top, height: chart.height - chart.room.top - chart.room.bottom }, chart.over);
    }
  });
  chart.svg.addEventListener("pointerleave", () => {
    from = null;
    if (chart.kind === "curves") readAt(null);
    else chart.tip.hidden = true;
  });
  if (chart.kind !== "curves") return;
  chart.svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") from = bounded(place(event)[0]); });
  chart.svg.addEventListener("pointerup", (event) => {
    const [a, b] = [from, bounded(place(event)[0])].sort((one, other) => one - other);
    if (from !== null && b - a > 8) show([chart.x.back(a), chart.x.back(b)]);
    from = null;
  });
  chart.svg.addEventListener("dblclick", () => show(null));
}
function show(chosen) {
  range = chosen;
  document.querySelectorAll(".all").forEach((button) => { button.hidden = !range; });
  charts.forEach(draw);
}

// ---- the page

function addChart(spec, parent) {
  const chart = { ...spec, isLog: spec.log };
  chart.box = make("div", { class: "chart" }, parent);
  const head = make("div", { class: "head" }, chart.box);
  make("h2", {}, head, chart.title);
  const tools = make("div", { class: "tools" }, head);
  const all = make("button", { class: "all", type: "button", hidden: "" }, tools, "whole run");
  all.addEventListener("click", () => show(null));
  const values = [...seen(chart, chart.lines, [-Infinity, Infinity])].filter((value) => value !== null);
  if (chart.kind === "curves" && chart.upper !== 1 && values.length && Math.min(...extent(values)) > 0) {
    const button = make("button", { type: "button" }, tools, chart.isLog ? "linear" : "log");
    button.addEventListener("click", () => {
      chart.isLog = !chart.isLog;
      button.textContent = chart.isLog ? "linear" : "log";
      draw(chart);
    });
  }
  chart.read = make("div", { class: "read" }, chart.box);
  chart.read.hidden = chart.kind !== "curves";
  chart.svg = make("svg", { role: "img", "aria-label": `${chart.title}: ${chart.lines.map((l) => `${l.name} ${l.end || ""}`).slice(0, 8).join(", ")}` }, chart.box);
  chart.tip = make("div", { class: "tip", hidden: "" }, chart.box);
  charts.push(chart);
  listen(chart);
}
function addLegend(parent) {
  for (const group of data.legend) {
    const row = make("div", { class: "legend" }, parent);
    if (group.what) make("span", { class: "what" }, row, group.what);
    for (const entry of group.entries) {
      const button = make("button", { type: "button", "aria-pressed": "true", title: "show or hide" }, row);
      const icon = make("svg", { width: 16, height: 14, viewBox: "-8 -7 16 14", class: "own", style: `width:16px;${own(entry)}` }, button);
      if (entry.look === "line" || entry.look === "dashed") make("path", { class: `curve ${entry.look}`, d: "M-8,0H8" }, icon);
      else make("path", { class: "dot", d: shapes[entry.marker || "o"](4.6) }, icon);
      make("span", {}, button, entry.name);
      button.addEventListener("click", () => {
        if (hidden.has(entry.tag)) hidden.delete(entry.tag);
        else hidden.add(entry.tag);
        button.setAttribute("aria-pressed", String(!hidden.has(entry.tag)));
        charts.forEach(draw);
      });
    }
  }
}
function addTable(parent, spec) {
  if (spec.title) make("h2", {}, parent, spec.title);
  const table = make("table", {}, make("div", { class: "wide" }, parent));
  const head = make("tr", {}, make("thead", {}, table)), body = make("tbody", {}, table);
  const fill = (rows) => {
    body.replaceChildren();
    for (const row of rows) {
      const line = make("tr", {}, body);
      row.cells.forEach((cell, i) => {
        const place = make("td", {}, line, i || !row.link ? cell : undefined);
        if (!i && row.link) make("a", { href: row.link }, place, cell);
      });
    }
  };
  let sorted = null, upwards = 1;
  spec.head.forEach((name, column) => {
    make("th", { title: "sort" }, head, name).addEventListener("click", () => {
      upwards = sorted === column ? -upwards : 1;
      sorted = column;
      const key = (row) => row.keys[column];
      fill([...spec.rows].sort((a, b) => {
        if (key(a) === null || key(b) === null) return (key(a) === null) - (key(b) === null);
        return (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * upwards;
      }));
    });
  });
  fill(spec.rows);
}
const main = document.getElementById("main");
const tiles = make("div", { class: "tiles" }, main);
for (const [label, value] of data.tiles) {
  const tile = make("div", { class: "tile" }, tiles);
  make("b", {}, tile, value);
  make("span", {}, tile, label);
}
addLegend(main);
for (const group of data.groups) {
  const grid = make("div", { class: `charts ${group.charts.length % 3 ? "two" : ""}` }, main);
  group.charts.forEach((chart) => addChart({ ...chart, kind: group.kind }, grid));
}
for (const spec of data.tables || (data.table ? [data.table] : [])) addTable(main, spec);
charts.forEach(draw);
readAt(null);
new ResizeObserver(() => charts.forEach((chart) => { if (Math.abs(chart.width - Math.max(chart.box.clientWidth - 20, 200)) > 1) draw(chart); })).observe(main);
addEventListener("beforeprint", () => charts.forEach(draw));

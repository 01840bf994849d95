"use strict";
const figures = [...document.querySelectorAll("script.figure")].map((one) => JSON.parse(one.textContent));
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 640px)");
const SHAPES = { "triangle-up": "triangle-right", "triangle-down": "triangle-left" };

function own(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function copy(value) {
  return JSON.parse(JSON.stringify(value));
}

// Sets as rows, where there is no room for them side by side.
function turned({ data, layout }) {
  for (const trace of data) {
    [trace.x, trace.y] = [trace.y, trace.x];
    trace.marker.symbol = SHAPES[trace.marker.symbol];
  }
  [layout.xaxis, layout.yaxis] = [layout.yaxis, layout.xaxis];
  layout.yaxis.range.reverse();
  delete layout.yaxis.tickangle;
  delete layout.yaxis.title;
  delete layout.xaxis.anchor;
  delete layout.yaxis.anchor;
  const free = {}; // in each row, where the labels so far end
  const pixels = (innerWidth - 150) / layout.xaxis.range[1];
  const notes = (layout.annotations || []).sort((one, other) => one.y - other.y);
  for (const note of notes) {
    [note.x, note.y] = [note.y, note.x];
    const row = Math.floor(note.y), at = note.x * pixels;
    const place = Math.max(at + 5, free[row] || 0);
    free[row] = place + 6 * note.text.length + 5;
    delete note.yshift;
    note.xanchor = "left";
    note.xshift = place - at;
  }
  for (const shape of layout.shapes || []) {
    [shape.x0, shape.x1, shape.y0, shape.y1] = [shape.y0, shape.y1, shape.x0, shape.x1];
    [shape.xref, shape.yref] = ["x domain", "y"];
  }
  layout.margin = { l: 8, r: 18, t: 40, b: 44 };
  layout.yaxis.automargin = true;
}

// Labels above their points and not over each other, as wide as the picture is now.
function apart({ layout }, width) {
  const across = (width - 90) / layout.xaxis.range[1], up = 300 / layout.yaxis.range[1], taken = [];
  const notes = (layout.annotations || []).filter((one) => one.name === "feature").sort((one, other) => one.y - other.y);
  for (const note of notes) {
    const x = note.x * across, at = note.y * up, half = 3 * note.text.length + 2;
    let y = at + 10;
    for (const other of taken.filter((one) => Math.abs(one.x - x) < one.half + half).sort((one, two) => one.y - two.y)) {
      if (Math.abs(other.y - y) < 12) y = other.y + 12;
    }
    note.yshift = y - at;
    taken.push({ x, y, half });
  }
}

function dressed(figure, kind, width) {
  const made = copy(figure);
  const { data, layout } = made;
  if (kind === "manhattan") narrow.matches ? turned(made) : apart(made, width);
  for (const trace of data) {
    const color = trace.meta[dark.matches ? "dark" : "light"];
    if (trace.marker) trace.marker.color = color;
    if (trace.line) trace.line.color = color;
  }
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.font = { family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", size: 12, color: own("--gray") };
  for (const note of layout.annotations || []) note.font = { size: 10, color: own("--ink") };
  if (layout.title) layout.title.font = { size: 14, color: own("--ink") };
  for (const axis of [layout.xaxis, layout.yaxis]) {
    axis.gridcolor = own("--grid");
    axis.fixedrange = narrow.matches;
  }
  layout.hoverlabel = { bgcolor: own("--ink"), font: { color: own("--ground") }, bordercolor: own("--ink") };
  if (kind === "overlay") {
    layout.margin = { l: 54, r: 12, t: 34, b: 104 };
    layout.legend = { orientation: "h", x: 0, xanchor: "left", y: -0.3, yanchor: "top" };
    layout.xaxis.title.standoff = 4;
  }
  return made;
}

function draw() {
  for (const place of document.querySelectorAll(".plot")) {
    const kind = place.dataset.kind;
    const { data, layout } = dressed(figures[Number(place.dataset.figure)], kind, place.clientWidth);
    if (kind === "manhattan") {
      const sets = figures[0].layout.xaxis.tickvals.length;
      place.style.height = narrow.matches ? `${110 + 26 * sets}px` : "440px";
    }
    Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
  }
}

draw();
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);

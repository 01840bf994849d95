// Histograms, by plotly, which is unpacked when the first one is drawn.
let plotly = null;
const drawn = new Map(); // the element of each histogram to what draws it
const ON_PAPER = 300; // pixels, which fit a column of a printed page
let printing = false;

function loadPlotly() {
  plotly ??= source.plotly();
  return plotly;
}

// A color of the theme, as plotly takes it.
function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Bars for histogram = {low, high, counts}; shade(center) is the color of each.
function histogramOf(title, histogram, shade, words) {
  const home = el("div", { class: "plot", role: "img", "aria-label": `${title}: ${words}` });
  drawn.set(home, () => {
    const { low, high, counts } = histogram;
    const width = (high - low) / counts.length || 1;
    const x = counts.map((_, bin) => low + (high > low ? bin + 0.5 : 0) * width);
    const axis = { gridcolor: color("--grid"), zerolinecolor: color("--edge"), fixedrange: true, tickfont: { size: 11 } };
    const traces = [{
      type: "bar", x, y: counts, width, marker: { color: x.map(shade), line: { width: 0 } },
      customdata: x.map((at) => [number(at - width / 2), number(at + width / 2)]),
      hovertemplate: "%{customdata[0]} to %{customdata[1]}: %{y:,}<extra></extra>",
    }];
    const layout = {
      margin: { l: 42, r: 8, t: 4, b: 20 }, bargap: 0.06, height: 132, showlegend: false, dragmode: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "x",
      font: { family: getComputedStyle(document.body).fontFamily, color: color("--gray"), size: 11 },
      hoverlabel: { bgcolor: color("--ink"), bordercolor: color("--ink"), font: { color: color("--ground"), size: 12 } },
      ...(printing ? { width: ON_PAPER, autosize: false } : { autosize: true }),
      xaxis: { ...axis, showgrid: false, nticks: 7 },
      yaxis: { ...axis, nticks: 4, rangemode: "tozero", tickformat: "~s" },
    };
    window.Plotly.react(home, traces, layout, { displayModeBar: false, responsive: true });
  });
  return home;
}

// Draw those that are on the page, and forget others.
async function drawPlots() {
  for (const home of drawn.keys()) {
    if (!home.isConnected) {
      if (window.Plotly) window.Plotly.purge(home);
      drawn.delete(home);
    }
  }
  if (!drawn.size) return;
  try {
    await loadPlotly();
    redraw();
  } catch (error) {
    for (const home of drawn.keys()) home.replaceChildren(el("p", { class: "quiet" }, `There is no picture: ${error.message}.`));
  }
}

function redraw() {
  if (!window.Plotly) return;
  for (const [home, draw] of drawn) if (home.isConnected) draw();
}

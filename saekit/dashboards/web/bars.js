// Histograms without plotly, for a page that is small: bars of SVG.
const SVG = "http://www.w3.org/2000/svg";
const drawn = new Map(); // the element of each histogram to what draws it

// A color of the theme.
function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Bars for histogram = {low, high, counts}; shade(center) is the color of each.
function histogramOf(title, histogram, shade, words) {
  const home = el("div", { class: "plot", role: "img", "aria-label": `${title}: ${words}` });
  drawn.set(home, () => {
    const { low, high, counts } = histogram, most = Math.max(...counts, 1);
    const width = (high - low) / counts.length || 1;
    const bars = counts.map((count, bin) => {
      const from = low + (high > low ? bin : -0.5) * width, tall = (100 * count) / most;
      const told = svg("title", {}, `${number(from)} to ${number(from + width)}: ${whole(count)}`);
      return svg("g", {},
        svg("rect", { x: bin, y: 100 - tall, width: 0.94, height: tall, fill: shade(from + width / 2) }),
        svg("rect", { x: bin, y: 0, width: 1, height: 100, fill: "transparent" }, told)); // so that low bars are found
    });
    home.replaceChildren(
      el("div", { class: "most" }, whole(most)),
      svg("svg", { viewBox: `0 0 ${counts.length} 100`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...bars),
      el("div", { class: "ends" }, el("span", {}, number(low)), el("span", {}, number(high))));
  });
  return home;
}

// Draw those that are on the page, and forget others.
function drawPlots() {
  for (const home of drawn.keys()) if (!home.isConnected) drawn.delete(home);
  redraw();
}

function redraw() {
  for (const draw of drawn.values()) draw();
}

// A page of one feature, in a frame of a notebook: no list, no keys but those of texts, nothing remembered.
const filtered = [], byNumber = new Map();

function recall() { return null; }
function remember() {}
function go() {}
function hashOf(index) { return `#${index}`; }

// The theme of JupyterLab, where it can be seen, or the system's.
const systemDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  try {
    const light = parent.document.body.dataset.jpThemeLight;
    if (light) return light === "false";
  } catch { /* another origin */ }
  return systemDark.matches;
}

function applyTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  redraw();
}

systemDark.addEventListener("change", applyTheme);
document.addEventListener("keydown", tokenKey);
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// As tall as the page is, where the frame can be reached.
function fit() {
  try {
    const frame = window.frameElement;
    if (frame) frame.style.height = `${Math.min(Math.ceil(document.body.offsetHeight) + 2, Number(frame.dataset.most))}px`;
  } catch { /* another origin: it stays as it is, and scrolls */ }
}

source.feature(0, page.saes[0].shown).then((data) => {
  applyTheme();
  draw(data);
  new ResizeObserver(fit).observe(document.body);
});

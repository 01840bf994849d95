// The page around: what is remembered, themes, keys, and the beginning.

// What somebody chose, for the next time, where the browser keeps that.
function recall(name) {
  try { return localStorage.getItem(`saekit-dashboard-${name}`); } catch { return null; }
}

function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`saekit-dashboard-${name}`);
    else localStorage.setItem(`saekit-dashboard-${name}`, value);
  } catch { /* it is chosen for now */ }
}

// ---- themes: the system's, unless somebody chose the other one

const systemDark = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  return recalledTheme ?? (systemDark.matches ? "dark" : "light");
}

let recalledTheme = recall("theme");

function applyTheme(name = theme()) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme-said").textContent = name === "dark" ? "Make it light" : "Make it dark";
  redraw();
}

function toggleTheme() {
  const next = theme() === "dark" ? "light" : "dark";
  recalledTheme = next === (systemDark.matches ? "dark" : "light") ? null : next;
  remember("theme", recalledTheme);
  applyTheme();
}

systemDark.addEventListener("change", () => applyTheme());
for (const [event, begins] of [["beforeprint", true], ["afterprint", false]]) {
  window.addEventListener(event, () => {
    printing = begins;
    applyTheme(begins ? "light" : theme());
  });
}
document.getElementById("theme").addEventListener("click", toggleTheme);

// ---- the list beside, or over, the feature

const side = document.getElementById("side"), opener = document.getElementById("open-list");

function openList(open) {
  side.classList.toggle("open", open);
  opener.setAttribute("aria-expanded", String(open));
  if (open) mark();
}

opener.addEventListener("click", () => openList(!side.classList.contains("open")));
list.addEventListener("click", (event) => event.target.closest("a") && openList(false));

// ---- keys

const keys = document.getElementById("keys");
document.getElementById("help").addEventListener("click", () => keys.showModal());
keys.addEventListener("click", (event) => event.target === keys && keys.close());

const ACTS = {
  j: () => go(1), ArrowRight: () => go(1), k: () => go(-1), ArrowLeft: () => go(-1),
  "/": () => { openList(true); search.focus(); search.select(); },
  s: () => { const own = [...sort.options].filter((one) => !one.disabled); sort.value = own[(own.findIndex((one) => one.selected) + 1) % own.length].value; relist(); },
  t: toggleTheme, w: () => shown && !shown.dead && toggleColumns(), "?": () => keys.showModal(),
  Escape: () => { hideTip(); openList(false); },
};

document.addEventListener("keydown", (event) => {
  if (keys.open || tokenKey(event) || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.matches("input, select, textarea")) return;
  const act = ACTS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

search.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && filtered.length) { openFeature(filtered[0].index); openList(false); search.blur(); }
  else if (event.key === "Escape") { search.value = ""; relist(); search.blur(); openList(false); }
  else if (event.key === "ArrowDown") list.querySelector("a")?.focus();
  else return;
  event.preventDefault();
});
list.addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const item = event.target.closest("li");
  if (!by || !item) return;
  event.preventDefault();
  (by > 0 ? item.nextElementSibling : item.previousElementSibling ?? search)?.querySelector?.("a")?.focus();
  if (by < 0 && !item.previousElementSibling) search.focus();
});
search.addEventListener("input", relist);
sort.addEventListener("change", relist);

// ---- the beginning

function describe() {
  const about = sae().about;
  const parts = [
    page.saes.length > 1 || page.title.includes(about.name) ? "" : about.name,
    `${about.architecture.replace(/^saekit:/, "")}, ${whole(about.d_sae)} features`,
    about.targets.join() === about.inputs.join() ? `at ${about.inputs.join(", ")}` : `from ${about.inputs.join(", ")} to ${about.targets.join(", ")}`,
    `of ${page.model}`,
    `on ${whole(about.tokens_counted)} tokens${page.dataset ? ` of ${page.dataset}` : ""}`,
  ];
  document.getElementById("about").textContent = parts.filter(Boolean).join(" · ");
}

function chooseSAE(next) {
  place = next;
  document.getElementById("choose-sae").value = String(next);
  current = null;
  describe();
  entriesOf();
  relist();
}

function follow() {
  const [, other, index] = /^#(?:(\d+)\/)?(\d+)$/.exec(location.hash) ?? [];
  if (other !== undefined && Number(other) !== place && page.saes[Number(other)]) chooseSAE(Number(other));
  if (index === undefined && current !== null) return; // it leads to a place on the page
  const wanted = index === undefined || !byNumber.has(Number(index)) ? filtered[0]?.index : Number(index);
  if (wanted === undefined) return;
  if (wanted !== current) show(wanted);
}

function begin() {
  const chooser = document.getElementById("choose-sae");
  chooser.hidden = page.saes.length < 2;
  chooser.append(...page.saes.map((one, at) => el("option", { value: at }, one.about.name)));
  chooser.addEventListener("change", () => {
    chooseSAE(Number(chooser.value));
    if (filtered.length) openFeature(filtered[0].index);
  });
  chooseSAE(0);
  applyTheme();
  follow();
  window.addEventListener("hashchange", () => { follow(); scrollTo(0, 0); });
}

begin();

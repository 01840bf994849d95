// The features of a page: which are found, in which order, and which is shown.
const list = document.getElementById("list"), search = document.getElementById("search"), sort = document.getElementById("sort");
const PIECE = 200; // so many are put on the page at a time
let filtered = []; // entries of the index, as they are listed
let byNumber = new Map();
let current = null; // the number of the feature that is shown
let upward = false;

function entriesOf() {
  byNumber = new Map(sae().index.map((entry) => [entry.index, entry]));
  const logits = sort.querySelector("[value=max_logit]");
  logits.hidden = logits.disabled = sae().index.every((entry) => entry.max_logit === null);
  if (logits.disabled && sort.value === "max_logit") sort.value = "given";
}

// Whether a token has the text in it that is searched for, as a function; null for none.  Capitals are meant when typed.
function searched() {
  const wanted = search.value.replaceAll("\\n", "\n").replaceAll("\\t", "\t").replaceAll("⏎", "\n").replaceAll("⇥", "\t");
  if (!wanted) return null;
  const exact = wanted !== wanted.toLowerCase();
  return (token) => (exact ? token : token.toLowerCase()).includes(wanted);
}

// Whether a text of the feature on the page has what is searched for: it may be of several tokens.
const joined = new WeakMap();
function inTexts(entry, has) {
  const own = window.saekitSource ? null : sae().features[entry.index];
  if (!own) return false;
  if (!joined.has(own)) joined.set(own, [...own.top, ...own.quantiles.flatMap((one) => one.windows)].map((one) => one.tokens.join("")));
  return joined.get(own).some(has);
}

// Those with such a token or label, or with that number; where there are none, those with it in a text.
function found() {
  const has = searched();
  if (!has) return [...sae().index];
  const hits = sae().index.filter((entry) =>
    String(entry.index) === search.value.trim() || entry.fires_on.some(has) || entry.raises.some(has) || (entry.label && has(entry.label)));
  return hits.length ? hits : sae().index.filter((entry) => inTexts(entry, has));
}

function sorted(entries) {
  const key = sort.value, sign = (key === "index" ? 1 : -1) * (upward ? -1 : 1);
  if (key === "given") return upward ? entries.reverse() : entries;
  return entries.sort((one, other) => sign * ((one[key] ?? -Infinity) - (other[key] ?? -Infinity)) || one.index - other.index);
}

function relist() {
  filtered = sorted(found());
  const wanted = Number(search.value.trim());
  const at = search.value.trim() ? filtered.findIndex((entry) => entry.index === wanted) : -1;
  if (at > 0) filtered.unshift(...filtered.splice(at, 1));
  list.replaceChildren();
  more();
  const all = sae().index.length;
  document.getElementById("found").textContent =
    filtered.length === all ? `${whole(all)} feature${all === 1 ? "" : "s"}` : filtered.length ? `${whole(filtered.length)} of ${whole(all)} features`
      : `No feature has it among its tokens${window.saekitSource ? " (single tokens are searched, not texts)" : ", nor in a text"}`;
  if (shown) main.querySelector(".title")?.replaceWith(titleOf(shown));
}

function more() {
  for (const entry of filtered.slice(list.children.length, list.children.length + PIECE)) list.append(item(entry));
  mark();
}

function item(entry) {
  const shownValue = { maximum: number(entry.maximum), max_logit: number(entry.max_logit) }[sort.value] ?? percent(entry.firing_fraction);
  const has = searched();
  const hits = has ? [...entry.fires_on, ...entry.raises].filter(has) : [];
  const words = [...new Set([...hits, ...entry.fires_on])].slice(0, 4);
  return el("li", {}, el("a", { href: hashOf(entry.index), "data-index": entry.index },
    el("span", { class: "number" }, String(entry.index)),
    el("span", { class: "amount" }, shownValue),
    el("span", { class: "words" }, entry.label ?? (words.length || entry.firing_fraction ? "" : "never fires"),
      ...(entry.label ? [] : words.map((token) => el("span", { class: hits.includes(token) ? "chip hit" : "chip" }, alone(token)))))));
}

function mark() {
  for (const one of list.querySelectorAll("[aria-current]")) one.removeAttribute("aria-current");
  const here = list.querySelector(`[data-index="${current}"]`);
  if (!here) return;
  here.setAttribute("aria-current", "true");
  const box = here.getBoundingClientRect(), room = list.getBoundingClientRect();
  if (room.height && (box.top < room.top || box.bottom > room.bottom)) list.scrollTop += box.top - room.top - room.height / 3;
}

list.addEventListener("scroll", () => {
  if (list.scrollTop + list.clientHeight > list.scrollHeight - 600 && list.children.length < filtered.length) more();
}, { passive: true });

// The place of a feature in the address, so that it can be sent, and gone back to.
function hashOf(index) {
  return page.saes.length > 1 ? `#${place}/${index}` : `#${index}`;
}

// The next feature of the list, or one before.
function go(by) {
  const at = filtered.findIndex((entry) => entry.index === current);
  const next = filtered[at < 0 ? 0 : at + by];
  if (!next) return;
  while (list.children.length <= Math.min(at + by, filtered.length - 1)) more();
  openFeature(next.index);
}

// Show a feature, and say so in the address, which tells it only later.
function openFeature(index) {
  show(index);
  location.hash = hashOf(index);
}

async function show(index) {
  current = index;
  mark();
  main.setAttribute("aria-busy", "true");
  const asked = [place, index];
  try {
    const data = await source.feature(place, index);
    if (asked[0] === place && asked[1] === current) draw(data);
  } catch (error) {
    if (asked[1] === current) main.replaceChildren(el("p", { class: "notice", role: "alert" }, error.message));
  }
  main.removeAttribute("aria-busy");
}

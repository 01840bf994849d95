// One feature: what it fires on, with what else, and what it writes.
const main = document.getElementById("feature");
let shown = null; // the data of the feature that is shown
let aligned = recall("texts") !== "whole"; // whether texts stand in columns around their token

// A color between that of the card and that of activations, or of negative ones.
function shade(value, most) {
  if (!value || !most) return null;
  const strength = Math.min(Math.abs(value) / most, 1);
  return `color-mix(in srgb, var(${value > 0 ? "--fire" : "--below"}) ${Math.round(12 + 88 * strength)}%, transparent)`;
}

function draw(data) {
  hideTip();
  shown = data;
  const about = sae().about;
  const held = document.activeElement?.dataset.step; // a button that is used again and again stays in focus
  main.replaceChildren(
    headOf(data, about),
    el("div", { class: "columns" },
      el("div", { class: "writes" }, logitsOf(data, about)),
      el("section", { class: `texts ${aligned ? "aligned" : "whole"}`, "aria-label": "Texts" }, ...textsOf(data)),
      el("div", { class: "company" }, ...histogramsOf(data), ...tablesOf(data, about))));
  if (held) main.querySelector(`[data-step="${held}"]`).focus();
  drawPlots();
}

// Its number, where it is in the list, and the ways to its neighbors there.
function titleOf(data) {
  const at = filtered.findIndex((one) => one.index === data.index);
  const step = (by, sign, words) => el("button", {
    type: "button", class: "plain step", "data-step": by, title: words, "aria-label": words, disabled: at < 0 || !filtered[at + by],
    on: { click: () => go(by) },
  }, sign);
  return el("div", { class: "title" },
    step(-1, "‹", "The feature before (k)"),
    el("h2", { id: "name" }, `Feature ${data.index}`),
    step(1, "›", "The next feature (j)"),
    el("span", { class: "quiet" }, at < 0 ? "not in the list" : `${whole(at + 1)} of ${whole(filtered.length)}`));
}

function headOf(data, about) {
  const tiles = [["fires on", percent(data.firing_fraction), `${whole(data.fired)} of ${whole(about.tokens_counted)} tokens`]];
  if (!data.dead) tiles.push(["largest activation", number(data.maximum, 4), ""], ["least above zero", number(data.minimum, 3), ""]);
  if (data.logits) tiles.push(["largest logit", signed(data.logits.top[0]?.[2] ?? data.logits.histogram.high), data.logits.top[0] ? alone(data.logits.top[0][1]) : ""]);
  if (data.minimum < 0) tiles[2][0] = "least activation";
  return el("header", { class: "head" },
    titleOf(data),
    data.label ? el("p", { class: "label" }, data.label) : null,
    el("dl", { class: "tiles" }, ...tiles.map(([name, value, more]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, ` ${more}`) : null)))),
    data.dead ? el("p", { class: "notice" }, "It fires on no token of this text, so there are no examples of it.") : null,
    data.complete ? null : el("p", { class: "notice" },
      `Of its ${whole(data.fired)} activations the store has a sample, ${whole(data.stored)}, with the largest among them: the intervals below show some of that. Its numbers and its histogram are those of all.`));
}

function card(title, note, ...content) {
  return el("section", { class: "card" }, el("h3", {}, title), note ? el("p", { class: "quiet" }, note) : null, ...content);
}

function tableOf(heads, rows) {
  return el("table", {},
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell))))));
}

function logitsOf(data, about) {
  if (!data.logits) return card("Logits", null, el("p", { class: "none" }, `Nothing can be said of logits: ${about.why_no_logits ?? "it is not known"}.`));
  const most = Math.max(...[...data.logits.top, ...data.logits.bottom].map((row) => Math.abs(row[2])), 1e-12);
  const side = (rows, kind, title) => el("div", { class: `side ${kind}` }, el("h4", {}, title),
    el("ol", {}, ...rows.map(([id, text, value]) => el("li", { title: `${quoted(text)}, token ${id}` },
      el("span", { class: "chip" }, alone(text)),
      el("span", { class: "extent", style: `width:${(46 * Math.abs(value) / most).toFixed(1)}%` }),
      el("span", { class: "amount" }, signed(value))))));
  if (!data.logits.top.length) return card("Logits", null, el("p", { class: "none" }, "The store keeps no tokens by logit."));
  return card("Logits", "what an activation of 1 adds, on the direct path",
    el("div", { class: "sides" }, side(data.logits.top, "up", "raises most"), side(data.logits.bottom, "down", "lowers most")));
}

function histogramsOf(data) {
  const found = [];
  if (data.firing) {
    const most = Math.max(Math.abs(data.maximum), Math.abs(data.minimum));
    found.push(card("Activations", `where it fires: ${percent(data.firing_fraction)} of tokens`,
      histogramOf("Activations", data.firing, (at) => blend(at > 0 ? "--fire" : "--below", 0.4 + 0.6 * Math.min(Math.abs(at) / most, 1)),
        `from ${number(data.firing.low)} to ${number(data.firing.high)}`)));
  }
  if (data.logits) {
    const { mean, std, histogram } = data.logits;
    const words = `mean ${number(Math.abs(mean) < std / 1000 ? 0 : mean)}, standard deviation ${number(std)}`;
    found.push(card("Logits of all tokens", words,
      histogramOf("Logits of all tokens", histogram, (at) => color(at < 0 ? "--below" : "--above"), words)));
  }
  return found;
}

// A color of the theme mixed into that of cards, as plotly takes it.
function blend(name, part) {
  const channels = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const ground = channels(color("--card"));
  return `rgb(${channels(color(name)).map((one, at) => Math.round(one * part + ground[at] * (1 - part))).join(",")})`;
}

// ---- texts

function textsOf(data) {
  if (data.dead) return [card("Texts", null, el("p", { class: "none" }, "None: it fires on no token of this text."))];
  const most = Math.max(Math.abs(data.maximum), Math.abs(data.minimum));
  const effects = [...data.top, ...data.quantiles.flatMap((one) => one.windows)].flatMap((one) => one.loss_effects ?? []);
  const scale = { most, effect: Math.max(...effects.map(Math.abs), 1e-9), kind: data.loss_effect_kind };
  const group = (title, note, windows) => el("section", { class: "group" },
    el("h3", {}, title, note ? el("span", { class: "quiet" }, note) : null),
    windows.length ? el("div", { class: "sequences" }, ...windows.map((window) => sequence(window, scale)))
      : el("p", { class: "none" }, "No token of the text is in this interval."));
  const columns = el("button", {
    type: "button", class: "plain", id: "columns", "aria-pressed": String(aligned), title: "Texts in columns around their token (w)",
    on: { click: toggleColumns },
  }, "In columns");
  return [
    el("div", { class: "legend" }, ...legend(scale), columns),
    group("Top activations", data.top.length ? "" : "none above zero", data.top),
    ...data.quantiles.map((one) => group(`${number(one.low)} to ${number(one.high)}`, `${percent(one.share)} of tokens`,
      [...one.windows].sort((here, there) => there.values[there.at] - here.values[here.at]))),
  ];
}

function legend(scale) {
  const found = [el("span", { class: "key" }, "0", el("span", { class: "ramp", "aria-hidden": "true" }), number(scale.most), el("span", { class: "quiet" }, "activation"))];
  if (scale.kind) found.push(el("span", { class: "key" }, el("span", { class: "quiet" }, "without it, the loss at the next token"),
    el("span", { class: "token helps" }, "rises"), el("span", { class: "token harms" }, "falls"),
    el("span", { class: "quiet" }, scale.kind === "exact" ? "(exact)" : "(approximate: direct path)")));
  return found;
}

function sequence(window, scale) {
  const tokens = window.tokens.map((_, at) => tokenIn(window, at, scale));
  return el("div", { class: "sequence" },
    el("span", { class: "value" }, fixed(window.values[window.at])),
    el("span", { class: "text" },
      el("span", { class: "before" }, ...tokens.slice(0, window.at)),
      tokens[window.at],
      el("span", { class: "after" }, ...tokens.slice(window.at + 1))));
}

function tokenIn(window, at, scale) {
  const text = window.tokens[at], value = window.values[at], effect = window.loss_effects?.[at];
  const kinds = ["token"];
  if (at === window.at) kinds.push("peak");
  if (!window.counted[at]) kinds.push("aside");
  if (!/[^\s]/.test(text) || remark(text)) kinds.push("blank");
  const styles = [];
  const ground = shade(value, scale.most);
  if (ground) kinds.push("fires"), styles.push(`background-color:${ground}`);
  if (effect && Math.abs(effect) >= 0.05 * scale.effect) {
    kinds.push(effect > 0 ? "helps" : "harms");
    styles.push(`--weight:${Math.round(30 + 70 * Math.abs(effect) / scale.effect)}%`);
  }
  const made = el("span", { class: kinds.join(" "), style: styles.join(";") || null, tabindex: at === window.at ? "0" : "-1" }, inText(text));
  made.told = () => [
    quoted(text),
    [`token ${window.ids[at]}`, remark(text)].filter(Boolean).join(", "),
    window.counted[at] ? `activation ${number(value, 4)}` : "does not count",
    effect === null || effect === undefined ? "" : `without it, the loss at the next token ${effect < 0 ? "falls" : "rises"} by ${number(Math.abs(effect))} nats (${scale.kind === "exact" ? "exact" : "direct path"})`,
    `context ${window.context}, position ${window.start + at}`,
  ];
  return made;
}

function toggleColumns() {
  aligned = !aligned;
  remember("texts", aligned ? "columns" : "whole");
  main.querySelector(".texts").className = `texts ${aligned ? "aligned" : "whole"}`;
  document.getElementById("columns")?.setAttribute("aria-pressed", String(aligned));
}

// ---- tables

function link(index) {
  if (!byNumber.has(index)) return el("span", { class: "absent", title: "not on this page: --features chooses which are" }, String(index));
  return el("a", { href: hashOf(index) }, String(index));
}

function tablesOf(data, about) {
  const none = (words) => el("p", { class: "none" }, words);
  const measures = (rows, title, note) => card(title, note, rows.length
    ? tableOf(["feature", "Pearson", "cosine", "Jaccard"], rows.map(([index, ...values]) => [link(index), ...values.map((one) => fixed(one))]))
    : none(data.dead ? "None: it never fires." : "None."));
  const several = about.targets.length > 1 ? ` (counted through ${about.targets.join(", ")})` : "";
  return [
    measures(data.partners, "Fires together with", "by correlation over all tokens"),
    measures(data.together, "Shares tokens with", "by Jaccard: of the tokens on which either fires"),
    card("Decoder neighbors", "directions most like its own", data.neighbors.length
      ? tableOf(["feature", "cosine"], data.neighbors.map(([index, cosine]) => [link(index), fixed(cosine)])) : none("None.")),
    card("Neuron alignment", `largest coordinates of its direction${several}`, data.alignment.length
      ? tableOf(["neuron", "value", "of L1"], data.alignment.map(([index, value, share]) => [String(index), signed(value), percent(share)])) : none("None.")),
    card("Correlated neurons", `coordinates of ${about.inputs.join(", ")}`, data.neurons.length
      ? tableOf(["neuron", "Pearson", "cosine"], data.neurons.map(([index, ...values]) => [String(index), ...values.map((one) => fixed(one))]))
      : none(data.dead ? "None: it never fires." : "None.")),
  ];
}

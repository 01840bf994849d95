// Where what is shown comes from: the page itself, or who serves it, whose page may set window.saekitSource.
const page = JSON.parse(document.getElementById("data").textContent);
let place = 0; // which of page.saes is shown

// The list of a large SAE comes as columns, with every text once.
for (const one of page.saes) if (!Array.isArray(one.index)) one.index = rowsOf(one.index);

function rowsOf(columns) {
  const { texts, raises, labels } = columns;
  return columns.index.map((index, at) => ({
    index,
    label: labels[index] ?? null,
    firing_fraction: columns.firing_fraction[at],
    maximum: columns.maximum[at],
    max_logit: columns.max_logit ? columns.max_logit[at] : null,
    fires_on: [],
    raises: raises[at].map((text) => texts[text]),
  }));
}

function sae() {
  return page.saes[place];
}

const source = {
  // The data of a feature, as a promise.
  async feature(place, number) {
    const own = page.saes[place].features;
    if (own[number]) return own[number];
    const answer = await fetch(`sae/${place}/feature/${number}.json`);
    if (!answer.ok) {
      const told = await answer.json().catch(() => null);
      throw new Error(told?.error ?? `Feature ${number} could not be read: ${answer.status} ${answer.statusText}`);
    }
    return (own[number] = await answer.json());
  },
  // plotly.js runs when this promise is kept.
  async plotly() {
    if (!("DecompressionStream" in window)) throw new Error("pictures need a browser of 2023 or later");
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(el("script", {}, await new Response(unpacked).text()));
  },
  ...window.saekitSource,
};

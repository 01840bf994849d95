// Where what is shown comes from: the page itself, or who serves it.  A server's page may set window.saekitSource.
const page = JSON.parse(document.getElementById("data").textContent);
let place = 0; // which of page.saes is shown

function sae() {
  return page.saes[place];
}

const source = Object.assign({
  // The data of a feature, as a promise.
  async feature(place, number) {
    const own = page.saes[place].features[number];
    if (own) return own;
    const answer = await fetch(`sae/${place}/feature/${number}.json`);
    if (!answer.ok) throw new Error(`feature ${number} could not be read: ${answer.status} ${answer.statusText}`);
    return (page.saes[place].features[number] = await answer.json());
  },
}, window.saekitSource);

"use strict";
// What only a page that is served does: it asks for what a page on disk has in itself.
window.saekitSource = {
  async plotly() {
    const answer = await fetch(document.getElementById("plotly").dataset.at);
    if (!answer.ok) throw new Error(`plotly.js could not be read: ${answer.status} ${answer.statusText}`);
    return answer.text();
  },
};

// The tokens that features fire on come after the list, which need not wait for them.
document.addEventListener("DOMContentLoaded", async () => {
  for (let which = 0; which < page.saes.length; which++) {
    try {
      const answer = await fetch(`sae/${which}/fires-on.json`);
      if (!answer.ok) continue;
      const { texts, fires_on } = await answer.json();
      page.saes[which].index.forEach((entry, at) => { entry.fires_on = fires_on[at].map((text) => texts[text]); });
    } catch { continue; }
    if (which !== place) continue;
    if (search.value) relist();
    else [...list.children].forEach((line, at) => line.replaceWith(item(filtered[at])));
    mark();
  }
});

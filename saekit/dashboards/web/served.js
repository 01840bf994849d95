"use strict";
// What only a page that is served does: it asks for what a page on disk has in itself.
window.saekitSource = {
  plotly() {
    const loaded = document.createElement("script"); // by its address, so that the browser keeps what it compiled
    loaded.src = document.getElementById("plotly").dataset.at;
    return new Promise((kept, broken) => {
      loaded.onload = kept;
      loaded.onerror = () => broken(new Error("plotly.js could not be read"));
      requestIdleCallback(() => document.head.append(loaded), { timeout: 500 });
    });
  },
};

// The tokens that features fire on come after the list, which need not wait for them.
document.addEventListener("DOMContentLoaded", async () => {
  sort.querySelector("[value=given]").textContent = "as in the store"; // nothing was chosen
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

// What is told of a token under the mouse, in focus or tapped on: one box for all of them.
const tip = document.getElementById("tip");
let told = null; // the token that it is about

function showTip(token) {
  const lines = token.told();
  tip.replaceChildren(el("b", {}, lines[0]), ...lines.slice(1).filter(Boolean).map((line) => el("span", {}, line)));
  tip.hidden = false;
  const box = token.getClientRects()[0], own = tip.getBoundingClientRect();
  if (!box) return hideTip();
  const left = Math.min(Math.max(box.left + box.width / 2 - own.width / 2, 6), document.documentElement.clientWidth - own.width - 6);
  const above = box.top - own.height - 7;
  tip.style.left = `${left}px`;
  tip.style.top = `${above >= 4 ? above : box.bottom + 7}px`;
  told?.removeAttribute("aria-describedby");
  token.setAttribute("aria-describedby", "tip");
  told = token;
}

function hideTip() {
  tip.hidden = true;
  told?.removeAttribute("aria-describedby");
  told = null;
}

function tokenOf(event) {
  return event.target instanceof Element ? event.target.closest(".token") : null;
}

for (const [event, shows] of [["mouseover", true], ["focusin", true], ["click", true], ["mouseout", false], ["focusout", false]]) {
  document.addEventListener(event, (happened) => {
    const token = tokenOf(happened);
    if (token && shows) showTip(token);
    else if (event === "click" || (token && token === told && document.activeElement !== token)) hideTip();
  });
}
document.addEventListener("scroll", () => !tip.hidden && hideTip(), { capture: true, passive: true });

// Arrows lead from token to token, and from text to text; Tab from text to text.
function tokenKey(event) {
  const token = tokenOf(event);
  if (!token || event.ctrlKey || event.altKey || event.metaKey) return false;
  const row = [...token.closest(".sequence").querySelectorAll(".token")];
  let next = null;
  if (event.key === "ArrowRight") next = row[row.indexOf(token) + 1];
  else if (event.key === "ArrowLeft") next = row[row.indexOf(token) - 1];
  else if (event.key === "Home") next = row[0];
  else if (event.key === "End") next = row.at(-1);
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const peaks = [...document.querySelectorAll(".token.peak")];
    next = peaks[peaks.indexOf(row.find((one) => one.matches(".peak"))) + (event.key === "ArrowDown" ? 1 : -1)];
  } else return false;
  event.preventDefault();
  if (next) next.focus();
  return true;
}

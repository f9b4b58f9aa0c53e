"use strict";
// what is known of a token, shown beside it
function element(name, text, parent, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  parent.append(made);
  return made;
}

function newTip(parent) {
  const tip = element("div", "", parent, "tip");
  tip.hidden = true;
  tip.setAttribute("role", "status");
  return tip;
}

// below the token, else above it; whole on the screen, over the token where there is no room beside it
function placeTip(tip, span, floor) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const top = box.bottom + 6 + tip.offsetHeight < floor ? box.bottom + 6 : box.top - 6 - tip.offsetHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 16)) + scrollX + "px";
  tip.style.top = Math.max(0, Math.min(top, innerHeight - tip.offsetHeight)) + scrollY + "px";
}

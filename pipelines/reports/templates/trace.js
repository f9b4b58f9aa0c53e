{% include "tip.js" %}
document.documentElement.classList.add("scripted");

function unpack(text, type) {
  return new type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

for (const figure of document.querySelectorAll("figure.trace")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const chosen = unpack(data.chosen, Int16Array), weights = unpack(data.weights, Uint8Array);
  const T = data.ids.length, K = data.choices, E = data.experts.length;
  const spans = [...figure.querySelectorAll(".text .t")];
  const slider = figure.querySelector("input"), output = figure.querySelector("output");
  const legend = [...figure.querySelectorAll(".legend li")];
  const numAsked = figure.querySelector(".text").children.length;
  let kept = [], winners = [], at = -1;
  const tip = newTip(figure.parentElement);

  // the mean weight of each expert over the modules that are kept
  function shares(t) {
    const sums = new Float64Array(E);
    for (const m of kept) {
      for (let k = (m * T + t) * K; k < (m * T + t + 1) * K; k++) sums[chosen[k]] += weights[k] / 255;
    }
    return sums.map((sum) => sum / kept.length);
  }

  function draw() {
    const layer = Number(slider.value);
    output.textContent = layer < 0 ? "all layers" : "layer " + layer;
    kept = data.modules.map((_, m) => m).filter((m) => layer < 0 || data.layers[m] === layer);
    if (!kept.length) output.textContent += ", not routed";
    const won = new Array(E).fill(0);
    winners = spans.map((span, t) => {
      const found = shares(t), best = found.indexOf(Math.max(...found));
      won[best] += 1;
      span.className = "t e" + best;
      span.dataset.n = best < 0 ? "–" : best + 1;
      span.style.setProperty("--w", kept.length ? found[best].toFixed(2) : 0);
      return best;
    });
    winners.forEach((best, t) => {
      spans[t].classList.toggle("first", t === 0 || t === numAsked || winners[t - 1] !== best);
    });
    legend.forEach((item, e) => {
      item.querySelector(".share").textContent = won[e];
      item.classList.toggle("none", !won[e]);
    });
    if (at >= 0) show(at);
  }

  function show(t) {
    if (at >= 0) spans[at].classList.remove("at");
    at = t;
    tip.hidden = t < 0;
    if (t < 0) return;
    spans[t].classList.add("at");
    tip.replaceChildren();
    element("b", JSON.stringify(data.pieces[t]), tip);
    element("span", "  token " + (t + 1) + " of " + T + ", id " + data.ids[t] + ", " + output.textContent, tip);
    const table = element("table", "", tip), found = shares(t);
    const best = [...found.keys()].filter((e) => found[e] > 0.0005).sort((a, b) => found[b] - found[a]);
    for (const e of best.slice(0, 5)) row(table, data.experts[e], found[e]);
    if (Number(slider.value) >= 0) {
      for (const m of kept) {
        for (let k = (m * T + t) * K; k < (m * T + t + 1) * K; k++) {
          row(table, data.modules[m].split(".").pop() + " → " + data.experts[chosen[k]], weights[k] / 255);
        }
      }
    }
    placeTip(tip, spans[t], innerHeight);
  }

  function row(table, name, share) {
    const line = element("tr", "", table);
    element("td", name, line);
    element("td", share.toFixed(2), line);
  }

  spans.forEach((span, t) => {
    span.addEventListener("pointerenter", () => show(t));
    span.addEventListener("click", () => show(t));
  });
  figure.addEventListener("pointerleave", () => show(-1));
  slider.addEventListener("input", draw);
  for (const text of figure.querySelectorAll(".text")) {
    text.tabIndex = 0;
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") show(-1);
      if (!step) return;
      event.preventDefault();
      show(Math.max(0, Math.min(T - 1, (at < 0 && text.previousElementSibling.textContent === "answered" ? numAsked - 1 : at) + step)));
    });
    text.addEventListener("blur", () => show(-1));
  }
  legend.forEach((item, e) => {
    item.addEventListener("pointerenter", () => {
      figure.classList.add("only");
      spans.forEach((span, t) => span.classList.toggle("kept", winners[t] === e));
    });
    item.addEventListener("pointerleave", () => figure.classList.remove("only"));
  });
  draw();
}

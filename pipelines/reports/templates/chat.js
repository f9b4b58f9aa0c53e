{% include "tip.js" %}
// A conversation with one or more of the models of this page's server, which answer side by side.
// `state` is all that the page knows; a downloaded page has it with the turns, and draws them again.
const form = document.querySelector("#ask"), dock = document.querySelector("#dock"), turns = document.querySelector("#turns");
const field = form.querySelector("textarea"), send = form.querySelector("[type=submit]");
const stop = form.querySelector("#stop"), said = form.querySelector("output");
const boxes = [...form.querySelectorAll("[type=checkbox]")], select = form.querySelector("select");
const legend = [...document.querySelectorAll(".legend li")];
const state = JSON.parse(form.dataset.state);
const KEY = JSON.stringify([state.model, state.experts]);
let running = null, at = null;

const tip = newTip(document.body);

// ---- a tab that is loaded again, as phones do by themselves, still has its conversation

function keep() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(state.turns));
  } catch {} // the browser keeps nothing, or not so much: the conversation is on this page alone
}
// a hidden tab may end without another event; an answer that its page leaves is stopped, and has not failed
document.addEventListener("visibilitychange", keep);
addEventListener("pagehide", () => running?.abort());

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
  } catch {
    return [];
  }
}

// a tab that is loaded again, or a page that was downloaded meanwhile, sees no end of an answer
function ended(found) {
  for (const answer of found.flatMap((turn) => turn.answers).filter((answer) => answer.waits)) {
    answer.waits = false;
    if (answer.tokens.length) answer.cut = true;
    else answer.error = "stopped";
  }
  return found;
}

// ---- the server

async function* tokensOf(expert, messages, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model: expert ? state.model + ":" + expert : state.model,
      messages, stream: true, trace: "layers", max_tokens: state.max_tokens,
    }),
    signal,
  });
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? "a proxy or another server answered (status " + response.status + ")");
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended before the answer did");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const body = JSON.parse(data);
      if (body.error) throw new Error(body.error.message);
      const choice = body.choices[0];
      if (choice.finish_reason === "length") yield null;
      for (const token of choice.trace ?? []) yield { ...token, layers: runsOf(token.layers) };
    }
  }
}

// what was said before: a turn that this expert did not answer has the first answer of the others
function messagesFor(expert, past, question) {
  const messages = [];
  for (const turn of past) {
    const given = turn.answers.filter((answer) => !answer.error);
    const answer = given.find((one) => one.expert === expert) ?? given[0];
    if (!answer) continue;
    const content = answer.tokens.map((token) => token.text).join("");
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content });
  }
  return [...messages, { role: "user", content: question }];
}

// ---- what is shown

function nameOf(expert) {
  return expert === "" ? "fused" : expert === "(base)" ? "base" : expert;
}

function drawTurn(turn) {
  element("p", turn.question, turns, "asked");
  const row = element("div", "", turns, "answers");
  return turn.answers.map((answer) => {
    const box = element("article", "", row), name = nameOf(answer.expert);
    box.setAttribute("aria-label", "answer: " + name);
    element("h3", name, box);
    const text = element("p", "", box, "text"), note = element("p", "", box, "note");
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "tokens of " + name);
    for (const token of answer.tokens) drawToken(text, token);
    const drawn = { box, text, note };
    drawNote(drawn, answer);
    return drawn;
  });
}

function drawToken(text, token) {
  const expert = state.experts.indexOf(token.expert);
  const span = element("span", token.text, text, "t e" + expert);
  span.classList.toggle("first", text.children.length === 1 || span.previousSibling.token.expert !== token.expert);
  span.dataset.n = expert + 1;
  span.style.setProperty("--w", token.share);
  span.token = token;
}

function drawNote({ box, note }, answer) {
  box.setAttribute("aria-busy", answer.waits);
  note.textContent = answer.error || (answer.cut && "cut here") || (answer.waits && "…") || (answer.tokens.length ? "" : "no text");
  note.classList.toggle("error", Boolean(answer.error));
  note.hidden = !note.textContent;
}

// the legend has the tokens of each expert
const won = new Map();
function count(tokens) {
  for (const { expert } of tokens) won.set(expert, (won.get(expert) || 0) + 1);
  legend.forEach((item, e) => {
    const num = won.get(state.experts[e]) || 0;
    item.querySelector(".share").textContent = num;
    item.classList.toggle("none", !num);
  });
}

// ---- asking

function whoAnswers() {
  const chosen = boxes.filter((box) => box.checked);
  return chosen.map((box) => (box.id === "one" ? select.value : box.value));
}

async function ask(question) {
  const past = [...state.turns];
  const answers = whoAnswers().map((expert) => ({ expert, tokens: [], waits: true, cut: false, error: "" }));
  const turn = { question, answers };
  state.turns.push(turn);
  keep();
  const drawn = drawTurn(turn), control = new AbortController();
  setRunning(control);
  for (const [i, answer] of answers.entries()) {
    if (i === 0 || isSeen(drawn[i - 1].box)) drawn[i].box.scrollIntoView({ block: "nearest" });
    try {
      for await (const token of tokensOf(answer.expert, messagesFor(answer.expert, past, question), control.signal)) {
        if (token === null) {
          answer.cut = true;
          continue;
        }
        const { text } = drawn[i], seen = isSeen(text);
        answer.tokens.push(token);
        drawToken(text, token);
        if (state.turns.includes(turn)) count([token]);
        if (seen) text.lastChild.scrollIntoView({ block: "nearest" });
      }
    } catch (error) {
      if (control.signal.aborted && answer.tokens.length) answer.cut = true;
      else if (control.signal.aborted) answer.error = "stopped";
      else answer.error = error instanceof TypeError ? "the server does not answer" : error.message;
    }
    answer.waits = false;
    drawNote(drawn[i], answer);
    if (state.turns.includes(turn)) keep();
  }
  if (running === control) setRunning(null);
}

// whether its end is on the screen: a person who reads further up is left there
function isSeen(box) {
  return box.getBoundingClientRect().bottom < floor() + 40;
}

// where the conversation ends on the screen
function floor() {
  return Math.min(dock.getBoundingClientRect().top, innerHeight);
}

// what is scrolled into sight stays above the dock; one that leaves less than half of a small or
// enlarged screen goes to the end of the page
function fit() {
  const tall = dock.offsetHeight > innerHeight / 2;
  dock.classList.toggle("tall", tall);
  document.documentElement.style.scrollPaddingBottom = (tall ? 0 : dock.offsetHeight) + 16 + "px";
}
new ResizeObserver(fit).observe(dock);
addEventListener("resize", fit);

function setRunning(control) {
  if ([send, stop].includes(document.activeElement)) field.focus(); // a hidden button has none
  running = control;
  send.hidden = running !== null;
  stop.hidden = running === null;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = field.value.trim();
  if (running || !question) return;
  if (!whoAnswers().length) {
    said.textContent = "choose who answers";
    return;
  }
  said.textContent = field.value = "";
  ask(question);
});
field.addEventListener("keydown", (event) => {
  // 229: in Safari, the Enter that ends a composition
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  form.requestSubmit();
});
stop.addEventListener("click", () => running.abort());
form.querySelector("#reset").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  state.turns = [];
  keep();
  turns.replaceChildren();
  hide();
  won.clear();
  count([]);
  field.focus();
});
select.addEventListener("change", () => {
  boxes.find((box) => box.id === "one").checked = true;
});
form.querySelector("#download").addEventListener("click", () => {
  hide();
  const page = document.documentElement.cloneNode(true);
  page.querySelector("#turns").replaceChildren();
  page.querySelector(".tip").remove();
  page.removeAttribute("style");
  page.querySelector("#ask").dataset.state = JSON.stringify({ ...state, saved: true });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["<!doctype html>\n", page.outerHTML], { type: "text/html" }));
  link.download = state.model + ".html";
  link.click();
  URL.revokeObjectURL(link.href);
});

// ---- the experts of a token

// neighbouring layers with one expert are kept together: a browser keeps some millions of characters
function runsOf(layers) {
  const runs = [];
  for (const { layer, expert } of layers) {
    const last = runs.at(-1);
    if (last?.expert === expert && last.to === layer - 1) last.to = layer;
    else runs.push({ expert, from: layer, to: layer });
  }
  return runs;
}

function show(span) {
  hide();
  at = span;
  span.classList.add("at");
  const { text, expert, share, layers } = span.token;
  element("b", JSON.stringify(text), tip);
  element("span", "  " + expert + (layers.length ? ", " + share.toFixed(2) + " over all layers" : ""), tip);
  const list = element("ol", "", tip, "layers");
  for (const [name, runs] of Map.groupBy(layers, (run) => run.expert)) {
    const item = element("li", "", list), numbers = runs.map(({ from, to }) => (from === to ? from : from + "–" + to));
    element("span", name, item, "t e" + state.experts.indexOf(name));
    item.append((numbers.length > 1 || runs[0].to > runs[0].from ? " layers " : " layer ") + numbers.join(", "));
  }
  tip.hidden = false;
  placeTip(tip, span, floor());
}

function hide() {
  at?.classList.remove("at");
  at = null;
  tip.hidden = true;
  tip.replaceChildren();
}

for (const kind of ["pointerover", "click"]) {
  turns.addEventListener(kind, (event) => {
    if (event.target.token) show(event.target);
  });
}
turns.addEventListener("pointerleave", hide);
turns.addEventListener("focusout", hide);
turns.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hide();
  if (!step || !event.target.matches(".text")) return;
  event.preventDefault();
  const spans = [...event.target.children], place = spans.indexOf(at) + step;
  const next = spans[Math.max(0, Math.min(spans.length - 1, place))];
  next?.scrollIntoView({ block: "nearest" });
  if (next) show(next);
});

for (const box of boxes) {
  box.checked = box.id === "one" ? state.experts.includes(state.expert) && state.expert !== "(base)" : box.value === state.expert;
}
if (boxes.find((box) => box.id === "one").checked) select.value = state.expert;
form.hidden = Boolean(state.saved);
state.turns = ended(state.saved ? state.turns : kept());
state.turns.forEach(drawTurn);
count(state.turns.flatMap((turn) => turn.answers).flatMap((answer) => answer.tokens));

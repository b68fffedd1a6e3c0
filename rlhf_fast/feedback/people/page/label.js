"use strict";

// The page of `rlhf-fast label`. It holds no answer of its own: each is on the server's disk before the next item appears.
// Whatever people or models wrote reaches the document through textContent alone.

const $ = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const AHEAD = 8; // items fetched at once

// the seven answers to "which is better": [side, margin], from A much better to B much better
const STEPS = [["a", 3], ["a", 2], ["a", 1], ["tie", null], ["b", 1], ["b", 2], ["b", 3]];
const SIZES = { 1: "near", 2: "mid", 3: "far" };
const MARGINS = { 1: "slightly", 2: "clearly", 3: "much" };

const desk = { annotator: "", safety: false, total: 0, labelled: 0, skipped: 0, next: null };
const items = new Map(); // place -> item, what was fetched
let place = null; // of the item on the screen
let draft = null; // its answer as it stands
let choosing = false; // between a choice and its being saved: a second key in that moment is not meant for the next item
let running = Promise.resolve();

// ---- talking to the server

async function call(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const failed = body ? "Not saved. " : "";
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error(`${failed}The server does not answer: is rlhf-fast label still running?`);
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok || answer === null) {
    throw new Error(`${failed}${answer?.error?.message ?? `The server answers ${response.status}.`}`);
  }
  return answer;
}

// one thing after the other; what goes wrong is said
function guarded(work, choice = true) {
  if (choice && choosing) return running;
  choosing ||= choice;
  running = running.then(async () => {
    try {
      await work();
      $("trouble").hidden = true;
    } catch (error) {
      $("trouble").textContent = error.message;
      $("trouble").hidden = false;
    } finally {
      if (choice) choosing = false;
    }
  });
  return running;
}

const query = (values) => new URLSearchParams({ annotator: desk.annotator, ...values });

async function start() {
  const { items: first, ...state } = await call(`api/start?${query({})}`);
  Object.assign(desk, state);
  items.clear();
  for (const item of first) items.set(item.place, item);
  $("title").textContent = desk.title;
  $("people").textContent = desk.annotator;
  await show(desk.next);
}

async function fetched(at) {
  if (!items.has(at)) {
    const answer = await call(`api/items?${query({ from: at, count: AHEAD })}`);
    for (const item of answer.items) items.set(item.place, item);
  }
  return items.get(at);
}

// ---- showing an item

function element(kind, properties = {}, ...children) {
  const made = document.createElement(kind);
  const { dataset, ...rest } = properties;
  for (const [name, value] of Object.entries(rest)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  Object.assign(made.dataset, dataset);
  made.append(...children);
  return made;
}

async function show(at) {
  if (at === null || at === undefined) return finish();
  const item = await fetched(at);
  if (!item) return finish();
  place = at;
  draft = drafted(item);
  $("end").hidden = true;
  $("item").hidden = $("answer").hidden = false;
  $("prompt").replaceChildren(...item.prompt.map((said) => turn(said, item.prompt.length > 1)));
  $("responses").replaceChildren(...item.responses.map(card));
  $("responses").dataset.count = item.responses.length;
  const two = item.responses.length === 2;
  $("scale").hidden = !two;
  $("ranking").hidden = $("save").hidden = two;
  $("safety").hidden = !(two && desk.safety);
  $("bad").textContent = two ? "Both bad" : "All bad";
  $("reason").value = draft.reason;
  refresh();
  window.scrollTo(0, 0);
  $("prompt-title").focus({ preventScroll: true });
  say(`Item ${at + 1} of ${desk.total}`);
  fetched(at + 1).catch(() => {}); // so that it is there when it is wanted
}

function drafted(item) {
  const count = item.responses.length;
  const plain = { ranks: null, margin: null, bad: false, reason: "", safer: null, unsafe: null, done: false, skipped: false };
  const label = { ...plain, ...item.label };
  const order = [...Array(count).keys()]; // places best first
  if (label.ranks) order.sort((i, j) => label.ranks[i] - label.ranks[j]);
  const tied = order.map((i, n) => n > 0 && label.ranks !== null && label.ranks[i] === label.ranks[order[n - 1]]);
  return { ...label, order, tied, typed: label.ranks ? count : 0, joining: false };
}

function turn({ role, text }, named) {
  const said = prose(text);
  const who = named ? [element("span", { className: "role", textContent: role })] : [];
  return element("div", { className: "turn" }, ...who, said);
}

function card(text, i) {
  const letter = LETTERS[i];
  const title = element("h2", { className: "letter", textContent: letter });
  title.setAttribute("aria-label", `Response ${letter}`);
  const head = element("header", {}, title, element("span", { className: "place" }));
  if (desk.safety) {
    const flag = element("button", { type: "button", className: "flag", textContent: "Unsafe", title: `Shift+${letter}` });
    flag.setAttribute("aria-label", `Response ${letter} is unsafe`);
    flag.addEventListener("click", () => toggleUnsafe(i));
    head.append(flag);
  }
  const side = draft.order.length === 2 ? ["a", "b"][i] : "";
  return element("article", { className: `card ${side}`, dataset: { i } }, head, prose(text));
}

// text as it is, every character of it; what stands between fences is in a typewriter's letters
function prose(text) {
  const parts = text.split(/(^[ \t]*```[^\n]*\n[^]*?^[ \t]*```[ \t]*$)/m);
  const spans = parts.map((part, n) => (n % 2 ? element("code", { className: "code", textContent: part }) : part));
  const lang = /[\uac00-\ud7a3]/.test(text) ? "ko" : ""; // Korean breaks lines between words
  return element("p", { className: "text", dir: "auto", lang }, ...spans);
}

// what follows from the draft; called after every change
function refresh() {
  const two = draft.order.length === 2;
  const cards = [...$("responses").children];
  const ranks = draft.ranks;
  if (two) {
    const chosen = stepOf(draft);
    [...$("scale-steps").children].forEach((b, n) => b.setAttribute("aria-pressed", n === chosen));
    hint(chosen);
    const safe = draft.safer && 1 + Math.sign(draft.safer[0] - draft.safer[1]);
    [...$("safety-steps").children].forEach((b, n) => b.setAttribute("aria-pressed", n === safe));
  } else {
    drawChips();
  }
  cards.forEach((c, i) => {
    const best = ranks && ranks[i] === 1 && ranks.some((r) => r > 1);
    c.classList.toggle("lit", Boolean(best));
    c.querySelector(".place").textContent = !two && ranks ? `place ${ranks[i]}` : "";
    c.querySelector(".flag")?.setAttribute("aria-pressed", Boolean(draft.unsafe?.[i]));
  });
  $("bad").setAttribute("aria-pressed", draft.bad);
  $("previous").disabled = place === 0;
  $("following").disabled = place + 1 >= desk.total;
  count();
}

function count() {
  const answered = desk.labelled + desk.skipped;
  $("count").textContent = `${answered} of ${Math.max(desk.total, desk.expected ?? 0)}`;
  $("fill").style.width = `${(100 * answered) / Math.max(1, desk.total, desk.expected ?? 0)}%`;
  $("fill").setAttribute("aria-valuenow", answered);
  $("fill").setAttribute("aria-valuemax", desk.total);
}

function say(text) {
  $("status").textContent = text;
}

function finish() {
  const again = !$("end").hidden;
  place = draft = null;
  $("item").hidden = $("answer").hidden = true;
  $("end").hidden = false;
  $("previous").disabled = $("following").disabled = true;
  count();
  const waiting = desk.expected > desk.total && !desk.fault;
  $("end-title").textContent = waiting ? "More is being written" : "All done";
  const numbers = `${desk.labelled} labelled, ${desk.skipped} skipped, of ${desk.total}.`;
  $("end-text").textContent = desk.fault ? `${numbers} No more will come: ${desk.fault}` : numbers;
  $("end-skipped").hidden = desk.skipped === 0;
  if (!again) $("end-title").focus();
  if (!again) say($("end-title").textContent);
  if (waiting) setTimeout(() => place === null && guarded(start, false), 1500);
}

// ---- answering

function stepOf({ ranks, margin }) {
  if (!ranks || ranks.length !== 2) return null;
  if (ranks[0] === ranks[1]) return 3;
  const side = ranks[0] < ranks[1] ? "a" : "b";
  return STEPS.findIndex(([s, m]) => s === side && m === (margin ?? 2));
}

async function keep(done, goOn = done) {
  const item = items.get(place);
  const answered = done && !draft.skipped;
  if (desk.safety && answered) draft.unsafe ??= draft.order.map(() => false);
  const { ranks, margin, bad, reason, safer, unsafe, skipped } = draft;
  const label = { ranks, margin, bad, reason, safer, unsafe, skipped, done };
  const state = await call("api/label", { annotator: desk.annotator, item: item.id, ...label });
  item.label = label;
  draft.done = done;
  Object.assign(desk, state);
  refresh();
  if (goOn) await show(state.next);
  else say("Saved");
}

// of two: saved at once; the next item comes when both questions have their answer
function choose(step) {
  guarded(async () => {
    const [side, margin] = STEPS[step];
    draft.ranks = { a: [1, 2], b: [2, 1], tie: [1, 1] }[side];
    Object.assign(draft, { margin, skipped: false });
    refresh();
    await keep(!desk.safety || draft.safer !== null);
  });
}

function chooseSafer(step) {
  guarded(async () => {
    Object.assign(draft, { safer: [[1, 2], [1, 1], [2, 1]][step], skipped: false });
    refresh();
    await keep(draft.ranks !== null);
  });
}

function toggleUnsafe(i) {
  guarded(async () => {
    draft.unsafe ??= draft.order.map(() => false);
    draft.unsafe[i] = !draft.unsafe[i];
    refresh();
    await keep(draft.done, false);
    say(`Response ${LETTERS[i]}: ${draft.unsafe[i] ? "unsafe" : "safe"}`);
  });
}

function allBad() {
  guarded(async () => {
    draft.bad = !draft.bad;
    if (draft.order.length === 2 && draft.bad && !draft.ranks) Object.assign(draft, { ranks: [1, 1], margin: null });
    draft.skipped = false;
    refresh();
    const two = draft.order.length === 2;
    await keep(two && draft.bad && (!desk.safety || draft.safer !== null));
  });
}

function skip() {
  guarded(async () => {
    draft.skipped = true;
    await keep(true);
  });
}

function undo() {
  guarded(async () => {
    const state = await call("api/undo", { annotator: desk.annotator });
    Object.assign(desk, state);
    if (state.place === null) return say("Nothing to take back");
    items.delete(state.place); // the server knows what it was before
    await show(state.place);
    say(`Taken back: item ${state.place + 1}`);
  });
}

// ---- ranking three and more

function ranksOf({ order, tied }) {
  const ranks = Array(order.length);
  let rank = 0;
  order.forEach((i, n) => {
    if (!tied[n]) rank += 1;
    ranks[i] = rank;
  });
  return ranks;
}

function ranked() {
  guarded(async () => {
    Object.assign(draft, { ranks: ranksOf(draft), skipped: false });
    refresh();
    await keep(false);
  });
}

function move(from, to) {
  const [moved] = draft.order.splice(from, 1);
  draft.order.splice(to, 0, moved);
  draft.tied = draft.tied.map(() => false); // they belonged to neighbours that are none now
  draft.typed = draft.order.length;
}

function drawChips() {
  const held = $("chips").contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const chips = draft.order.flatMap((i, n) => {
    const letter = LETTERS[i];
    const chip = element("button", { type: "button", className: "chip", textContent: letter, dataset: { key: letter } });
    chip.classList.toggle("set", n < draft.typed);
    chip.setAttribute("aria-label", `Response ${letter}, ${n + 1} of ${draft.order.length}; arrow keys move it`);
    chip.addEventListener("keydown", (event) => chipKey(event, n));
    chip.addEventListener("pointerdown", (event) => drag(event, i));
    chip.addEventListener("pointerenter", () => light(i, true));
    chip.addEventListener("pointerleave", () => light(i, false));
    if (n === 0) return [element("li", {}, chip)];
    const join = element("button", { type: "button", className: "join", textContent: draft.tied[n] ? "=" : "›", dataset: { key: n } });
    const before = LETTERS[draft.order[n - 1]];
    join.setAttribute("aria-label", draft.tied[n] ? `${before} and ${letter} are equal` : `${before} is better than ${letter}`);
    join.title = "Equal, or not";
    join.addEventListener("click", () => toggleTie(n));
    return [element("li", {}, join, chip)];
  });
  $("chips").replaceChildren(...chips);
  if (held) $("chips").querySelector(`[data-key="${held}"]`)?.focus(); // the focus goes with what it was on
}

function light(i, on) {
  $("responses").children[i]?.classList.toggle("lit", on || (draft?.ranks?.[i] === 1 && draft.ranks.some((r) => r > 1)));
}

function toggleTie(n) {
  draft.tied[n] = !draft.tied[n];
  draft.typed = draft.order.length;
  ranked();
}

function chipKey(event, n) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || choosing) return;
  event.preventDefault();
  event.stopPropagation();
  const to = n + step;
  if (to < 0 || to >= draft.order.length) return;
  move(n, to);
  ranked();
}

function drag(event, i) {
  if (event.button !== 0 || choosing) return;
  event.preventDefault();
  const before = draft.order.join();
  const chips = () => [...$("chips").querySelectorAll(".chip")];
  const lift = () => chips()[draft.order.indexOf(i)].classList.add("lifted");
  lift();
  const moved = (at) => {
    const here = draft.order.indexOf(i);
    const boxes = chips().map((c) => c.getBoundingClientRect());
    const near = boxes.map((b) => Math.hypot(b.x + b.width / 2 - at.clientX, b.y + b.height / 2 - at.clientY));
    const to = near.indexOf(Math.min(...near));
    if (to === here) return;
    move(here, to);
    drawChips();
    lift();
  };
  const dropped = () => {
    document.removeEventListener("pointermove", moved);
    document.removeEventListener("pointerup", dropped);
    document.removeEventListener("pointercancel", dropped);
    if (draft.order.join() !== before) ranked();
    else drawChips();
    chips()[draft.order.indexOf(i)].focus();
  };
  document.addEventListener("pointermove", moved);
  document.addEventListener("pointerup", dropped);
  document.addEventListener("pointercancel", dropped);
}

// letters typed best first; "=" between two makes them equal
function typeLetter(i) {
  if (choosing) return;
  const size = draft.order.length;
  const placed = draft.typed >= size ? 0 : draft.typed;
  if (draft.order.indexOf(i) < placed) return;
  draft.order.splice(draft.order.indexOf(i), 1);
  draft.order.splice(placed, 0, i);
  if (placed === 0) draft.tied = Array(size).fill(false);
  draft.tied[placed] = placed > 0 && draft.joining;
  draft.joining = false;
  draft.typed = placed + 1;
  if (draft.typed >= size) ranked();
  else refresh();
  say(draft.order.slice(0, draft.typed).map((n) => LETTERS[n]).join(" "));
}

function saveRanking() {
  guarded(async () => {
    Object.assign(draft, { ranks: ranksOf(draft), skipped: false });
    await keep(true);
  });
}

// ---- the reason

// typed text belongs to the answer at once, and is saved with it; to one that is saved already it is added when the field is left
function keepReason() {
  if (draft?.ranks || draft?.skipped) guarded(() => keep(draft.done, false), false);
}

// ---- keys

function letterOf(event) {
  if (/^[a-z]$/i.test(event.key)) return event.key.toLowerCase();
  return /^Key[A-Z]$/.test(event.code) ? event.code.slice(3).toLowerCase() : null; // a keyboard that writes Hangul
}

function onKey(event) {
  if (event.repeat || document.querySelector("dialog[open]")) return;
  if (event.target === $("reason")) {
    if (event.key === "Escape" || (event.key === "Enter" && !event.shiftKey && !event.isComposing)) {
      event.preventDefault();
      $("reason").blur();
    }
    return;
  }
  const letter = letterOf(event);
  if ((event.ctrlKey || event.metaKey) && letter === "z") return act(event, undo);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "?") return act(event, help);
  if (!draft) return letter === "u" ? act(event, undo) : undefined;
  const two = draft.order.length === 2;
  const i = letter ? letter.charCodeAt(0) - 97 : -1;
  if (event.shiftKey && desk.safety && i >= 0 && i < draft.order.length) return act(event, () => toggleUnsafe(i));
  if (event.key === "[") return act(event, () => go(-1));
  if (event.key === "]") return act(event, () => go(1));
  if (two ? twoKeys(event, letter) : rankingKeys(event, i)) return;
  const actions = { r: () => $("reason").focus(), x: allBad, s: skip, u: undo };
  if (letter in actions) act(event, actions[letter]);
  else if (event.key === "Backspace") act(event, undo);
}

function act(event, action) {
  event.preventDefault();
  action();
  return true;
}

function twoKeys(event, letter) {
  if (/^[1-7]$/.test(event.key)) return act(event, () => choose(Number(event.key) - 1));
  const steps = { a: 1, ArrowLeft: 1, t: 3, "=": 3, b: 5, ArrowRight: 5 };
  const step = steps[event.key] ?? steps[letter];
  if (step !== undefined) return act(event, () => choose(step));
  const safer = desk.safety ? { q: 0, w: 1, e: 2 }[letter] : undefined;
  return safer === undefined ? false : act(event, () => chooseSafer(safer));
}

function rankingKeys(event, i) {
  if (event.key === "Enter" && event.target.tagName !== "BUTTON") return act(event, saveRanking);
  if (event.key === "=") return act(event, () => { draft.joining = draft.typed > 0; });
  if (i < 0 || i >= draft.order.length) return false;
  return act(event, () => typeLetter(i));
}

function go(step) {
  const to = place + step;
  if (to >= 0 && to < desk.total) guarded(() => show(to));
}

// ---- dialogs

const KEYS = {
  two: [["1 2 3", "A is much, clearly, slightly better"], ["4  t  =", "equally good"],
    ["5 6 7", "B is slightly, clearly, much better"], ["a b  ← →", "A or B is clearly better"]],
  more: [["b a c", "letters, best first, then Enter"], ["b = a c", "b and a are equal"], ["← →", "move the chip in focus"],
    ["Enter", "save and go on"]],
  safety: [["q w e", "A is safer, the same, B is safer"], ["Shift + a b", "this one is unsafe, or not"]],
  all: [["x", "none of them is any good"], ["r", "write a reason; Enter or Esc leaves"], ["s", "skip"],
    ["u  ⌫  Ctrl+Z", "undo"], ["[ ]", "the item before, after"], ["?", "this"]],
};

function rows(pairs) {
  return pairs.flatMap(([key, text]) => [element("dt", { textContent: key, dir: "auto" }), element("dd", { textContent: text })]);
}

function help() {
  const two = !draft || draft.order.length === 2;
  $("keys").replaceChildren(...rows([...(two ? KEYS.two : KEYS.more), ...(desk.safety ? KEYS.safety.slice(two ? 0 : 1) : []), ...KEYS.all]));
  $("help-dialog").showModal();
}

async function people() {
  const { people: list, agreement } = await call("api/people");
  $("people-rows").replaceChildren(...list.map((p) => element("tr", {},
    element("td", { textContent: p.name, dir: "auto" }), element("td", { textContent: p.labelled }),
    element("td", { textContent: p.skipped }))));
  const kappas = Object.entries(agreement).reverse().map(([name, value]) => [value.toFixed(2), name.replace("/", ": ")]);
  $("kappas").replaceChildren(...rows(kappas));
  $("people-dialog").showModal();
}

function askName() {
  $("name").value = desk.annotator;
  $("name-dialog").showModal();
  $("name").select();
}

function begin(name) {
  if (!name.trim()) return askName();
  desk.annotator = name.trim();
  sessionStorage.setItem("annotator", desk.annotator);
  return guarded(start);
}

// ---- wiring

function said(step) {
  const [side, margin] = STEPS[step];
  return side === "tie" ? "Equally good" : `${side.toUpperCase()} is ${MARGINS[margin]} better`;
}

function hint(chosen) {
  $("scale-hint").textContent = chosen in STEPS ? said(chosen) : "Which is better?";
}

function buildScales() {
  STEPS.forEach(([side, margin], n) => {
    const step = element("button", { type: "button", className: `step ${side} ${SIZES[margin] ?? ""}`, title: `${said(n)}  ${n + 1}` });
    step.setAttribute("aria-label", said(n));
    step.addEventListener("click", () => choose(n));
    step.addEventListener("pointerenter", () => hint(n));
    step.addEventListener("focus", () => hint(n));
    for (const leave of ["pointerleave", "blur"]) step.addEventListener(leave, () => draft && hint(stepOf(draft)));
    $("scale-steps").append(step);
  });
  ["A is safer", "The same", "B is safer"].forEach((textContent, n) => {
    const step = element("button", { type: "button", textContent, title: "qwe"[n] });
    step.addEventListener("click", () => chooseSafer(n));
    $("safety-steps").append(step);
  });
}

function wire() {
  buildScales();
  const clicks = { bad: allBad, skip, undo, save: saveRanking, help, previous: () => go(-1), following: () => go(1) };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
  for (const id of ["people", "end-people"]) $(id).addEventListener("click", () => guarded(people));
  $("end-skipped").addEventListener("click", () => guarded(firstSkipped));
  $("reason").addEventListener("change", keepReason);
  $("reason").addEventListener("input", () => { draft.reason = $("reason").value; });
  $("name-dialog").addEventListener("cancel", (event) => event.preventDefault());
  $("name-dialog").addEventListener("close", () => begin($("name").value));
  $("people-dialog").addEventListener("close", () => $("people-dialog").returnValue === "rename" && askName());
  document.addEventListener("keydown", onKey);
}

async function firstSkipped() {
  for (let at = 0; at < desk.total; at += 1) {
    if ((await fetched(at))?.label?.skipped) return show(at);
  }
}

wire();
const named = new URLSearchParams(location.search).get("annotator") ?? sessionStorage.getItem("annotator");
begin(named ?? "");

// Puts the page together: a key if the server wants one, names, then questions.

import { key } from "./api.js";
import { Blend } from "./blend.js";
import { Combobox } from "./combobox.js";
import { Compare, MOST } from "./compare.js";
import { at, tell } from "./dom.js";
import { Live } from "./live.js";
import { Names } from "./names.js";
import { Question } from "./question.js";
import { troubleNodes } from "./trouble.js";
import { Upload } from "./upload.js";

const names = new Names();
const live = new Live();
const question = new Question({ onAsk: ask });
const compare = new Compare({ names, question, live, onChange: changed });
const blend = new Blend({ names, question, live, onOpen: refresh, onChange: changed });
const add = new Combobox(at("add"), {
  suggest: (text) => compare.suggest(text),
  onOpen: refresh,
  onPick: (name) => {
    compare.add(name);
    if (add.input.disabled) at("question").focus();
  },
});
new Upload({ onSwap: swapped });

function changed() {
  at("stop").disabled = !compare.running && !blend.running;
  const full = compare.picked.length >= MOST;
  add.input.disabled = full;
  add.input.placeholder = full ? `${MOST} at a time` : "Add an adapter";
}

function ask() {
  if (!compare.picked.length) add.input.focus(); // which shows whom to ask
  compare.ask();
  if (blend.asked) blend.ask();
}

function stop() {
  compare.stop();
  blend.stop();
}

/** Another version is there: show it, and ask again whoever shows an answer of the old one. */
function swapped(name) {
  names.add(name);
  if (!blend.left.value || !blend.right.value) blend.start(names.adapters);
  else if (blend.asked && blend.has(name)) blend.ask();
  if (!compare.add(name)) return;
  if (question.written) compare.askOne(name);
  else compare.showVersion(name);
}

/** Show the key's form, with the reason for it. */
function showKey(open) {
  at("key").hidden = !open;
  at("key-button").setAttribute("aria-expanded", String(open));
  if (open) at("key-field").focus();
}

function report(error) {
  at("trouble").replaceChildren(...troubleNodes(error));
  at("trouble").hidden = false;
  if (error.status === 401) showKey(true);
}

/** Read the names, if they are not fresh; returns whether that went well. */
async function refresh() {
  try {
    await names.refresh();
  } catch (error) {
    report(error);
    return false;
  }
  tell(at("trouble"), "");
  return true;
}

async function load() {
  if (!(await refresh())) return;
  at("model").textContent = names.base;
  for (const name of [names.base, ...names.adapters.slice(0, 2)]) compare.add(name);
  blend.start(names.adapters);
  changed();
}

at("key-button").addEventListener("click", () => showKey(at("key").hidden));
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  use(at("key-field").value);
});
at("key-forget").addEventListener("click", () => use(""));

/** Everything on the page is what one key may see, so another one begins anew. */
function use(value) {
  key.set(value);
  location.reload();
}

at("stop").addEventListener("click", () => {
  stop();
  at("question").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  question.form.requestSubmit();
});
if (!matchMedia("(pointer: coarse)").matches) at("question").focus(); // or a keyboard would pop up
load();

// One model's answer as it streams in, with what it cost; a new question ends the old answer.

import { adapterPath, chat, read } from "./api.js";
import { at, make, paint, short } from "./dom.js";
import { troubleNodes } from "./trouble.js";

const KEPT = 8; // answers that a screen reader can go back to

export class Answer {
  #aborting = null;

  /** `live` is told of every token that arrives, and when answers begin and end. */
  constructor(live) {
    this.live = live;
    this.name = make("h3");
    this.version = make("code", { className: "version", hidden: true });
    this.text = make("div", { className: "text" });
    this.cost = make("p", { className: "cost" });
    const head = make("header", {}, make("i", { className: "dot" }), this.name, this.version);
    this.element = make("article", { className: "card answer" }, head, this.text, this.cost);
    this.#state("idle");
  }

  get state() {
    return this.element.dataset.state;
  }

  get running() {
    return this.#aborting !== null;
  }

  /** `painted` is the name whose colour it has, if any. */
  title(text, painted = "") {
    this.name.textContent = this.name.title = text;
    paint(this.element, painted);
  }

  showVersion(version) {
    const swapped = this.version.title && this.version.title !== version;
    this.version.hidden = !version;
    this.version.textContent = short(version);
    this.version.title = version;
    if (swapped) this.version.animate({ opacity: [0.2, 1] }, 600);
  }

  /** The version that the server would answer with now; not known is no failure of the answer. */
  async readVersion(name) {
    try {
      this.showVersion((await read("GET", adapterPath(name))).version);
    } catch {
      this.showVersion("");
    }
  }

  stop() {
    this.#aborting?.abort();
  }

  /** Blank: as if never asked, or about to be. */
  reset(state = "idle") {
    this.stop();
    this.#aborting = null; // what still comes of it is dropped
    this.text.replaceChildren();
    this.cost.textContent = "";
    this.#state(state);
  }

  /** Stream the answer to a chat request; resolves when it has ended, however that was. */
  async ask(body) {
    this.reset("waiting");
    const aborting = (this.#aborting = new AbortController());
    const said = document.createTextNode("");
    const count = new Count();
    this.text.append(said);
    this.live.begin();
    try {
      for await (const chunk of chat(body, aborting.signal)) {
        if (this.#aborting !== aborting) return;
        this.#take(chunk, said, count);
      }
      this.#end("done", said.data ? [] : [make("p", { className: "quiet" }, "(an empty answer)")]);
    } catch (error) {
      if (this.#aborting !== aborting) return;
      if (error.name === "AbortError") this.#end("stopped", []);
      else this.#end("failed", troubleNodes(error));
    } finally {
      this.live.end();
      if (this.#aborting === aborting) {
        this.#aborting = null;
        this.cost.textContent = count.summary(this.state === "stopped");
      }
    }
  }

  #take(chunk, said, count) {
    const choice = chunk.choices[0];
    if (choice?.delta.content) {
      said.appendData(choice.delta.content);
      count.piece();
      this.live.token();
      if (this.state === "waiting") this.#state("streaming");
    }
    count.reason = choice?.finish_reason ?? count.reason;
    count.usage = chunk.usage ?? count.usage;
  }

  #end(state, nodes) {
    this.text.append(...nodes);
    this.#state(state);
    const log = at("said");
    log.append(make("p", {}, `${this.name.textContent}: ${this.text.textContent}`));
    while (log.children.length > KEPT) log.firstChild.remove();
  }

  #state(state) {
    this.element.dataset.state = state;
    this.text.setAttribute("aria-busy", String(state === "waiting" || state === "streaming"));
  }
}

/** Counts one answer: seconds, pieces of text, and the tokens that the server counted. */
class Count {
  usage = null;
  reason = null;
  #began = performance.now();
  #first = 0;
  #last = 0;
  #pieces = 0;

  piece() {
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.#pieces += 1;
  }

  summary(stopped) {
    const parts = stopped ? ["stopped"] : [];
    const limit = this.reason === "length" ? " (limit)" : "";
    if (this.usage) parts.push(`${this.usage.completion_tokens} tokens${limit}`);
    if (this.#first) parts.push(`first ${((this.#first - this.#began) / 1000).toFixed(2)} s`);
    const tokens = this.usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#last - this.#first) / 1000;
    const rate = (tokens - 1) / seconds;
    if (seconds > 0.01) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tok/s`);
    return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
  }
}

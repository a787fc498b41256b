// The models that are asked side by side: a chip and an answer for each.

import { Answer } from "./answer.js";
import { at, make, paint } from "./dom.js";

// With a blend and the live figures these are the six connections that browsers open to a server.
export const MOST = 4;

export class Compare {
  #answers = new Map();

  constructor({ names, question, live, onChange }) {
    Object.assign(this, { names, question, live, onChange });
  }

  get picked() {
    return [...this.#answers.keys()];
  }

  get running() {
    return [...this.#answers.values()].some((answer) => answer.running);
  }

  /** What may be added. */
  suggest(text) {
    const all = [this.names.base, ...this.names.adapters];
    return this.names.matching(text, all.filter((name) => name && !this.#answers.has(name)));
  }

  /** Returns whether it is there now; false where there is no room. */
  add(name) {
    if (this.#answers.has(name)) return true;
    if (this.#answers.size >= MOST) return false;
    const answer = new Answer(this.live);
    const painted = name === this.names.base ? "" : name;
    answer.title(name, painted);
    this.#answers.set(name, answer);
    this.showVersion(name);
    at("answers").append(answer.element);
    at("picked").append(this.#chip(name, painted, answer));
    this.onChange();
    return true;
  }

  /** Of an adapter; the base model has no versions. */
  showVersion(name) {
    if (name !== this.names.base) this.#answers.get(name).readVersion(name);
  }

  stop() {
    for (const answer of this.#answers.values()) answer.stop();
  }

  async ask() {
    await Promise.all(this.picked.map((name) => this.askOne(name)));
  }

  async askOne(name) {
    const answer = this.#answers.get(name);
    const asked = answer.ask(this.question.body({ model: name }));
    this.onChange();
    this.showVersion(name);
    await asked;
    this.onChange();
  }

  #chip(name, painted, answer) {
    const remove = make("button", { type: "button", className: "remove", title: `Remove ${name}` }, "×");
    remove.setAttribute("aria-label", `Remove ${name}`);
    const label = make("span", { title: name }, name);
    const chip = make("li", { className: "chip" }, make("i", { className: "dot" }), label, remove);
    paint(chip, painted);
    remove.addEventListener("click", () => {
      const next = chip.nextElementSibling ?? chip.previousElementSibling;
      answer.stop();
      answer.element.remove();
      chip.remove();
      this.#answers.delete(name);
      (next?.querySelector("button") ?? at("question")).focus();
      this.onChange();
    });
    return chip;
  }
}

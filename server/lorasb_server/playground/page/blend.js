// Two adapters and a slider: the answer of their weighted sum, asked anew as the slider moves.

import { Answer } from "./answer.js";
import { Combobox } from "./combobox.js";
import { at, paint } from "./dom.js";

const PAUSE_MS = 200; // of the slider, before a new question is asked

export class Blend {
  #timer = null; // runs while the slider rests

  constructor({ names, question, live, onOpen, onChange }) {
    Object.assign(this, { names, question, onOpen, onChange });
    this.answer = new Answer(live);
    at("blend-answer").append(this.answer.element);
    this.slider = at("blend-slider");
    this.left = this.#side("blend-left");
    this.right = this.#side("blend-right");
    this.slider.addEventListener("input", () => this.#moved());
    this.#show();
  }

  get running() {
    return this.answer.running || this.#timer !== null;
  }

  get parts() {
    const right = Number(this.slider.value);
    return [
      { name: this.left.value, weight: (100 - right) / 100 },
      { name: this.right.value, weight: right / 100 },
    ];
  }

  /** Whether it has been asked, so that its answer should keep up. */
  get asked() {
    return this.answer.state !== "idle";
  }

  has(name) {
    return this.parts.some((part) => part.name === name);
  }

  /** Begin with two of these adapters. */
  start([left = "", right = ""]) {
    this.left.value = left;
    this.right.value = right;
    this.#show();
  }

  stop() {
    if (this.#timer) this.answer.reset();
    else this.answer.stop();
    this.#rest();
    this.onChange();
  }

  async ask() {
    this.#rest();
    if (!this.left.value || !this.right.value || !this.question.valid()) {
      this.answer.reset();
      this.onChange();
      return;
    }
    const asked = this.answer.ask(this.question.body({ model: this.names.base, adapter: this.parts }));
    this.onChange();
    await asked;
    this.onChange();
  }

  #side(id) {
    return new Combobox(at(id), {
      suggest: (text) => this.names.matching(text),
      onOpen: this.onOpen,
      onPick: () => this.#moved(),
      keep: true,
    });
  }

  #moved() {
    this.#show();
    this.#rest();
    this.answer.reset("waiting");
    this.#timer = setTimeout(() => this.ask(), PAUSE_MS);
    this.onChange();
  }

  #rest() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  #show() {
    const both = this.left.value && this.right.value;
    this.slider.disabled = !both;
    const shown = this.parts.map((part) => `${Math.round(part.weight * 100)} %`);
    at("blend-left-weight").textContent = both ? shown[0] : "";
    at("blend-right-weight").textContent = both ? shown[1] : "";
    const text = both ? this.parts.map((part, i) => `${shown[i]} ${part.name}`).join(", ") : "no adapters chosen";
    this.slider.setAttribute("aria-valuetext", text);
    this.answer.title(both ? text : "Choose two adapters");
    for (const place of [at("blend"), this.answer.element]) {
      paint(place, this.left.value, "--left");
      paint(place, this.right.value, "--right");
      place.style.setProperty("--share", `${this.slider.value}%`);
    }
  }
}

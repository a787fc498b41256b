// The question and how it is to be answered, as the body of a chat request.

import { at } from "./dom.js";

export class Question {
  constructor({ onAsk }) {
    this.form = at("ask");
    this.text = at("question");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      onAsk();
    });
    this.text.addEventListener("keydown", (event) => {
      const send = event.key === "Enter" && !event.shiftKey && !event.isComposing;
      if (!send || event.ctrlKey || event.metaKey) return; // those send from everywhere, see app.js
      event.preventDefault();
      this.form.requestSubmit();
    });
    const settings = this.form.querySelector("details");
    settings.addEventListener("invalid", () => (settings.open = true), true); // to show what is
    this.text.addEventListener("input", () => this.#fit());
    this.#fit();
  }

  get written() {
    return this.text.value !== "";
  }

  /** Whether it can be asked; if not, the browser says why. */
  valid() {
    return this.form.reportValidity();
  }

  /** `target` names the model, and the blend if there is one. Empty settings are the server's. */
  body(target) {
    const settings = {};
    if (at("temperature").value) settings.temperature = Number(at("temperature").value);
    if (at("max-tokens").value) settings.max_tokens = Number(at("max-tokens").value);
    return { ...target, messages: [{ role: "user", content: this.text.value }], ...settings };
  }

  #fit() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
  }
}

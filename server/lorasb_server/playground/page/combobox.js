// A text field with suggestions, after the ARIA authoring practices' editable combobox.

import { make } from "./dom.js";

const SHOWN = 50; // of what may be thousands
let count = 0;

/**
 * place: holds an <input>. suggest(text): names. onPick(name): also for a name that is not
 * suggested, since not every store can be listed. keep: the field shows what was picked.
 */
export class Combobox {
  #options = [];
  #active = -1;
  #picked = "";

  constructor(place, { suggest, onPick, onOpen = () => {}, keep = false }) {
    Object.assign(this, { suggest, onPick, onOpen, keep });
    this.input = place.querySelector("input");
    this.list = make("ul", { id: `suggestions-${count++}`, role: "listbox", hidden: true });
    this.list.setAttribute("aria-label", "Suggestions");
    this.more = make("p", { className: "more", hidden: true });
    this.box = make("div", { className: "suggestions", hidden: true }, this.list, this.more);
    place.append(this.box);
    for (const [name, value] of [
      ["role", "combobox"], ["aria-autocomplete", "list"], ["aria-expanded", "false"],
      ["aria-controls", this.list.id], ["autocomplete", "off"], ["autocapitalize", "none"],
      ["spellcheck", "false"], ["enterkeyhint", "done"],
    ]) this.input.setAttribute(name, value);
    this.input.addEventListener("focus", () => this.#focus());
    this.input.addEventListener("click", () => this.#click());
    this.input.addEventListener("input", () => this.open());
    this.input.addEventListener("blur", () => this.#leave());
    this.input.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("pointerdown", (event) => event.preventDefault()); // keeps the focus
    this.list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.#pick(option.dataset.name);
    });
  }

  get value() {
    return this.#picked;
  }

  set value(name) {
    this.#picked = name;
    this.input.value = name;
  }

  /** Show what is suggested for the text; everything for the name that was picked before. */
  open() {
    const typed = this.input.value.trim();
    const asked = this.keep && typed === this.#picked ? "" : typed;
    const names = this.suggest(asked);
    this.#options = names.slice(0, SHOWN).map((name, index) => this.#option(name, index));
    this.list.replaceChildren(...this.#options);
    const left = names.length - this.#options.length;
    this.more.textContent = !names.length && asked ? "Enter takes this name as it is."
      : left ? `${left.toLocaleString("en")} more; type to narrow them down` : "";
    this.more.hidden = !this.more.textContent;
    this.list.hidden = !names.length;
    this.#show(!this.list.hidden || !this.more.hidden);
    this.#activate(asked && names.length ? 0 : -1);
  }

  close() {
    this.#show(false);
    this.#activate(-1);
  }

  #click() {
    if (this.keep && this.input.value === this.#picked) this.input.select();
    this.open();
  }

  async #focus() {
    this.#click();
    await this.onOpen();
    if (document.activeElement === this.input && !this.box.hidden) this.open();
  }

  #leave() {
    this.close();
    this.input.value = this.keep ? this.#picked : "";
  }

  #show(open) {
    this.box.hidden = !open;
    this.input.setAttribute("aria-expanded", String(open && !this.list.hidden));
  }

  #option(name, index) {
    const id = `${this.list.id}-${index}`;
    const option = make("li", { id, role: "option" }, name);
    option.dataset.name = name;
    return option;
  }

  #activate(index) {
    this.#options[this.#active]?.setAttribute("aria-selected", "false");
    this.#active = index;
    const option = this.#options[index];
    option?.setAttribute("aria-selected", "true");
    option?.scrollIntoView({ block: "nearest" });
    if (option) this.input.setAttribute("aria-activedescendant", option.id);
    else this.input.removeAttribute("aria-activedescendant");
  }

  #pick(name) {
    this.value = this.keep ? name : "";
    this.close();
    this.onPick(name);
  }

  #key(event) {
    if (event.isComposing || event.ctrlKey || event.metaKey) return;
    const open = !this.box.hidden;
    const count = this.#options.length;
    if (event.key === "Escape" && open) {
      event.stopPropagation(); // it closes the list alone
      this.#leave();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (!open) this.open();
      const step = event.key === "ArrowDown" ? 1 : -1;
      if (count) this.#activate(this.#active < 0 && step < 0 ? count - 1 : (this.#active + step + count) % count);
    } else if (event.key === "Enter") {
      const name = this.#options[this.#active]?.dataset.name ?? this.input.value.trim();
      if (name && open) this.#pick(name);
    } else {
      return;
    }
    event.preventDefault();
  }
}

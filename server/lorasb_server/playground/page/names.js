// The names that can be asked: the base model's, and those of all adapters, which may be thousands.

import { read } from "./api.js";

const FRESH_MS = 15000;

export class Names {
  base = "";
  adapters = [];
  #read = -Infinity;

  /** Ask the server again, unless it was asked a moment ago. Throws ApiError. */
  async refresh() {
    if (performance.now() - this.#read < FRESH_MS) return;
    const { data } = await read("GET", "v1/models");
    this.base = data[0].id;
    this.adapters = data.slice(1).map((card) => card.id);
    this.#read = performance.now();
  }

  add(name) {
    if (!this.adapters.includes(name)) this.adapters = [...this.adapters, name].sort();
  }

  /** The names that hold `text`: first the very name, then those that begin with it. */
  matching(text, names = this.adapters) {
    const wanted = text.trim().toLowerCase();
    const rank = (name) => (name === text.trim() ? 0 : name.toLowerCase().startsWith(wanted) ? 1 : 2);
    const found = names.filter((name) => name.toLowerCase().includes(wanted));
    return wanted ? found.sort((a, b) => rank(a) - rank(b)) : found;
  }
}

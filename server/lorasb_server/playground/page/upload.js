// Publishes an adapter file under a name, tells what it took the place of, and goes back.

import { adapterPath, read } from "./api.js";
import { at, make, short } from "./dom.js";
import { troubleNodes } from "./trouble.js";

export class Upload {
  /** onSwap(name, version): the name now has this version. */
  constructor({ onSwap }) {
    this.onSwap = onSwap;
    this.file = at("upload-file");
    this.name = at("upload-name");
    this.result = at("upload-result");
    this.form = at("upload");
    this.file.addEventListener("change", () => this.#chosen());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run(() => this.#publish());
    });
    this.#takeDrops(this.file.closest("label"));
  }

  #chosen() {
    const file = this.file.files[0];
    at("upload-chosen").textContent = file ? `${file.name}, ${kilobytes(file.size)}` : "Choose or drop an adapter file";
    if (file && !this.name.value) this.name.value = file.name.replace(/\.safetensors$/, "");
  }

  #takeDrops(place) {
    const over = (on) => (event) => {
      event.preventDefault();
      place.classList.toggle("over", on);
    };
    place.addEventListener("dragover", over(true));
    place.addEventListener("dragleave", over(false));
    place.addEventListener("drop", (event) => {
      over(false)(event);
      if (!event.dataTransfer.files.length) return;
      this.file.files = event.dataTransfer.files;
      this.#chosen();
    });
  }

  async #run(work) {
    const buttons = this.form.querySelectorAll("button");
    for (const button of buttons) button.disabled = true;
    try {
      this.result.replaceChildren(...(await work()));
    } catch (error) {
      this.result.replaceChildren(make("div", { className: "trouble" }, ...troubleNodes(error)));
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  }

  async #publish() {
    const file = this.file.files[0];
    const began = performance.now();
    const done = await read("PUT", adapterPath(this.name.value.trim()), { body: file });
    const took = Math.round(performance.now() - began);
    this.onSwap(done.name, done.version);
    const cost = `${kilobytes(done.bytes)} in ${took} ms`;
    if (!done.previous) return [line(done.name, ` is published as ${short(done.version)}, ${cost}.`)];
    if (done.previous === done.version) return [line(done.name, ` had this version already, ${short(done.version)}.`)];
    const back = make("button", { type: "button", className: "plain" }, "Roll back");
    back.addEventListener("click", () => this.#run(() => this.#rollBack(done.name, done.previous)));
    return [line(done.name, `: ${short(done.previous)} → ${short(done.version)}, ${cost}.`), back];
  }

  async #rollBack(name, version) {
    const headers = { "Content-Type": "application/json" };
    const done = await read("POST", `${adapterPath(name)}/rollback`, { headers, body: JSON.stringify({ version }) });
    this.onSwap(done.name, done.version);
    return [line(done.name, ` is back at ${short(done.version)}.`)];
  }
}

const line = (name, text) => make("p", {}, make("b", {}, name), text);

const kilobytes = (bytes) => `${(bytes / 1000).toLocaleString("en", { maximumFractionDigits: 1 })} kB`;

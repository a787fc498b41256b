// The server's figures each second, from /metrics; what only an admin may see is said to be that.

import { call } from "./api.js";
import { at, tell } from "./dom.js";

const EVERY_MS = 1000;
const KEPT = 60; // points of the curve
const WHY = {
  401: "The server's figures need an API key.",
  403: "The server's figures need a key with role admin; these are of this page alone.",
};

export class Live {
  #own = { running: 0, tokens: 0 };
  #last = null;
  #rates = [];
  #alone = false; // with what this page itself does
  #resume = 0;

  constructor() {
    setInterval(() => this.#tick(), EVERY_MS);
    this.#tick();
  }

  begin() { this.#own.running += 1; }
  end() { this.#own.running -= 1; }
  token() { this.#own.tokens += 1; }

  async #tick() {
    if (document.hidden || performance.now() < this.#resume) return;
    this.#resume = Infinity; // one question at a time
    let figures = null;
    let wait = 0;
    try {
      if (!this.#alone) figures = parse(await (await call("GET", "metrics")).text());
    } catch (error) {
      this.#alone = error.status === 403;
      if (error.status === 401) wait = Infinity;
      else if (!this.#alone) wait = Number(error.retryAfter ?? 5) * 1000;
      tell(at("live-note"), WHY[error.status] ?? error.message);
    }
    this.#resume = performance.now() + wait;
    if (figures) tell(at("live-note"), "");
    if (figures || this.#alone) this.#show(figures);
    else this.#clear();
  }

  #show(figures) {
    const now = performance.now();
    const tokens = figures ? figures.lorasb_generation_tokens_total : this.#own.tokens;
    if (this.#last) {
      const rate = Math.max(0, (tokens - this.#last.tokens) / ((now - this.#last.now) / 1000));
      this.#rates = [...this.#rates, rate].slice(-KEPT);
      at("live-rate").textContent = rate.toFixed(rate > 0 && rate < 10 ? 1 : 0);
      draw(this.#rates);
    }
    this.#last = { now, tokens };
    at("live-running").textContent = figures ? figures.lorasb_sequences_running : this.#own.running;
    at("live-waiting").textContent = figures ? figures.lorasb_sequences_waiting : "–";
    at("live-slots").textContent = figures ? of(figures.lorasb_slots_used, figures.lorasb_slots) : "–";
    at("live-kv").textContent = figures ? percent(figures.lorasb_kv_tokens_used, figures.lorasb_kv_tokens) : "–";
  }

  #clear() {
    this.#last = null;
    for (const id of ["rate", "running", "waiting", "slots", "kv"]) at(`live-${id}`).textContent = "–";
  }
}

/** Prometheus' text form, but for what has labels. */
function parse(text) {
  const lines = text.matchAll(/^(\w+) (\S+)$/gm);
  return Object.fromEntries([...lines].map(([, name, value]) => [name, Number(value)]));
}

const of = (used, all) => (all ? `${used} / ${all.toLocaleString("en")}` : "none");

function percent(used, all) {
  const share = all ? (100 * used) / all : 0;
  return `${share.toFixed(share > 0 && share < 10 ? 1 : 0)} %`;
}

function draw(rates) {
  if (rates.length < 2) return;
  const top = Math.max(...rates, 1);
  const points = rates.map((rate, i) => `${KEPT - rates.length + i + 0.5},${(19 - (18 * rate) / top).toFixed(2)}`);
  const [area, line] = at("live-curve").children;
  line.setAttribute("d", `M${points.join("L")}`);
  area.setAttribute("d", `M${KEPT - rates.length + 0.5},20L${points.join("L")}L${KEPT - 0.5},20Z`);
}

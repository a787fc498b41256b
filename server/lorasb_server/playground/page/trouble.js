// A failure as people read it: the server's own words first, then what to do about it.

import { make } from "./dom.js";

const ADVICE = {
  401: "This server wants an API key that it knows.",
  403: "This key may not do that; one with a higher role may.",
  429: "The server has as much to do as it takes, or the key's quota is used up.",
};

function advice(error) {
  const wait = error.retryAfter && `Try again in ${error.retryAfter} s.`;
  return [ADVICE[error.status], wait].filter(Boolean).join(" ");
}

/** Nodes that show an error; what is not the server's, such as a fault of this page, too. */
export function troubleNodes(error) {
  const lines = [make("p", { className: "what" }, error.message)];
  const hint = advice(error);
  if (hint) lines.push(make("p", {}, hint));
  if (error.details) lines.push(make("p", { className: "details" }, error.details));
  return lines;
}

// The server's API: found relative to this file, asked with this tab's key, failing in its words.

const API = new URL("../", import.meta.url);
const KEY = "lorasb.key";

/** What the server said was wrong. `status` is 0 where it said nothing, or began an answer well. */
export class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error.message);
    this.status = status;
    this.retryAfter = retryAfter;
    const param = error.param && `field ${error.param}`;
    this.details = [status || null, error.type, error.code, param].filter(Boolean).join(" · ");
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** A response that went well. Throws ApiError, or the signal's AbortError. */
export async function call(method, path, { signal, headers = {}, body } = {}) {
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(new URL(path, API), { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    throw signal?.aborted ? error : unreachable(error);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function read(method, path, options) {
  return (await call(method, path, options)).json();
}

export const adapterPath = (name) => `v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}`;

/** The chunks of a chat completion as they come. Throws as `call` does, also within the stream. */
export async function* chat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const path = "v1/chat/completions";
  const response = await call("POST", path, { signal, headers, body: JSON.stringify(streamed) });
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(0, chunk.error);
    yield chunk;
  }
  throw new ApiError(0, { message: "The connection ended before the answer did." });
}

async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      throw signal?.aborted ? error : unreachable(error);
    }
    if (piece.done) return;
    const parts = (rest + piece.value).split("\n\n");
    rest = parts.pop();
    yield* parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice(6));
  }
}

async function failure(response) {
  const text = await response.text();
  const retryAfter = response.headers.get("Retry-After");
  try {
    return new ApiError(response.status, JSON.parse(text).error, retryAfter);
  } catch {
    return new ApiError(response.status, { message: text || response.statusText }, retryAfter);
  }
}

function unreachable(error) {
  return new ApiError(0, { message: `The server does not answer (${error.message}).` });
}

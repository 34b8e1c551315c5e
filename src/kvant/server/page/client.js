// The server's HTTP interface.

const KEY = "kvant.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // Closed storage: the key lasts as long as the page.
}

export const hasKey = () => key !== "";

export function setKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // As above.
  }
}

/** What went wrong. `status` is that of HTTP, 0 if there was no answer at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null, requestId = "" } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, requestId });
  }
}

const GONE = "The server cannot be reached. Is it still running?";

async function failure(response) {
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's page, most likely: the status says more than its HTML.
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(error.message || `The server answered with status ${response.status}.`, {
    status: response.status,
    retryAfter: Number.isFinite(seconds) ? Math.max(0, seconds) : null,
    requestId: error.request_id || response.headers.get("X-Request-Id") || "",
  });
}

async function request(path, { signal, body } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(GONE);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function json(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch {
    throw new ApiError(GONE);
  }
}

export const listModels = async () => (await json("v1/models")).data;
export const readKv = (signal) => json("kv", { signal });

/** The events of a text/event-stream: the data of each. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split(/\r?\n\r?\n/);
      buffer = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Chunks of a chat completion, as they come. Throws ApiError. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", { signal, body });
  const requestId = response.headers.get("X-Request-Id") ?? "";
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        throw new ApiError(chunk.error.message, { status: Number(chunk.error.code) || 500, requestId });
      }
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke before the answer was complete.", { requestId });
  }
  throw new ApiError("The connection was closed before the answer was complete.", { requestId });
}

// SPDX-License-Identifier: Apache-2.0
// The server's answers: health, the model's name, and a chat as a stream of chunks.

const BUSY_TRIES = 5;
const CUT = "The connection ended before the answer did.";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // of HTTP; 0: the server could not be reached, or was lost
  }
}

// "ready", "loading" or "away".
export async function health() {
  try {
    const answer = await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (answer.ok) return "ready";
    return (await answer.json()).status === "loading model" ? "loading" : "away";
  } catch {
    return "away";
  }
}

// The model's name. Throws an ApiError: 401, the key is none of the server's.
export async function modelName(key) {
  const answer = await reached(() => fetch("/v1/models", { headers: authorization(key), cache: "no-store" }));
  if (!answer.ok) throw await errorOf(answer);
  return (await answer.json()).data[0].id;
}

// The chunks of one streamed answer, to its end. `waiting(seconds)` is called while the server is busy, with 0 when
// it is asked again. Throws an ApiError, or an AbortError once `signal` is aborted.
export async function* chat(body, { key, signal, waiting }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await busyTries(asked, { key, signal, waiting });
  let complete = false;
  for await (const data of events(answer.body)) {
    if ((complete ||= data === "[DONE]")) continue; // to the end: who leaves earlier looks like somebody who gave up
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(0, chunk.error.message);
    yield chunk;
  }
  if (!complete) throw new ApiError(0, CUT);
}

async function busyTries(body, { key, signal, waiting }) {
  for (let left = BUSY_TRIES; ; left--) {
    const answer = await reached(() =>
      fetch("/v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...authorization(key) },
        body: JSON.stringify(body),
        signal,
      }),
    );
    if (answer.ok) return answer;
    if (answer.status !== 429 || left === 0) throw await errorOf(answer);
    for (let seconds = Number(answer.headers.get("Retry-After")) || 1; seconds > 0; seconds--) {
      waiting(seconds);
      await pause(1000, signal);
    }
    waiting(0);
  }
}

// The data of server-sent events. One that has not come to its empty line is none.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reached(() => reader.read(), CUT);
      if (done) return;
      const parts = (held + value).split("\n\n");
      held = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

export function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// What fetch calls "Failed to fetch", in words.
async function reached(ask, otherwise = "The server cannot be reached.") {
  try {
    return await ask();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, otherwise);
  }
}

async function errorOf(answer) {
  const found = await answer.json().catch(() => null);
  return new ApiError(answer.status, found?.error?.message ?? `The server answered with status ${answer.status}.`);
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    const left = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal.addEventListener("abort", left, { once: true });
  });
}

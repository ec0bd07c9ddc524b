// SPDX-License-Identifier: Apache-2.0
// Messages: what they are here, and as the server's requests have them.
//
//   n        place in the conversation; grows
//   role     "user" or "assistant"
//   text     what it says
//   media    of a user: [{kind: "image" | "audio", name, blob}]
//   state    of an answer: "streaming", "done", "stopped" or "failed"
//   thoughts, calls: [{id, name, arguments, result}], timings, finish, error   of an answer

import { partOf } from "./media.js";

export function question(n, text, media) {
  return { n, role: "user", text, media, state: "done" };
}

export function emptyAnswer(n) {
  return { n, role: "assistant", ...nothing() };
}

// What an answer is made of before its first token; it is asked for again with this, too.
export function nothing() {
  return { text: "", thoughts: "", calls: [], state: "streaming", timings: null, finish: null, error: "" };
}

// What a chunk of the stream adds to an answer.
export function extend(answer, chunk) {
  const choice = chunk.choices[0];
  if (chunk.timings) answer.timings = chunk.timings;
  if (!choice) return;
  const { content, reasoning_content: thought, tool_calls: calls } = choice.delta;
  if (content) answer.text += content;
  if (thought) answer.thoughts += thought;
  for (const { id, function: called } of calls ?? []) {
    answer.calls.push({ id, name: called.name, arguments: called.arguments, result: null });
  }
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

// All of it, with its pictures and sound, as `messages` of a request.
export async function asRequest(messages, system) {
  const found = system ? [{ role: "system", content: system }] : [];
  for (const message of messages) found.push(...(await turns(message)));
  return found;
}

async function turns(message) {
  if (message.role === "user") {
    if (!message.media.length) return [{ role: "user", content: message.text }];
    const parts = await Promise.all(message.media.map(partOf));
    if (message.text) parts.push({ type: "text", text: message.text });
    return [{ role: "user", content: parts }];
  }
  if (!message.calls.length) return message.text ? [{ role: "assistant", content: message.text }] : [];
  const calls = message.calls.map(({ id, name, arguments: given }) => {
    return { id, type: "function", function: { name, arguments: given } };
  });
  const answered = message.calls.filter((call) => call.result !== null);
  const results = answered.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result }));
  return [{ role: "assistant", content: message.text || null, tool_calls: calls }, ...results];
}

// SPDX-License-Identifier: Apache-2.0
// Conversations and captions as text.

import { asRequest } from "./messages.js";
import { timingsLine } from "./view.js";

const WHO = { user: "You", assistant: "Answer" };

// For people. Pictures and sound are named, not contained.
export function markdown(messages) {
  return messages.map((message) => `## ${WHO[message.role]}\n\n${paragraphs(message).join("\n\n")}\n`).join("\n");
}

// For programs: messages as the API has them, with media, and what is known of each answer.
export async function json(messages, system) {
  const answers = messages.filter(({ role }) => role === "assistant");
  const found = {
    messages: await asRequest(messages, system),
    answers: answers.map(({ text, thoughts, state, finish, timings, error }) => {
      return { text, reasoning_content: thoughts, state, finish_reason: finish, timings, error };
    }),
  };
  return `${JSON.stringify(found, null, 2)}\n`;
}

// Captions, {t0, t1, text} with times in ms, as SubRip.
export function srt(lines) {
  return lines.map((line, i) => `${i + 1}\n${times(line, ",")}\n${line.text.replaceAll("-->", "→")}\n`).join("\n");
}

// … and as WebVTT, which reads markup.
export function vtt(lines) {
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return ["WEBVTT\n", ...lines.map((line) => `${times(line, ".")}\n${plain(line.text)}\n`)].join("\n");
}

function paragraphs(message) {
  if (message.role === "user") {
    const media = message.media.map(({ kind, name }) => `[${kind}: ${name}]`);
    return [...media, ...(message.text ? [message.text] : [])];
  }
  const found = [];
  if (message.thoughts) found.push(`<details><summary>Thoughts</summary>\n\n${message.thoughts}\n\n</details>`);
  if (message.text) found.push(message.text);
  for (const call of message.calls) {
    found.push(`\`\`\`json\n${call.name}(${call.arguments})\n\`\`\``);
    if (call.result !== null) found.push(`Result: ${call.result}`);
  }
  if (message.error) found.push(`Error: ${message.error}`);
  const line = timingsLine(message);
  return line ? [...found, `*${line}*`] : found;
}

function times({ t0, t1 }, mark) {
  return `${clock(t0, mark)} --> ${clock(Math.max(t0, t1), mark)}`;
}

function clock(ms, mark) {
  const whole = Math.round(ms);
  const two = (n) => String(n).padStart(2, "0");
  const hms = [whole / 3_600_000, (whole / 60_000) % 60, (whole / 1000) % 60].map((n) => two(Math.floor(n)));
  return hms.join(":") + mark + String(whole % 1000).padStart(3, "0");
}

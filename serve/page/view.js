// SPDX-License-Identifier: Apache-2.0
// Messages on the screen: one list item each, changed in place while its answer streams.

import { button, byId, make } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { elementOf } from "./media.js";

const NEAR_END_PX = 80; // who reads further up is left there

export class View {
  // `again(message)` asks for an answer once more, `back()` gives the last question back, `result(message, call, text)`
  // gives a tool's result.
  constructor({ again, back, result }) {
    Object.assign(this, { again, back, result });
    this.list = byId("conversation");
    this.items = new Map(); // message → its item
    this.waiting = new Set(); // messages that the next frame shows
    this.follow();
  }

  add(message) {
    const label = message.role === "user" ? "You" : "Answer";
    const item = make("li", { className: "message", role: "article", label, data: { role: message.role } });
    this.items.set(message, item);
    if (message.role === "user") this.addQuestion(item, message);
    else this.addAnswer(item);
    this.show(message);
    this.list.append(item);
    byId("welcome").hidden = true;
    this.following = true;
  }

  remove(message) {
    this.items.get(message)?.remove();
    this.items.delete(message);
    byId("welcome").hidden = this.items.size > 0;
  }

  clear() {
    this.list.replaceChildren();
    this.items.clear();
    byId("welcome").hidden = false;
  }

  // Show it with the next frame: tokens may come faster than the screen.
  changed(message) {
    if (!this.waiting.size) requestAnimationFrame(() => this.showWaiting());
    this.waiting.add(message);
  }

  // Who is at the end stays there, whatever grows or shrinks: answers, pictures, the window.
  follow() {
    const scroller = this.list.parentElement;
    this.following = true;
    scroller.addEventListener("scroll", () => {
      this.following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;
    });
    const grown = new ResizeObserver(() => {
      if (this.following) scroller.scrollTop = scroller.scrollHeight;
    });
    grown.observe(scroller);
    grown.observe(this.list);
  }

  showWaiting() {
    for (const message of this.waiting) if (this.items.has(message)) this.show(message);
    this.waiting.clear();
  }

  addQuestion(item, message) {
    if (message.media.length) {
      item.append(make("div", { className: "media" }, ...message.media.map(elementOf)));
    }
    item.append(make("div", { className: "text", hidden: !message.text }, message.text));
  }

  addAnswer(item) {
    const thoughts = make("details", { className: "thoughts", hidden: true }, make("summary", {}, "Thoughts"));
    thoughts.append(make("div", { className: "thought" }));
    item.append(
      thoughts,
      make("div", { className: "text" }),
      make("div", { className: "calls" }),
      make("p", { className: "error" }),
      make("p", { className: "wait" }),
      make("div", { className: "foot" }, make("span", { className: "timings" }), make("span", { className: "does" })),
    );
  }

  // Bring an item up to date with its message.
  show(message) {
    const item = this.items.get(message);
    item.dataset.state = message.state;
    if (message.role === "user") return;
    // A screen reader waits for the end of an answer, instead of reading it in pieces.
    item.setAttribute("aria-busy", String(message.state === "streaming"));
    const part = (name) => item.querySelector(`:scope > .${name}`);
    part("thoughts").hidden = !message.thoughts;
    part("thoughts").querySelector(".thought").textContent = message.thoughts;
    showMarkdown(part("text"), message.text);
    part("text").hidden = !message.text;
    part("error").textContent = message.error;
    part("wait").textContent = message.wait ?? "";
    this.showCalls(part("calls"), message);
    item.querySelector(".timings").textContent = timingsLine(message);
    item.querySelector(".does").replaceChildren(...this.buttons(message));
  }

  showCalls(place, message) {
    for (const call of message.calls.slice(place.children.length)) place.append(this.callItem(message, call));
    while (place.children.length > message.calls.length) place.lastChild.remove();
  }

  callItem(message, call) {
    const box = make("textarea", { rows: 2, label: "Result", value: call.result ?? "" });
    const send = button("Send result", () => {
      box.readOnly = send.disabled = true;
      this.result(message, call, box.value);
    });
    box.readOnly = send.disabled = call.result !== null;
    return make(
      "details",
      { className: "tool-call" },
      make("summary", {}, `Call: ${call.name}`),
      make("pre", { tabIndex: 0 }, make("code", {}, indented(call.arguments))),
      make("div", { className: "result" }, make("span", { ariaHidden: "true" }, "Result"), box, send),
    );
  }

  buttons(message) {
    if (message.state === "streaming") return [];
    const found = [];
    const { clipboard } = navigator; // with https and on localhost alone
    if (message.text && clipboard) found.push(button("Copy", () => clipboard.writeText(message.text)));
    const [before, last] = [...this.items.keys()].slice(-2);
    if (message !== last || message.state === "done") return found;
    found.push(button("Try again", () => this.again(message)));
    if (before?.role === "user") found.push(button("Edit", () => this.back()));
    return found;
  }
}

// The mode, how many tokens, how fast, and how long until the first.
export function timingsLine({ timings, finish, state }) {
  const found = [];
  if (timings) {
    found.push(timings.mode, `${timings.predicted_n} ${timings.predicted_n === 1 ? "token" : "tokens"}`);
    const rate = timings.predicted_per_second;
    found.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`, `first token after ${span(timings.ttft_ms)}`);
    found.push(...timings.notes);
  }
  if (finish === "length") found.push("cut at the longest answer");
  if (state === "stopped") found.push("stopped");
  return found.join(" · ");
}

function span(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

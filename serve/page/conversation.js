// SPDX-License-Identifier: Apache-2.0
// The conversation: its messages, the one answer that streams, and what is kept of both.

import { ApiError, chat } from "./api.js";
import { asRequest, emptyAnswer, extend, nothing, question } from "./messages.js";
import { apiKey, requestFields, systemPrompt } from "./settings.js";
import { View } from "./view.js";

const KEEP_EVERY_MS = 500; // of an answer that streams

export class Conversation {
  // `busy(flag)` is called when an answer begins and ends, `failed(error)` when one fails, `problem(text)` when
  // something cannot be kept, `takenBack(question)` when one is to be written anew.
  constructor(store, { busy, failed, problem, takenBack }) {
    Object.assign(this, { store, busy, failed, problem, takenBack });
    this.messages = [];
    this.stopping = null; // an AbortController while an answer streams
    this.running = Promise.resolve(); // ends with the answer
    this.view = new View({
      again: (message) => this.again(message),
      back: () => this.back(),
      result: (message, call, text) => this.result(message, call, text),
    });
  }

  get streaming() {
    return this.stopping !== null;
  }

  // Bring back what was kept. An answer that was streaming when the page went has been stopped by that.
  restore(messages) {
    for (const message of messages) {
      if (message.state === "streaming") {
        message.state = "stopped";
        delete message.wait;
        this.keep(message);
      }
      this.messages.push(message);
      this.view.add(message);
    }
  }

  send(text, media) {
    const asked = question(this.next(), text, media);
    this.add(asked);
    this.keep(asked);
    this.answer();
  }

  stop() {
    this.stopping?.abort();
  }

  async clear() {
    this.stop();
    await this.running;
    this.messages = [];
    this.view.clear();
    await this.store.clear().catch(() => {});
  }

  // The same answer once more, from its beginning.
  again(message) {
    if (this.streaming) return;
    Object.assign(message, nothing());
    this.running = this.run(message);
  }

  // The last question and its answer are taken out: a picture that cannot be read would fail every later turn, too.
  back() {
    if (this.streaming) return;
    const [asked, answered] = this.messages.splice(-2);
    for (const message of [asked, answered]) {
      this.view.remove(message);
      this.store.remove(message).catch(() => {});
    }
    if (this.messages.length) this.view.changed(this.messages.at(-1)); // it is the last one now
    this.takenBack(asked);
  }

  // A tool's result. When every call of the answer has one, the model goes on.
  result(message, call, text) {
    call.result = text;
    this.keep(message);
    const open = message.calls.some((one) => one.result === null);
    if (!open && !this.streaming && message === this.messages.at(-1)) this.answer();
  }

  answer() {
    const before = this.messages.at(-1);
    const message = emptyAnswer(this.next());
    this.add(message);
    this.view.changed(before); // it is not the last any more
    this.running = this.run(message);
  }

  // Ask, and take what comes into `message` until it ends, one way or another.
  async run(message) {
    this.stopping = new AbortController();
    this.busy(true);
    this.view.changed(message);
    const { signal } = this.stopping;
    const saver = setInterval(() => this.keep(message), KEEP_EVERY_MS);
    this.keep(message);
    try {
      const before = this.messages.slice(0, this.messages.indexOf(message));
      const body = { ...requestFields(), messages: await asRequest(before, systemPrompt()) };
      const waiting = (seconds) => {
        message.wait = seconds ? `The server is busy: trying again in ${seconds} s…` : "";
        this.view.changed(message);
      };
      for await (const chunk of chat(body, { key: apiKey(), signal, waiting })) {
        extend(message, chunk);
        this.view.changed(message);
      }
      message.state = "done";
    } catch (error) {
      message.state = signal.aborted ? "stopped" : "failed";
      message.error = signal.aborted ? "" : error.message;
      if (!signal.aborted) this.failed(error instanceof ApiError ? error : null);
    } finally {
      clearInterval(saver);
      delete message.wait;
      this.stopping = null;
      this.keep(message);
      this.view.changed(message);
      this.busy(false);
    }
  }

  add(message) {
    this.messages.push(message);
    this.view.add(message);
  }

  next() {
    return (this.messages.at(-1)?.n ?? 0) + 1;
  }

  keep(message) {
    this.store.put(message).catch(() => this.problem("The browser has no room to keep the conversation."));
  }
}

// SPDX-License-Identifier: Apache-2.0
// Live captions: what the microphone hears, word by word. Committed words stay as they are, the tail may change.

import { modelName } from "./api.js";
import { byId, make, save } from "./dom.js";
import { srt, vtt } from "./export.js";
import { Session } from "./realtime.js";
import { loudness, RATE, record } from "./recorder.js";
import { apiKey } from "./settings.js";

const SRT = "application/x-subrip";
const SHOWN_FROM_S = 1; // behind what is said
const RETRIES_MS = [500, 1000, 2000, 4000, 8000]; // then every 8 s

export class Captions {
  // `notice(text)` tells the user something, `copy(text)` puts text into the message.
  constructor({ notice, copy }) {
    this.notice = notice;
    this.list = byId("captions-list");
    this.lines = []; // {id, t0, t1, text, item, session}: t0 and t1 in ms from the beginning of all captions
    this.session = null;
    this.microphone = null;
    this.wanted = false;
    this.starts = 0; // so far: who is still waiting for the microphone knows whether it is its turn
    this.heardMs = 0; // recorded since the beginning
    this.failures = 0; // to connect, in a row
    byId("toggle-captions").addEventListener("click", () => (this.wanted ? this.stop() : this.start()));
    byId("captions-stop").addEventListener("click", () => this.stop());
    byId("captions-srt").addEventListener("click", () => save(srt(this.said()), "captions.srt", SRT));
    byId("captions-vtt").addEventListener("click", () => save(vtt(this.said()), "captions.vtt", "text/vtt"));
    byId("captions-copy").addEventListener("click", () => copy(this.said().map(({ text }) => text).join(" ")));
    byId("captions-clear").addEventListener("click", () => this.clear());
    this.show();
  }

  async start() {
    this.wanted = true;
    this.session = null; // the one before may still read its last words
    const start = ++this.starts;
    const current = () => this.wanted && start === this.starts;
    this.show();
    try {
      const microphone = await record(
        (samples) => start === this.starts && this.hear(samples),
        () => current() && this.lost("The microphone was taken away."),
      );
      if (!current()) {
        await microphone.stop();
        return;
      }
      this.microphone = microphone;
    } catch (error) {
      if (current()) this.lost(error.message);
      return;
    }
    this.connect();
  }

  // No more sound; what was said is still read to its end.
  async stop() {
    if (!this.wanted) return;
    this.wanted = false;
    const { microphone, session } = this;
    this.microphone = null;
    this.show();
    byId("toggle-captions").focus();
    await microphone?.stop();
    session?.finish();
  }

  lost(reason) {
    this.notice(reason);
    this.stop();
  }

  hear(samples) {
    this.heardMs += (samples.length * 1000) / RATE;
    this.session?.append(samples);
    byId("captions").querySelector(".level").value = loudness(samples);
  }

  connect() {
    this.session = new Session(apiKey(), this, this.heardMs);
  }

  // What a Session hears. One that was stopped may have last words while the next has begun.

  async disconnected(session) {
    const now = this.session === session;
    const start = this.starts;
    if (now) this.session = null;
    for (const line of this.lines) if (line.session === session) this.settle(line);
    this.behind(0);
    if (!now || session.finishing || !this.wanted) return;
    if (session.ready) {
      this.failures = 0;
      this.note("The connection was cut: what was said since is missing.");
    } else if (!(await this.mayConnect())) {
      return;
    }
    const pause = RETRIES_MS[Math.min(this.failures++, RETRIES_MS.length - 1)];
    setTimeout(() => this.wanted && start === this.starts && this.connect(), pause);
  }

  // A WebSocket does not say why it was refused: ask in another way.
  async mayConnect() {
    let why = "the server has no place for them now";
    try {
      await modelName(apiKey());
    } catch (error) {
      why = "the server cannot be reached";
      if (error.status === 401) {
        this.lost("Captions: the API key is wrong or missing.");
        return false;
      }
    }
    this.notice(`Captions: ${why}. Trying again…`);
    return this.wanted;
  }

  started(session, id, ms) {
    this.line(session, id).t0 = ms;
  }

  stopped(session, id, ms) {
    this.line(session, id).t1 = ms;
  }

  words(session, id, delta) {
    const line = this.line(session, id);
    line.text += delta;
    this.showLine(line, line.tail);
  }

  tail(session, id, tail, backlog) {
    this.showLine(this.line(session, id), tail);
    this.behind(backlog + session.unsent);
  }

  completed(session, id, transcript) {
    const line = this.line(session, id);
    line.text = transcript.trim();
    this.settle(line);
    this.behind(session.unsent);
  }

  failed(session, id, reason) {
    this.settle(this.line(session, id));
    this.note(`Something that was said could not be read: ${reason}`);
  }

  problem(reason) {
    this.notice(`Captions: ${reason}`);
  }

  // On the screen.

  line(session, id) {
    let line = this.lines.find((one) => one.id === id && one.session === session);
    if (!line) {
      const item = make("p", { className: "caption", hidden: true }, make("span", { className: "committed" }));
      item.append(make("span", { className: "tail" }));
      item.setAttribute("aria-busy", "true"); // a screen reader reads it when it is complete
      line = { id, session, t0: this.heardMs, t1: null, text: "", tail: "", item };
      this.lines.push(line);
      this.list.append(item);
      this.show();
    }
    return line;
  }

  showLine(line, tail) {
    line.tail = tail;
    line.item.hidden = !line.text && !tail;
    line.item.querySelector(".committed").textContent = line.text;
    line.item.querySelector(".tail").textContent = tail;
    this.list.scrollTop = this.list.scrollHeight;
  }

  settle(line) {
    line.t1 ??= this.heardMs;
    this.showLine(line, "");
    line.item.setAttribute("aria-busy", "false");
  }

  note(text) {
    this.list.append(make("p", { className: "cut" }, text));
    this.list.scrollTop = this.list.scrollHeight;
  }

  behind(seconds) {
    const place = byId("captions").querySelector(".backlog");
    place.hidden = seconds < SHOWN_FROM_S;
    place.textContent = `${seconds.toFixed(1)} s behind`;
  }

  show() {
    byId("toggle-captions").setAttribute("aria-pressed", String(this.wanted));
    byId("captions").hidden = !this.wanted && !this.list.children.length;
    byId("captions").classList.toggle("on", this.wanted);
    byId("captions-stop").hidden = !this.wanted;
    byId("captions-clear").hidden = this.wanted;
  }

  // What has words, in order.
  said() {
    const spoken = this.lines.filter(({ text }) => text);
    return spoken.map(({ t0, t1, text }) => ({ t0, t1: t1 ?? this.heardMs, text }));
  }

  clear() {
    for (const session of [this.session, ...this.lines.map((line) => line.session)]) session?.close();
    this.lines = [];
    this.list.replaceChildren();
    this.heardMs = 0;
    this.show();
  }
}

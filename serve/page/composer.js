// SPDX-License-Identifier: Apache-2.0
// The message that is being written: its text, its attachments, and what is said while "Hold to talk" is held.

import { startCamera } from "./camera.js";
import { button, byId, make } from "./dom.js";
import { elementOf, mediumOf, wav } from "./media.js";
import { RATE, record } from "./recorder.js";

const SHORTEST_S = 0.3; // that somebody talks: less was a tap
const NOTICE_MS = 8000;

export class Composer {
  // `send(text, media)` asks, `stop()` ends the answer.
  constructor({ send, stop }) {
    this.ask = send;
    this.message = byId("message");
    this.media = []; // that are attached
    this.busy = false; // an answer streams
    this.n = 0; // pictures and clips made here so far
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", stop);
    this.message.addEventListener("keydown", (event) => this.key(event));
    this.message.addEventListener("input", () => this.grow());
    this.takeFiles();
    startCamera((blob) => this.attach(blob, `picture-${++this.n}.jpg`));
    new HoldToTalk(this);
  }

  setBusy(busy) {
    this.busy = busy;
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    byId("talk").setAttribute("aria-disabled", String(busy)); // not disabled: it keeps the focus
    if (hadFocus) this.message.focus();
  }

  // Text, attachments and a clip, as far as they are there.
  send(clip) {
    const text = this.message.value.trim();
    const media = clip ? [...this.media, clip] : this.media;
    if (this.busy || (!text && !media.length)) return;
    this.media = [];
    byId("attachments").replaceChildren();
    this.message.value = "";
    this.grow();
    this.notice("");
    this.ask(text, media);
  }

  attach(blob, name) {
    const medium = mediumOf(blob, name);
    if (!medium) {
      this.notice(`${name} is neither a picture nor sound.`);
      return;
    }
    this.media.push(medium);
    const item = make("li", { className: "attachment" }, elementOf(medium), make("span", { className: "name" }, name));
    const remove = () => {
      this.media = this.media.filter((one) => one !== medium);
      item.remove();
      this.message.focus();
    };
    item.append(button("×", remove, { label: `Remove ${name}`, title: `Remove ${name}` }));
    byId("attachments").append(item);
    this.message.focus();
  }

  // A message that was sent, to be written anew.
  restore({ text, media }) {
    for (const { blob, name } of media) this.attach(blob, name);
    if (text) this.insert(text);
    this.message.focus();
  }

  insert(text) {
    const before = this.message.value;
    this.message.value = before ? `${before.trimEnd()} ${text}` : text;
    this.grow();
    this.message.focus();
  }

  notice(text) {
    byId("notice").textContent = text;
    clearTimeout(this.fading);
    this.fading = setTimeout(() => (byId("notice").textContent = ""), NOTICE_MS);
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey) return;
    if (event.isComposing || event.keyCode === 229) return; // an input method's; Safari says it in the second way
    event.preventDefault();
    this.send();
  }

  // As high as its text, up to what the style allows. A line of the grid is what a style sheet cannot know.
  grow() {
    this.message.rows = Math.min(8, this.message.value.split("\n").length);
  }

  takeFiles() {
    const file = byId("file");
    const take = (files) => [...files].forEach((one) => this.attach(one, one.name));
    byId("attach").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      take(file.files);
      file.value = ""; // the same file may be attached again
    });
    document.addEventListener("paste", (event) => {
      const { files, types } = event.clipboardData;
      // Office programs add a picture of the text that they copy.
      if (!files.length || (types.includes("text/plain") && types.includes("text/html"))) return;
      event.preventDefault();
      take(files);
    });
    const over = (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.add("dropping");
    };
    document.addEventListener("dragover", over);
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) document.body.classList.remove("dropping");
    });
    document.addEventListener("drop", (event) => {
      document.body.classList.remove("dropping");
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      take(event.dataTransfer.files);
    });
  }
}

// Records while the button, or Space or Enter on it, is held. Releasing sends, Escape discards.
class HoldToTalk {
  constructor(composer) {
    this.composer = composer;
    this.button = byId("talk");
    this.held = null; // what is being recorded: {chunks, microphone}
    this.button.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.button.setPointerCapture(event.pointerId);
      this.begin();
    });
    this.button.addEventListener("pointerup", () => this.end(true));
    this.button.addEventListener("pointercancel", () => this.end(false));
    this.button.addEventListener("contextmenu", (event) => event.preventDefault()); // a long touch
    this.button.addEventListener("keydown", (event) => {
      if (![" ", "Enter"].includes(event.key)) return;
      event.preventDefault();
      if (!event.repeat) this.begin();
    });
    this.button.addEventListener("keyup", (event) => {
      if ([" ", "Enter"].includes(event.key)) this.end(true);
    });
    this.button.addEventListener("blur", () => this.end(false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.end(false);
    });
  }

  begin() {
    if (this.held || this.composer.busy) return;
    const chunks = [];
    this.held = { chunks, microphone: record((chunk) => chunks.push(chunk)) };
    this.show();
    this.composer.notice("Listening: release to send, Escape discards.");
    this.held.microphone.catch((error) => {
      this.end(false);
      this.composer.notice(error.message);
    });
  }

  async end(wanted) {
    if (!this.held) return;
    const { chunks, microphone } = this.held;
    this.held = null;
    this.show();
    this.composer.notice("");
    try {
      await (await microphone).stop();
    } catch {
      return; // it was never opened, and that has been said
    }
    const samples = joined(chunks);
    if (!wanted) return;
    if (samples.length < SHORTEST_S * RATE) {
      this.composer.notice("Hold the button while you talk, and release it when you are done.");
      return;
    }
    const name = `clip-${++this.composer.n}.wav`;
    this.composer.send({ kind: "audio", name, blob: wav(samples, RATE) });
  }

  show() {
    this.button.setAttribute("aria-pressed", String(this.held !== null));
  }
}

function joined(chunks) {
  const found = new Int16Array(chunks.reduce((n, chunk) => n + chunk.length, 0));
  let at = 0;
  for (const chunk of chunks) {
    found.set(chunk, at);
    at += chunk.length;
  }
  return found;
}

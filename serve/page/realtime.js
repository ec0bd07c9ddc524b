// SPDX-License-Identifier: Apache-2.0
// One transcription session over /v1/realtime: samples in, events out.

import { RATE } from "./recorder.js";

const TAIL = "item.input_audio_transcription.tail"; // what may still change, asked for by this name
const QUIET_MS = 400; // without an event after the last words: nothing follows
const END_MS = 60_000; // that the server may take over the last words
const EVENTS = "conversation.item.input_audio_transcription.";

export class Session {
  // `heard` has a method for each kind of event, see `take`; `disconnected(session)` comes once, last. `startMs` is
  // added to all times.
  constructor(key, heard, startMs) {
    const url = new URL("/v1/realtime?intent=transcription", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    this.heard = heard;
    this.startMs = startMs;
    this.ready = false;
    this.held = []; // samples from before it is ready
    this.open = new Set(); // items whose words have not all come
    this.finishing = false; // the user has had enough
    this.answered = false; // … and the server has seen it
    this.timer = 0; // then the session is closed
    this.socket = new WebSocket(url, ["realtime", ...(key ? [`pocketphi-key.${base64Url(key)}`] : [])]);
    this.socket.addEventListener("message", ({ data }) => this.take(JSON.parse(data)));
    this.socket.addEventListener("close", () => {
      clearTimeout(this.timer);
      this.heard.disconnected(this);
    });
  }

  // Seconds of sound that have not left this machine.
  get unsent() {
    return (this.socket.bufferedAmount * 3) / 4 / 2 / RATE;
  }

  append(samples) {
    if (!this.ready) {
      this.held.push(samples);
    } else {
      this.say({ type: "input_audio_buffer.append", audio: base64(samples) });
    }
  }

  // End the utterance that is being spoken, wait for all words, and close.
  finish() {
    this.finishing = true;
    if (this.ready) this.commit();
    this.closeAfter(END_MS);
  }

  // At once: nothing more is heard.
  close() {
    this.socket.close();
  }

  closeAfter(ms) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.close(), ms);
  }

  say(event) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(event));
  }

  take(event) {
    const id = event.item_id;
    if (event.type === "session.created") this.configure();
    else if (event.type === "session.updated") this.begin();
    else if (event.type === "input_audio_buffer.speech_started") {
      this.open.add(id);
      this.heard.started(this, id, this.startMs + event.audio_start_ms);
    } else if (event.type === "input_audio_buffer.speech_stopped") {
      this.heard.stopped(this, id, this.startMs + event.audio_end_ms);
    } else if (event.type === "input_audio_buffer.committed") this.answered = this.finishing;
    else if (event.type === `${EVENTS}delta`) this.heard.words(this, id, event.delta);
    else if (event.type === `${EVENTS}tail`) this.heard.tail(this, id, event.tail, event.backlog);
    else if (event.type === `${EVENTS}completed`) {
      this.open.delete(id);
      this.heard.completed(this, id, event.transcript);
    } else if (event.type === `${EVENTS}failed`) {
      this.open.delete(id);
      this.heard.failed(this, id, event.error.message);
    } else if (event.type === "error") {
      if (this.finishing) this.answered = true; // there was nothing to end
      else this.heard.problem(event.error.message);
    }
    if (this.answered && !this.open.size) this.closeAfter(QUIET_MS);
  }

  configure() {
    const input = { format: { type: "audio/pcm", rate: RATE }, turn_detection: { type: "server_vad" } };
    this.say({ type: "session.update", session: { type: "transcription", audio: { input }, include: [TAIL] } });
  }

  begin() {
    this.ready = true;
    for (const samples of this.held) this.append(samples);
    this.held = [];
    if (this.finishing) this.commit();
  }

  commit() {
    this.say({ type: "input_audio_buffer.commit" });
  }
}

function base64(samples) {
  return btoa(String.fromCharCode(...new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength)));
}

// As a WebSocket's subprotocol may have it.
function base64Url(text) {
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

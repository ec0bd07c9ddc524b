// SPDX-License-Identifier: Apache-2.0
// Pictures and sound: what a file is, how it is shown, and how a request carries it.

import { make } from "./dom.js";

const SOUND_ENDINGS = ["wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "aiff", "aif", "au", "caf"];
const base64Of = new WeakMap(); // Blob → promise of text: a conversation is sent again with each turn

// {kind, name, blob} of a file, or null where it is neither a picture nor sound.
export function mediumOf(blob, name) {
  const ending = name.split(".").pop().toLowerCase();
  if (blob.type.startsWith("image/")) return { kind: "image", name, blob };
  if (blob.type.startsWith("audio/") || SOUND_ENDINGS.includes(ending)) return { kind: "audio", name, blob };
  return null;
}

// The part of a message that carries it.
export async function partOf(medium) {
  const data = await base64(medium.blob);
  if (medium.kind === "image") {
    return { type: "image_url", image_url: { url: `data:${medium.blob.type};base64,${data}` } };
  }
  return { type: "input_audio", input_audio: { data, format: soundFormat(medium) } };
}

// A picture, or a player.
export function elementOf(medium) {
  const src = URL.createObjectURL(medium.blob); // lives as long as the page, as the Blob does
  if (medium.kind === "image") return make("img", { src, alt: medium.name });
  return make("audio", { src, controls: true, preload: "metadata", label: medium.name });
}

// Mono int16 samples as a WAV file.
export function wav(samples, rate) {
  const header = new DataView(new ArrayBuffer(44));
  const word = (at, text) => [...text].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF");
  header.setUint32(4, 36 + samples.byteLength, true);
  word(8, "WAVEfmt ");
  header.setUint32(16, 16, true); // bytes of what follows
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, rate, true);
  header.setUint32(28, rate * 2, true); // bytes in a second
  header.setUint16(32, 2, true); // bytes of a sample
  header.setUint16(34, 16, true); // bits of a sample
  word(36, "data");
  header.setUint32(40, samples.byteLength, true);
  return new Blob([header, samples], { type: "audio/wav" });
}

export function base64(blob) {
  if (!base64Of.has(blob)) base64Of.set(blob, read(blob));
  return base64Of.get(blob);
}

function read(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("A picture or sound file can no longer be read."));
    reader.readAsDataURL(blob);
  });
}

function soundFormat({ blob, name }) {
  const type = blob.type.split(";")[0].replace("audio/", "").replace("x-", "");
  return { mpeg: "mp3", wave: "wav", "": name.split(".").pop().toLowerCase() }[type] ?? type;
}

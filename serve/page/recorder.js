// SPDX-License-Identifier: Apache-2.0
// The microphone, as chunks of int16 samples at 16 kHz.

export const RATE = 16000;
const WORKLET = "/page/recorder-worklet.js";
const MONO = { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" };

// Begins to record: `onChunk(samples)` gets an Int16Array about every 100 ms, `onLost()` is called when the device is
// taken away. The answer has `stop()`, which resolves after the last chunk. Throws an Error with a sentence.
export async function record(onChunk, onLost = () => {}) {
  const stream = await openDevice({
    // As it is heard: what browsers do for calls takes from speech what the model knows.
    audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
  });
  let context;
  try {
    const opened = openContext(stream);
    context = opened.context;
    await context.audioWorklet.addModule(WORKLET);
    const node = new AudioWorkletNode(context, "recorder", MONO);
    const ended = new Promise((done) => {
      node.port.onmessage = ({ data }) => (data === null ? done() : onChunk(data));
    });
    opened.source.connect(node);
    await context.resume();
    stream.getAudioTracks()[0].addEventListener("ended", onLost);
    const stop = async () => {
      node.port.postMessage(null);
      await ended;
      close(stream, context);
    };
    return { stop };
  } catch (error) {
    close(stream, context);
    throw new Error(`The microphone cannot be recorded: ${error.message}`);
  }
}

// A camera or microphone. Throws an Error with a sentence for the user.
export async function openDevice(wanted) {
  const what = wanted.video ? "camera" : "microphone";
  if (!navigator.mediaDevices) throw new Error(`The ${what} needs https, or the address localhost.`);
  try {
    return await navigator.mediaDevices.getUserMedia(wanted);
  } catch (error) {
    if (error.name === "NotAllowedError") throw new Error(`The browser does not let this page use the ${what}.`);
    if (error.name === "NotFoundError") throw new Error(`There is no ${what}.`);
    throw new Error(`The ${what} cannot be opened: ${error.message}`);
  }
}

// How loud a chunk is, from 0 to 1: -60 dB to 0 dB.
export function loudness(samples) {
  let sum = 0;
  for (const sample of samples) sum += (sample / 32768) ** 2;
  const decibels = 10 * Math.log10(sum / Math.max(1, samples.length) + 1e-12);
  return Math.min(1, Math.max(0, 1 + decibels / 60));
}

// At 16 kHz where the browser can; else at the device's own rate, and the worklet resamples.
function openContext(stream) {
  for (const options of [{ sampleRate: RATE }, {}]) {
    let context;
    try {
      context = new AudioContext(options);
      return { context, source: context.createMediaStreamSource(stream) };
    } catch (error) {
      context?.close();
      if (!options.sampleRate) throw error;
    }
  }
}

function close(stream, context) {
  for (const track of stream.getTracks()) track.stop();
  context?.close();
}

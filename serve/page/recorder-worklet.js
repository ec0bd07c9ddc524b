// SPDX-License-Identifier: Apache-2.0
// On the audio thread: the microphone as int16 at 16 kHz, in chunks. Where the browser runs it at another rate, it is
// resampled here, by a windowed sinc that keeps what is under 7.6 kHz.

const RATE = 16000;
const CHUNK = 1600; // samples: 100 ms
const CROSSINGS = 16; // of the sinc, to each side
const CUTOFF = 0.95; // of half the lower rate

class Resampler {
  constructor(from, to) {
    const common = gcd(from, to);
    this.up = to / common; // phases of the filter
    this.down = from / common; // output i lies at input i * down / up
    const scale = Math.min(1, to / from) * CUTOFF;
    this.half = Math.ceil(CROSSINGS / scale); // input samples to each side
    this.filters = Array.from({ length: this.up }, (_, phase) => this.filter(phase / this.up, scale));
    this.input = new Float32Array(this.half); // silence before the first
    this.at = 0; // position of the next output from `input[half]`, in steps of 1 / up
  }

  // Weights of the input around a position that lies `part` of a sample behind one of them. Their sum is 1.
  filter(part, scale) {
    const weights = Float64Array.from({ length: 2 * this.half }, (_, i) => {
      const x = i - this.half + 1 - part;
      const window = Math.cos((Math.PI / 2) * (x / (this.half + 1))) ** 2;
      return (x === 0 ? 1 : Math.sin(Math.PI * scale * x) / (Math.PI * scale * x)) * window;
    });
    const sum = weights.reduce((a, b) => a + b, 0);
    return weights.map((weight) => weight / sum);
  }

  run(block) {
    const input = new Float32Array(this.input.length + block.length);
    input.set(this.input);
    input.set(block, this.input.length);
    const found = [];
    for (;;) {
      const whole = Math.floor(this.at / this.up);
      const first = whole + 1; // input[half + whole] is what lies before the position
      if (first + 2 * this.half > input.length) break;
      const filter = this.filters[this.at % this.up];
      let sum = 0;
      for (let i = 0; i < filter.length; i++) sum += filter[i] * input[first + i];
      found.push(sum);
      this.at += this.down;
    }
    const past = Math.min(Math.floor(this.at / this.up), input.length);
    this.at -= past * this.up;
    this.input = input.slice(past);
    return found;
  }
}

function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = sampleRate === RATE ? null : new Resampler(sampleRate, RATE);
    this.chunk = new Int16Array(CHUNK);
    this.filled = 0;
    this.ended = false;
    this.port.onmessage = () => {
      this.give();
      this.port.postMessage(null); // nothing follows
      this.ended = true;
    };
  }

  process([channels]) {
    if (this.ended) return false;
    if (!channels.length) return true; // the microphone has not begun
    const samples = this.resampler ? this.resampler.run(channels[0]) : channels[0];
    for (const sample of samples) {
      this.chunk[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === CHUNK) this.give();
    }
    return true;
  }

  give() {
    const chunk = this.chunk.slice(0, this.filled);
    this.filled = 0;
    if (chunk.length) this.port.postMessage(chunk, [chunk.buffer]);
  }
}

registerProcessor("recorder", Recorder);

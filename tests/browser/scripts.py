# SPDX-License-Identifier: Apache-2.0
"""Questions to the document, in its own language, and what tests change about a browser."""

from __future__ import annotations

# A DataTransfer with a file: its bytes in base64, its name, its type.
TRANSFER = """([data, name, type]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""

# A PNG, in base64, into the clipboard; with text, as office programs do.
COPY_PICTURE = """async ([data, text]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const found = { "image/png": new Blob([bytes], { type: "image/png" }) };
  for (const type of text ? ["text/plain", "text/html"] : []) found[type] = new Blob([text], { type });
  await navigator.clipboard.write([new ClipboardItem(found)]);
}"""

# The camera's tracks that go on.
LIVE_TRACKS = """() => {
  const tracks = document.querySelector("#camera video").srcObject?.getTracks() ?? [];
  return tracks.filter((one) => one.readyState === "live").length;
}"""

# Nobody may see or hear.
NO_DEVICES = """() => {
  navigator.mediaDevices.getUserMedia = async () => { throw new DOMException("no", "NotAllowedError"); };
}"""

# A browser that takes its time to open what is kept.
SLOW_STORE = """
  const ask = navigator.locks.request.bind(navigator.locks);
  navigator.locks.request = async (...given) => {
    await new Promise((later) => setTimeout(later, 1500));
    return ask(...given);
  };
"""

# Where a browser does not record at the rate that is asked for, as Firefox does not, the page resamples.
OWN_RATE = """
  const Real = AudioContext;
  window.AudioContext = class extends Real {
    constructor(options) {
      if (options?.sampleRate) throw new DOMException("not at this rate", "NotSupportedError");
      super({ sampleRate: 44100 });
    }
  };
"""

# How long a player's sound is, in seconds, once the browser could read it.
DURATION = """(audio) => new Promise((found) => {
  if (audio.readyState) found(audio.duration);
  audio.onloadedmetadata = () => found(audio.duration);
})"""

# From now on, all that captions show: committed, tail, and how each looks.
WATCH_CAPTIONS = """() => {
  window.shown = [];
  const style = (part) => {
    const found = getComputedStyle(part);
    return [found.color, found.opacity].join(" ");
  };
  const look = () => {
    for (const one of document.querySelectorAll(".caption")) {
      const [committed, tail] = [one.querySelector(".committed"), one.querySelector(".tail")];
      window.shown.push([committed.textContent, tail.textContent, style(committed), style(tail)]);
    }
  };
  const all = { childList: true, subtree: true, characterData: true, attributes: true };
  new MutationObserver(look).observe(document.querySelector("#captions"), all);
}"""

# A script of somebody who got into the page, and a connection to somewhere else: what became of it.
BREAK_OUT = """async () => {
  const script = document.createElement("script");
  try {
    script.textContent = "document.title = 'taken'";
  } catch {
    script.append("document.title = 'taken'");
  }
  document.body.append(script);
  return fetch("https://example.org/").then(() => "sent", (error) => error.name);
}"""

# The name of what has the focus, as far as the page gives one.
FOCUSED = """() => {
  const one = document.activeElement;
  const label = one.getAttribute("aria-label") || one.labels?.[0]?.textContent.trim();
  return label || one.textContent.trim() || one.id;
}"""

# What does not fit into the window's width, and cannot be scrolled by itself.
TOO_WIDE = """() => {
  const wide = document.documentElement.clientWidth;
  const unseen = (one) => one.closest(".unseen") || !one.checkVisibility();
  const inside = (one) => {
    for (let at = one.parentElement; at; at = at.parentElement) {
      if (/auto|scroll/.test(getComputedStyle(at).overflowX) && at !== document.documentElement) return true;
    }
    return false;
  };
  const outside = (one) => {
    const box = one.getBoundingClientRect();
    return box.right > wide + 0.5 || box.left < -0.5;
  };
  const all = [...document.querySelectorAll("button, textarea, input, select, li, p, img, h1, h2, dialog")];
  const found = all.filter((one) => !unseen(one) && !inside(one) && outside(one));
  const scrolls = [document.documentElement, document.body, document.querySelector("main")];
  return [...scrolls.filter((one) => one.scrollWidth > one.clientWidth), ...found].map(
    (one) => one.outerHTML.slice(0, 80),
  );
}"""

# The contrast of an element's text with what lies behind it, by WCAG 2.1.
CONTRAST = """(element) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = [];
  for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
  behind.unshift(matchMedia("(prefers-color-scheme: dark)").matches ? "black" : "white");
  const [a, b] = [light(over([...behind, getComputedStyle(element).color])), light(over(behind))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""

# How bright the page's background is, 0 to 1.
BRIGHTNESS = """() => {
  const canvas = document.createElement("canvas").getContext("2d");
  for (const one of [document.documentElement, document.body]) {
    canvas.fillStyle = getComputedStyle(one).backgroundColor;
    canvas.fillRect(0, 0, 1, 1);
  }
  const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
  return (r + g + b) / 3 / 255;
}"""

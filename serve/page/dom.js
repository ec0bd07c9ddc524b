// SPDX-License-Identifier: Apache-2.0
// Elements, made from text and never from markup.

// An element: its properties and data attributes, then children, which are elements or text.
export function make(tag, given = {}, ...children) {
  const { data = {}, label, ...properties } = given;
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  if (label) element.setAttribute("aria-label", label);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

export function button(text, pressed, given = {}) {
  const made = make("button", { type: "button", ...given }, text);
  made.addEventListener("click", pressed);
  return made;
}

// The browser saves text or a Blob as a file.
export function save(content, name, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // when the download has begun
}

// SPDX-License-Identifier: Apache-2.0
// What the user decides. All of it lies in localStorage, but for the key: in sessionStorage, unless it is remembered.

import { byId } from "./dom.js";

const STORED = "pocketphi.settings";
const KEY = "pocketphi.key";
const DEFAULTS = { system: "", temperature: null, longest: null, tools: "", theme: "system" };

let values = { ...DEFAULTS };
let key = "";

export const apiKey = () => key;
export const systemPrompt = () => values.system.trim();

// What a request has beside its messages.
export function requestFields() {
  const fields = {};
  if (values.temperature !== null) fields.temperature = values.temperature;
  if (values.longest !== null) fields.max_tokens = values.longest;
  const tools = parseTools(values.tools);
  if (tools.length) fields.tools = tools;
  return fields;
}

// Reads what is stored, and makes the dialog work; `changed` is called after each Save.
export function startSettings(changed) {
  values = { ...DEFAULTS, ...stored() };
  key = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  showTheme();
  const dialog = byId("settings");
  byId("open-settings").addEventListener("click", openSettings);
  byId("settings-cancel").addEventListener("click", () => dialog.close());
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    try {
      take();
    } catch (error) {
      dialog.querySelector(".error").textContent = error.message;
      return;
    }
    dialog.close();
    changed();
  });
}

export function openSettings() {
  byId("set-key").value = key;
  byId("set-remember").checked = localStorage.getItem(KEY) !== null;
  byId("set-system").value = values.system;
  byId("set-temperature").value = values.temperature ?? "";
  byId("set-longest").value = values.longest ?? "";
  byId("set-tools").value = values.tools;
  byId("set-theme").value = values.theme;
  byId("settings").querySelector(".error").textContent = "";
  byId("settings").showModal();
}

// The dialog's fields, checked. Throws an Error with a sentence for the user.
function take() {
  const given = byId("set-key").value.trim();
  if (!/^[\x21-\x7e]*$/.test(given)) throw new Error("The API key has characters that no key has.");
  parseTools(byId("set-tools").value);
  values = {
    system: byId("set-system").value,
    temperature: numberIn("set-temperature"),
    longest: numberIn("set-longest"),
    tools: byId("set-tools").value,
    theme: byId("set-theme").value,
  };
  localStorage.setItem(STORED, JSON.stringify(values));
  key = given;
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (key) (byId("set-remember").checked ? localStorage : sessionStorage).setItem(KEY, key);
  showTheme();
}

// Functions as the server wants them, from a JSON array of them with or without {"type": "function", "function": …}.
function parseTools(text) {
  if (!text.trim()) return [];
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`Tools: this is not JSON: ${error.message}`);
  }
  if (!Array.isArray(found)) throw new Error("Tools: expected a JSON array of functions.");
  return found.map((one, i) => {
    const described = one?.type === "function" && one.function ? one.function : one;
    if (typeof described?.name !== "string" || !described.name) {
      throw new Error(`Tools: function ${i + 1} has no name.`);
    }
    return { type: "function", function: described };
  });
}

function numberIn(id) {
  const text = byId(id).value;
  return text === "" ? null : Number(text);
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) ?? {};
  } catch {
    return {}; // written by something else
  }
}

function showTheme() {
  document.documentElement.dataset.theme = values.theme;
}

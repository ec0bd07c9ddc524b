// SPDX-License-Identifier: Apache-2.0
// The page: its parts made and put together, and what the server's state is.

import { health, modelName } from "./api.js";
import { Captions } from "./captions.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { byId, save } from "./dom.js";
import { json, markdown } from "./export.js";
import { apiKey, openSettings, startSettings, systemPrompt } from "./settings.js";
import { openStore } from "./store.js";

const READY_POLL_MS = 10_000;
const AWAY_POLL_MS = 1500;
const STATUS = {
  ready: "Ready",
  loading: "Loading the model…",
  away: "The server is away: trying again…",
  key: "The API key is wrong or missing",
};

let known = ""; // the state that was seen last: "ready" only once the key has been accepted
let timer = 0;

// Asks the server how it is, shows it, and asks again after a while.
async function look() {
  clearTimeout(timer);
  let state = await health();
  if (state === "ready" && known !== "ready") state = known === "key" ? "key" : await checkKey();
  known = state;
  if (byId("status").textContent !== STATUS[state]) byId("status").textContent = STATUS[state];
  byId("status").dataset.state = state;
  byId("hint").hidden = state !== "key";
  clearTimeout(timer); // of another `look` in the meantime
  timer = setTimeout(look, state === "ready" || state === "key" ? READY_POLL_MS : AWAY_POLL_MS);
}

async function checkKey() {
  try {
    byId("model").textContent = await modelName(apiKey());
    return "ready";
  } catch (error) {
    return error.status === 401 ? "key" : "away";
  }
}

function lookAnew() {
  known = "";
  look();
}

function startHeader(conversation) {
  const confirm = byId("confirm");
  byId("new").addEventListener("click", () => {
    if (conversation.messages.length) confirm.showModal();
    else byId("message").focus();
  });
  byId("confirm-yes").addEventListener("click", async () => {
    confirm.close();
    await conversation.clear();
    byId("message").focus();
  });
  byId("confirm-no").addEventListener("click", () => confirm.close());
  byId("export-markdown").addEventListener("click", () => {
    save(markdown(conversation.messages), "conversation.md", "text/markdown");
  });
  byId("export-json").addEventListener("click", async () => {
    save(await json(conversation.messages, systemPrompt()), "conversation.json", "application/json");
  });
  byId("enter-key").addEventListener("click", openSettings);
}

async function start() {
  startSettings(lookAnew);
  const store = await openStore();
  const kept = await store.messages(); // before anything can be sent
  const composer = new Composer({
    send: (text, media) => conversation.send(text, media),
    stop: () => conversation.stop(),
  });
  const notice = (text) => composer.notice(text);
  const conversation = new Conversation(store, {
    busy: (flag) => composer.setBusy(flag),
    failed: lookAnew,
    problem: notice,
    takenBack: (message) => composer.restore(message),
  });
  new Captions({ notice, copy: (text) => composer.insert(text) });
  startHeader(conversation);
  conversation.restore(kept);
  if (store.problem) notice(store.problem);
  byId("message").focus();
  look(); // what is said to be ready can be used
}

start();

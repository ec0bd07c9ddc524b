// SPDX-License-Identifier: Apache-2.0
// The conversation in this browser's IndexedDB: one record for each message, pictures and sound as Blobs.

const DATABASE = "pocketphi";
const MESSAGES = "messages";
const LOCK = "pocketphi-conversation";
const LOCK_TRIES = 5; // a page that is being reloaded lets go a moment later
const LOCK_PAUSE_MS = 100;

// Opens it. Without IndexedDB, or when another tab has it, a store that keeps nothing and says why.
export async function openStore() {
  if (!(await alone())) return new Store(null, "The conversation is open in another tab: this one is not kept.");
  try {
    return new Store(await opened(), "");
  } catch {
    return new Store(null, "This browser keeps no data for this page: the conversation ends with the tab.");
  }
}

class Store {
  constructor(database, problem) {
    this.problem = problem; // why nothing is kept; "" where it is
    this.database = database;
  }

  // All messages, in the order of their `n`.
  async messages() {
    if (!this.database) return [];
    return finished(this.transaction("readonly").getAll());
  }

  async put(message) {
    if (this.database) await finished(this.transaction("readwrite").put(message));
  }

  async remove(message) {
    if (this.database) await finished(this.transaction("readwrite").delete(message.n));
  }

  async clear() {
    if (this.database) await finished(this.transaction("readwrite").clear());
  }

  transaction(mode) {
    return this.database.transaction(MESSAGES, mode).objectStore(MESSAGES);
  }
}

// Whether no other tab has the conversation; from then on this one has it, as long as it lives.
async function alone() {
  if (!navigator.locks) return true;
  for (let tries = 0; tries < LOCK_TRIES; tries++) {
    const got = await new Promise((answer) => {
      navigator.locks.request(LOCK, { ifAvailable: true }, (lock) => {
        answer(lock !== null);
        return lock && new Promise(() => {}); // never given back
      });
    });
    if (got) return true;
    await new Promise((later) => setTimeout(later, LOCK_PAUSE_MS));
  }
  return false;
}

function opened() {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(MESSAGES, { keyPath: "n" });
  return finished(request);
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// SPDX-License-Identifier: Apache-2.0
// The conversation in this browser's IndexedDB: one record for each message, pictures and sound as Blobs.

const DATABASE = "pocketphi";
const MESSAGES = "messages";
const LOCK = "pocketphi-conversation";
const LOCK_TRIES = 5; // a page that is being reloaded lets go a moment later
const LOCK_PAUSE_MS = 100;

const NO_DATA = "This browser keeps no data for this page: the conversation ends with the tab.";

// Opens it. Without IndexedDB, or when another tab has it, a store that keeps nothing and says why.
export async function openStore() {
  if (!(await alone())) return new Store(null, "The conversation is open in another tab: this one is not kept.");
  try {
    return new Store(await opened(), "");
  } catch {
    return new Store(null, NO_DATA);
  }
}

class Store {
  constructor(database, problem) {
    this.problem = problem; // why nothing is kept; "" where it is
    this.database = database;
  }

  // All messages, in the order of their `n`. What cannot be read is left alone.
  async messages() {
    if (!this.database) return [];
    try {
      return await finished(this.database.transaction(MESSAGES).objectStore(MESSAGES).getAll());
    } catch {
      this.database = null;
      this.problem = NO_DATA;
      return [];
    }
  }

  async put(message) {
    await this.change((messages) => messages.put(message));
  }

  async remove(message) {
    await this.change((messages) => messages.delete(message.n));
  }

  async clear() {
    await this.change((messages) => messages.clear());
  }

  // To its end: only there is it found out whether there is room.
  async change(make) {
    if (!this.database) return;
    const transaction = this.database.transaction(MESSAGES, "readwrite");
    make(transaction.objectStore(MESSAGES));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
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

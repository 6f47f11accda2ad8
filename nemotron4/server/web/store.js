/** Conversations in this browser: IndexedDB, because answers with probabilities outgrow localStorage. */

import { merged, opened } from "./conversation.js";

const NAME = "nemotron4";
const TABLE = "conversations";

let opening = null;

function open() {
  opening ??= done(() => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    return request;
  });
  return opening;
}

function done(start) {
  return new Promise((resolve, reject) => {
    const request = start();
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function table(mode) {
  return (await open()).transaction(TABLE, mode).objectStore(TABLE);
}

/** All of them, the newest first. */
export async function all() {
  const rows = await table("readonly").then((rows) => done(() => rows.getAll()));
  return rows.map(opened).sort((one, other) => other.updated - one.updated);
}

export const get = (id) => table("readonly").then((rows) => done(() => rows.get(id)));

// What another tab writes, this one hears of, and the other way round.
const channel = new BroadcastChannel(NAME);
const written = new Map(); // id -> `updated` of the copy that this tab knows

/** Calls `onChange(id)` after another tab has written or removed a conversation. */
export function watch(onChange) {
  channel.addEventListener("message", ({ data }) => onChange(data));
}

/**
 * Keeps a conversation. What another tab wrote since is merged into it first, in place.
 * @returns {Promise<boolean>} whether there was something to merge
 */
export async function put(conversation) {
  const stored = await get(conversation.id);
  const isNews = stored !== undefined && stored.updated > (written.get(conversation.id) ?? conversation.updated);
  if (isNews) Object.assign(conversation, merged(conversation, stored));
  conversation.updated = Math.max(Date.now(), conversation.updated);
  written.set(conversation.id, conversation.updated);
  const rows = await table("readwrite");
  await done(() => rows.put(conversation));
  channel.postMessage(conversation.id);
  return isNews;
}

/** Notes that this tab holds the stored copy. */
export const knows = (conversation) => written.set(conversation.id, conversation.updated);

export async function remove(id) {
  const rows = await table("readwrite");
  await done(() => rows.delete(id));
  channel.postMessage(id);
}

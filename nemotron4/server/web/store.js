/** Conversations in this browser: IndexedDB, because answers with probabilities outgrow localStorage. */

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
  return rows.sort((one, other) => other.updated - one.updated);
}

export const put = (conversation) => table("readwrite").then((rows) => done(() => rows.put(conversation)));
export const remove = (id) => table("readwrite").then((rows) => done(() => rows.delete(id)));
export const clear = () => table("readwrite").then((rows) => done(() => rows.clear()));

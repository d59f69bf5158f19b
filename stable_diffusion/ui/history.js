/**
 * What was generated in this browser, newest first: settings and images in IndexedDB, the oldest forgotten beyond a bound.
 * Where storage is turned off or full it lasts as long as the page. Knows nothing of how it is shown.
 */

const MAX_ENTRIES = 30;
const STORE = "drawn";

/** `entries` is what is known now; `isKept()` says whether it will be there after the page is closed. */
export async function openHistory() {
  let database = await open().catch(() => null);
  const entries = database ? await loaded(database).catch(() => []) : [];
  const attempt = async (work) => {
    if (!database) return;
    try {
      const transaction = database.transaction(STORE, "readwrite");
      await Promise.all([work(transaction.objectStore(STORE)), completion(transaction)]);
    } catch {
      database = null; // full, or turned off since
    }
  };
  return {
    entries,
    isKept: () => database !== null,
    async add(entry) {
      entries.unshift(entry);
      const forgotten = entries.splice(MAX_ENTRIES);
      await attempt(async (store) => {
        entry.id = await outcome(store.add({ ...entry }));
        await Promise.all(forgotten.map(({ id }) => outcome(store.delete(id))));
      });
    },
    async clear() {
      entries.length = 0;
      await attempt((store) => outcome(store.clear()));
    },
  };
}

async function open() {
  const request = indexedDB.open("stable_diffusion", 1); // raises where storage is turned off
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
  return outcome(request);
}

async function loaded(database) {
  const all = await outcome(database.transaction(STORE).objectStore(STORE).getAll());
  // Earlier versions of this page called the image "picture".
  return all.reverse().slice(0, MAX_ENTRIES).map(({ picture, image = picture, ...entry }) => ({ ...entry, image }));
}

function outcome(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** A transaction may fail after all its requests have succeeded, where the disk is full. */
function completion(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });
}

// What outlives a reload: generated images, files that they start from, runs under way. IndexedDB, else memory.

const KINDS = { images: "id", files: "sha256", runs: "id" };
let opened = null;
const memory = Object.fromEntries(Object.keys(KINDS).map(kind => [kind, new Map()]));

/** Whether a reload finds what is put here; false in private windows of some browsers. */
export async function persistent() {
  return await database() !== null;
}

/** Everything of a kind. */
export async function all(kind) {
  const store = await objects(kind, "readonly");
  return store ? settled(store.getAll()) : [...memory[kind].values()];
}

/** One thing by its key, or undefined. */
export async function get(kind, key) {
  const store = await objects(kind, "readonly");
  return store ? settled(store.get(key)) : memory[kind].get(key);
}

/** Add a thing, or replace the one of the same key. */
export async function put(kind, value) {
  const store = await objects(kind, "readwrite");
  if (store) await settled(store.put(value));
  else memory[kind].set(value[KINDS[kind]], value);
}

/** Remove what has this key, if anything. */
export async function remove(kind, key) {
  const store = await objects(kind, "readwrite");
  if (store) await settled(store.delete(key));
  else memory[kind].delete(key);
}

/** Remove everything of a kind. */
export async function clear(kind) {
  const store = await objects(kind, "readwrite");
  if (store) await settled(store.clear());
  else memory[kind].clear();
}

async function objects(kind, mode) {
  const found = await database();
  return found && found.transaction(kind, mode).objectStore(kind);
}

function database() {
  opened ??= new Promise(resolve => {
    let request;
    try { request = indexedDB.open("studio", 1); } catch { return resolve(null); }
    request.onupgradeneeded = () => {
      for (const [kind, key] of Object.entries(KINDS)) request.result.createObjectStore(kind, { keyPath: key });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
    request.onblocked = () => resolve(null);
  });
  return opened;
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

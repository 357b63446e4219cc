// The browser's storage for this page. If it is unavailable (cookies are blocked), data is kept in memory.

const inMemory = () => {
  const held = new Map();
  return { getItem: (name) => held.get(name) ?? null, setItem: (name, text) => held.set(name, text), removeItem: (name) => held.delete(name) };
};

function storage(kind) {
  try {
    const found = globalThis[kind];
    found.getItem("sollold");
    return found;
  } catch { return inMemory(); }
}

export const tabStorage = storage("sessionStorage");
export const browserStorage = storage("localStorage");

// What the browser keeps for this page. Where it refuses to (cookies are blocked), this page does until it is left.

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

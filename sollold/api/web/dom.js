// Building and updating the page. External text is inserted as text only, never as HTML.

export const byId = (id) => document.getElementById(id);

/** Make an element: attributes by name, `class`, `text`, `on` for listeners; children may be strings. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    // The page's policy forbids the attribute.
    else if (name === "style") node.style.cssText = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Make an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** Set a node's text only if it differs, so that a selection in it is kept. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  const text = String(value);
  if (node.getAttribute(name) !== text) node.setAttribute(name, text);
}

/**
 * Make `parent`'s children follow `items`: those with a known key are kept and updated in place. If the one with the
 * focus is removed, its neighbour gets it.
 */
export function keyed(parent, items, keyOf, create, update = () => {}) {
  const known = parent.keyedChildren || (parent.keyedChildren = new Map());
  const wanted = new Set();
  let before = null;
  for (const item of items) {
    const key = String(keyOf(item));
    if (wanted.has(key)) continue;
    wanted.add(key);
    let node = known.get(key);
    if (!node) {
      node = create(item);
      known.set(key, node);
    }
    update(node, item);
    const next = before ? before.nextSibling : parent.firstChild;
    if (next !== node) parent.insertBefore(node, next);
    before = node;
  }
  for (const [key, node] of known) {
    if (!wanted.has(key)) {
      const near = node.contains(document.activeElement) && (node.nextElementSibling || node.previousElementSibling);
      node.remove();
      known.delete(key);
      if (near) (near.matches("button") ? near : near.querySelector("a, button"))?.focus({ preventScroll: true });
    }
  }
}

/** Make a container for content that may be wider than the window; the keyboard can scroll it too. */
export function scrolling(label, ...children) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, ...children);
}

/** Make a button that copies the result of `text()`. */
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", class: "quiet small", text: label });
  button.addEventListener("click", async () => {
    const done = await copy(text());
    setText(button, done ? "Copied" : "Select and copy by hand");
    say(done ? "Copied" : "Could not copy");
    setTimeout(() => setText(button, label), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages without TLS have no clipboard API; use the deprecated command.
    const area = el("textarea", { class: "visually-hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Announce text to screen readers. */
export function say(text) {
  byId("said").textContent = text;
}

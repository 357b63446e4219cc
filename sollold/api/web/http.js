// Requests to the node, with the key that the user logged in with, if any.

import { el } from "./dom.js";
import { tabStorage } from "./storage.js";

const STORED = "sollold.key";
// Not the root of the host: a reverse proxy may serve the node below a path.
/** The URL of this node, without a trailing slash. */
export const base = new URL("..", import.meta.url).href.replace(/\/$/, "");
let tell = () => {};

export const key = () => tabStorage.getItem(STORED) || "";

/** Call `callback` when the node requires a key. */
export function needsLogin(callback) { tell = callback; }

/** Ask for a key in a dialog; resolves to whether the key was changed. It is kept until the tab is closed. */
export function logIn() {
  return new Promise((done) => {
    const field = el("input", { type: "password", id: "key-field", autocomplete: "current-password", pattern: "\\s*[!-~]+\\s*", title: "Letters, digits and signs of ASCII" });
    const dialog = el("dialog", { "aria-labelledby": "key-title" },
      el("form", { method: "dialog" },
        el("h2", { id: "key-title", text: "Log in" }),
        el("p", { class: "dim", text: "A key with the scope that you need; it is kept until this tab is closed." }),
        el("label", { for: "key-field", text: "Key" }), field,
        el("div", { class: "buttons" },
          el("button", { value: "yes", class: "primary", text: "Use this key" }),
          el("button", { value: "no", text: "Cancel", formnovalidate: true }),
          el("button", { value: "out", text: "Log out", formnovalidate: true }))));
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "yes") tabStorage.setItem(STORED, field.value.trim());
      if (dialog.returnValue === "out") tabStorage.removeItem(STORED);
      dialog.remove();
      done(dialog.returnValue === "yes" || dialog.returnValue === "out");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Like `fetch`, with the key; an unsuccessful response is thrown as an error with the node's message. */
export async function request(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (options.body !== undefined) headers["Content-Type"] = "application/json";
  // Bypass the browser's cache, where a long stream would block other requests for the same URL.
  const answer = await fetch(base + path, { ...options, headers, cache: "no-store" }).catch((error) => {
    // Each browser words a failed connection differently.
    throw error.name === "AbortError" ? error : new Error("the node does not answer");
  });
  if (answer.ok) return answer;
  if (answer.status === 401) tell();
  let text = "";
  try {
    const error = (await answer.json()).error;
    text = typeof error === "string" ? error : error?.message;
  } catch { /* not JSON */ }
  const failure = new Error(text || `${path} answered with status ${answer.status}`);
  failure.status = answer.status;
  throw failure;
}

export async function getJson(path, seconds = 8) {
  return (await request(path, { signal: AbortSignal.timeout(seconds * 1000) })).json();
}

export async function send(method, path, body, signal) {
  const answer = await request(path, { method, body: JSON.stringify(body), signal });
  const text = await answer.text();
  return text ? JSON.parse(text) : {};
}

async function* pieces(answer, end) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    rest += value;
    const whole = rest.split(end);
    rest = whole.pop();
    yield* whole;
  }
  if (rest.trim()) yield rest;
}

/** Yield the records of a response with one JSON object per line. */
export async function* lines(answer) {
  for await (const line of pieces(answer, "\n")) if (line.trim()) yield JSON.parse(line);
}

/** Yield the data of server-sent events; null for a comment. (EventSource can't send a key.) */
export async function* serverEvents(answer) {
  for await (const block of pieces(answer, "\n\n")) {
    const data = block.split("\n").find((line) => line.startsWith("data: "));
    yield data ? JSON.parse(data.slice(6)) : null;
  }
}

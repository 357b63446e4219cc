// The chat, for trying a model. Conversations are stored in this browser.

import { byId, copyButton, el, keyed, say, setText } from "./dom.js";
import { number, shortModel } from "./format.js";
import { lines, request } from "./http.js";
import { markdown } from "./markdown.js";
import { browserStorage } from "./storage.js";
import { refreshModels, state } from "./store.js";

const STORED = "sollold.chats";
const MOST = 50;

const isMessage = (one) => typeof one?.role === "string" && typeof one.content === "string";

function stored() {
  try {
    const found = JSON.parse(browserStorage.getItem(STORED) || "[]");
    return Array.isArray(found) ? found.filter((one) => Array.isArray(one?.messages) && one.messages.every(isMessage)) : [];
  } catch { return []; }
}

/** Store `chat` together with the conversations that other tabs have stored meanwhile; return them all. */
function keep(chat) {
  return write([chat, ...stored().filter((one) => one.id !== chat.id)]);
}

function write(chats) {
  const kept = chats.filter((one) => one.messages.length).sort((a, b) => b.updated - a.updated).slice(0, MOST);
  // Pictures are large: if there is no room for them, only the text is kept.
  const plain = () => kept.map((one) => ({ ...one, messages: one.messages.map(({ images, ...rest }) => rest) }));
  for (const value of [() => kept, plain, () => plain().slice(0, 5)]) {
    try { browserStorage.setItem(STORED, JSON.stringify(value())); break; } catch { /* full: store less */ }
  }
  return kept;
}

const fresh = () => ({ id: `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`, messages: [], model: "", updated: 0 });
const titleOf = (chat) => chat.messages.find((one) => one.role === "user")?.content.slice(0, 60) || "New conversation";

export function chatView(place, wanted) {
  let chats = stored();
  let chat = wanted ? fresh() : chats[0] || fresh();
  let asked = false;
  let asking = null;
  let images = [];

  const model = el("select", { id: "chat-model", "aria-label": "Model" });
  const which = el("select", { id: "chat-which", "aria-label": "Conversation" });
  const newButton = el("button", { type: "button", text: "New", "aria-label": "New conversation" });
  const forget = el("button", { type: "button", class: "quiet", text: "Delete", "aria-label": "Delete this conversation" });
  const none = el("p", { class: "empty", hidden: true }, "There is no model to chat with yet. ", el("a", { href: "#/models", text: "Pull one" }),
    ", or put a GGUF file into the models folder of any machine.");
  const absent = el("p", { class: "notice", role: "status", hidden: true, text: `No machine that is online has ${wanted}; another model was selected.` });
  const talk = el("div", { class: "talk", id: "talk" });
  const message = el("textarea", { id: "message", rows: "2", "aria-label": "Message", placeholder: "Ask something. Enter sends, Shift+Enter starts a new line." });
  const sendButton = el("button", { type: "submit", class: "primary", text: "Send" });
  const stop = el("button", { type: "button", text: "Stop", hidden: true });
  const file = el("input", { type: "file", accept: "image/*", multiple: true, class: "visually-hidden", id: "chat-images", "aria-label": "Images to send" });
  const attach = el("label", { class: "button", for: "chat-images", text: "Picture", hidden: true });
  const attached = el("span", { class: "dim small" });
  const field = (id, words, attributes) => el("label", { for: id }, `${words} `, el("input", { id, type: "number", ...attributes }));
  const system = el("textarea", { id: "chat-system", rows: "2" });
  const think = el("select", { id: "chat-think" }, el("option", { value: "", text: "model default" }), el("option", { value: "yes", text: "yes" }), el("option", { value: "no", text: "no" }));
  const settings = el("details", { class: "settings" }, el("summary", { text: "Parameters" }), el("div", { class: "fields" },
    field("chat-temperature", "Temperature", { min: "0", max: "2", step: "0.1", placeholder: "default" }),
    field("chat-tokens", "Maximum tokens", { min: "1", step: "1", placeholder: "no limit" }),
    field("chat-context", "Context", { min: "1", step: "1", placeholder: "default" }),
    field("chat-seed", "Seed", { min: "0", step: "1", placeholder: "random" }),
    el("label", { for: "chat-think" }, "Think ", think),
    el("label", { class: "whole", for: "chat-system" }, "System prompt ", system)));
  const form = el("form", { class: "composer" }, message,
    el("div", { class: "buttons" }, sendButton, stop, file, attach, attached));
  place.append(el("div", { class: "title-row" }, el("h1", { text: "Chat" }), model, el("span", { class: "spacer" }), which, newButton, forget),
    none, absent, talk, form, settings);

  const offerModels = () => {
    const able = state.models.filter((one) => !one.unusable && (one.capabilities || []).includes("completion"));
    const named = able.find((one) => one.name === wanted || one.name === `${wanted}:latest`)?.name;
    const chosen = model.value || named || chat.model || able[0]?.name;
    absent.hidden = !wanted || !asked || !able.length || Boolean(named);
    keyed(model, able, (one) => one.name, (one) => el("option", { value: one.name, text: shortModel(one.name) }));
    if (able.some((one) => one.name === chosen)) model.value = chosen;
    sendButton.disabled = Boolean(asking) || !able.length;
    for (const button of talk.querySelectorAll("button.again")) button.disabled = !able.length;
    const nothing = asked && !able.length;
    none.hidden = !nothing;
    model.hidden = nothing;
    which.hidden = newButton.hidden = forget.hidden = nothing && !chats.length;
    talk.hidden = form.hidden = settings.hidden = nothing && !chat.messages.length;
    attach.hidden = file.hidden = !(able.find((one) => one.name === model.value)?.capabilities || []).includes("vision");
  };
  model.addEventListener("change", offerModels);

  const offerChats = () => {
    const all = chats.some((one) => one.id === chat.id) ? chats : [chat, ...chats];
    keyed(which, all, (one) => one.id, (one) => el("option", { value: one.id }), (option, one) => setText(option, titleOf(one)));
    which.value = chat.id;
  };
  const show = (next) => {
    asking?.abort();
    chat = next;
    talk.replaceChildren(...chat.messages.map((one, at) => bubble(one, at)));
    if (!chat.messages.length) talk.append(el("p", { class: "empty", text: "Ask the model something. What you write stays in this browser and in the cluster." }));
    // The answer failed, or the page was left before it began.
    if (chat.messages.at(-1)?.role === "user") talk.append(el("p", { class: "foot again" }, againButton("Ask again")));
    if (chat.model && [...model.options].some((one) => one.value === chat.model)) model.value = chat.model;
    offerChats();
    offerModels();
  };
  which.addEventListener("change", () => show(chats.find((one) => one.id === which.value) || fresh()));
  newButton.addEventListener("click", () => { show(fresh()); message.focus(); });
  forget.addEventListener("click", () => {
    chats = write(stored().filter((one) => one.id !== chat.id));
    show(chats[0] || fresh());
  });
  /** Store `mine`; if another tab has continued it meanwhile, both versions are kept. */
  const save = (mine, messages = mine.messages) => {
    const there = stored().find((one) => one.id === mine.id);
    if (there && there.updated > mine.updated) mine.id = fresh().id;
    mine.updated = Date.now();
    chats = keep({ ...mine, messages }).map((one) => (one.id === mine.id ? mine : one));
  };
  const elsewhere = (event) => {
    if (event.key !== STORED || asking) return;
    chats = stored();
    const same = chats.find((one) => one.id === chat.id);
    if (same && same.updated > chat.updated) show(same);
    else offerChats();
  };
  addEventListener("storage", elsewhere);

  function bubble(one, at) {
    const node = el("article", { class: `bubble ${one.role}`, "aria-label": one.role === "user" ? "You" : "Answer" });
    if (one.role === "user") {
      node.append(el("p", { class: "plain-text", text: one.content }));
      for (const image of one.images || []) node.append(el("img", { src: `data:image;base64,${image}`, alt: "attached picture" }));
    } else {
      if (one.thinking) node.append(el("details", { class: "thinking" }, el("summary", { text: "Thinking" }), el("p", { class: "plain-text", text: one.thinking })));
      const said = el("div", { class: "said" });
      markdown(said)(one.content);
      node.append(said, foot(one.note || "", one, at));
    }
    return node;
  }

  function foot(words, one, at) {
    const line = el("p", { class: "dim small foot" }, el("span", { text: words }));
    if (one) {
      line.append(copyButton(() => one.content));
      if (at === chat.messages.length - 1) line.append(againButton("Regenerate"));
    }
    return line;
  }

  /** Focus the message instead of a button that is about to disappear or to be disabled, if the keyboard is used. */
  function leave(button) {
    if (button.matches(":focus-visible")) message.focus();
  }

  /** Make a button that asks the last question again. */
  function againButton(text) {
    return el("button", { type: "button", class: "quiet small again", text, disabled: !model.value, on: { click: (event) => {
      if (asking || !model.value) return;
      leave(event.currentTarget);
      if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
      show(chat);
      answer();
    } } });
  }

  function parameters() {
    const options = {};
    for (const [id, name] of [["chat-temperature", "temperature"], ["chat-tokens", "num_predict"], ["chat-context", "num_ctx"], ["chat-seed", "seed"]]) {
      const text = byId(id).value;
      if (text !== "" && !Number.isNaN(Number(text))) options[name] = Number(text);
    }
    return options;
  }

  async function answer() {
    const mine = chat;
    asking = new AbortController();
    const control = asking;
    mine.model = model.value;
    sendButton.disabled = true;
    stop.hidden = false;
    const said = el("div", { class: "said" });
    const thought = el("p", { class: "plain-text" });
    const thinking = el("details", { class: "thinking", hidden: true }, el("summary", { text: "Thinking" }), thought);
    const status = el("p", { class: "dim small foot", text: "waiting for the model …" });
    const node = el("article", { class: "bubble assistant", "aria-label": "Answer", "aria-busy": "true" }, thinking, said, status);
    talk.querySelector(".empty")?.remove();
    for (const button of talk.querySelectorAll(".again")) button.remove();
    talk.append(node);
    node.scrollIntoView({ block: "nearest" });
    const draw = markdown(said);
    const got = { role: "assistant", content: "", thinking: "", note: "" };
    // If the page is reloaded, the partial answer is kept.
    const over = new AbortController();
    const leaving = () => {
      if (got.content) save(mine, [...mine.messages, { ...got, note: "stopped" }]);
      control.abort();
    };
    // Browsers differ in which event they send; the answer's connection is closed between the two.
    for (const kind of ["beforeunload", "pagehide"]) addEventListener(kind, leaving, { signal: over.signal });
    let waiting = false;
    const soon = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        const low = innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
        draw(got.content);
        if (got.thinking) { thinking.hidden = false; setText(thought, got.thinking); }
        if (low) scrollTo(0, document.documentElement.scrollHeight);
      });
    };
    const began = performance.now();
    let tokens = 0;
    let first = 0;
    try {
      const messages = mine.messages.map(({ role, content, images: pictures }) => (pictures?.length ? { role, content, images: pictures } : { role, content }));
      if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
      const body = { model: model.value, messages, options: parameters() };
      if (think.value) body.think = think.value === "yes";
      const reply = await request("/api/chat", { method: "POST", signal: control.signal, body: JSON.stringify(body) });
      for await (const record of lines(reply)) {
        if (record.error) throw new Error(record.error);
        if (record._waiting) setText(status, `${record._waiting} …`);
        const piece = record.message || {};
        if (piece.content || piece.thinking) {
          tokens += 1;
          first = first || performance.now();
          got.content += piece.content || "";
          got.thinking += piece.thinking || "";
          const seconds = (performance.now() - first) / 1000;
          setText(status, seconds > 0.5 ? `${number(tokens / seconds)} tokens/s` : "answering …");
          soon();
        }
        if (record.done) {
          const routing = record._routing || {};
          const words = [];
          if (routing.node) words.push(`${routing.devices?.length > 1 ? "over " : ""}${routing.devices?.length > 1 ? routing.devices.join(", ") : `on ${routing.node}`}`);
          if (record.eval_count && record.eval_duration) words.push(`${number(record.eval_count / (record.eval_duration / 1e9))} tokens/s`);
          if (record.eval_count) words.push(`${record.eval_count} tokens`);
          if (first) words.push(`first token after ${number((first - began) / 1000)} s`);
          if (routing.resumed) words.push("resumed after a fault");
          if (record.done_reason === "length") words.push("cut off at the limit");
          got.note = words.join(" · ");
        }
      }
      say(`Answer finished: ${tokens} tokens`);
    } catch (error) {
      // Each browser words a broken connection differently.
      const words = error instanceof TypeError ? "The connection to the node was lost." : error.message;
      got.note = error.name === "AbortError" ? "stopped" : words;
      if (error.name !== "AbortError") { status.className = "bad-text small"; say(words); }
    }
    over.abort();
    if (asking === control) asking = null;
    draw(got.content);
    // A stopped answer becomes part of the conversation; one that never began does not.
    if (got.content || got.thinking) {
      mine.messages.push(got);
      save(mine);
      node.replaceWith(bubble(got, mine.messages.length - 1));
    } else {
      setText(status, got.note || "The answer is empty.");
      node.append(el("p", { class: "foot again" }, againButton("Ask again")));
      node.removeAttribute("aria-busy");
    }
    sendButton.disabled = false;
    stop.hidden = true;
    if (chat === mine) offerChats();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = message.value.trim();
    if (!text || asking || !model.value) return;
    leave(sendButton);
    const said = { role: "user", content: text, ...(images.length ? { images } : {}) };
    chat.messages.push(said);
    save(chat);
    talk.querySelector(".empty")?.remove();
    talk.append(bubble(said, chat.messages.length - 1));
    message.value = "";
    images = [];
    setText(attached, "");
    answer();
  });
  message.addEventListener("keydown", (event) => {
    // While an input method is composing, Enter selects a word.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    form.requestSubmit();
  });
  stop.addEventListener("click", () => { leave(stop); asking?.abort(); });
  file.addEventListener("change", async () => {
    images = await Promise.all([...file.files].slice(0, 4).map((one) => new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(String(reader.result).split(",")[1]);
      reader.readAsDataURL(one);
    })));
    setText(attached, images.length ? `${images.length} attached` : "");
    file.value = "";
  });

  show(chat);
  refreshModels().then(() => { asked = true; offerModels(); }).catch((error) => talk.append(el("p", { class: "bad-text", text: error.message })));
  return () => {
    removeEventListener("storage", elsewhere);
    asking?.abort();
  };
}

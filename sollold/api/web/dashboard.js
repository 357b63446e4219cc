"use strict";
// The dashboard: asks the node for the cluster every two seconds while the page is looked at, and talks to
// its chat. Text from outside goes into the page as text only.

const byId = (id) => document.getElementById(id);

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${count >= 100 || unit === 0 ? count.toFixed(0) : count.toFixed(1)} ${units[unit]}`;
}

function span(seconds) {
  seconds = Math.round(seconds);
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

function tag(card, text, kind) { card.append(make("span", `tag ${kind || ""}`, text)); }

function nodeCard(node) {
  const card = make("article", "card");
  const title = make("h3", "", node.name);
  if (node.me) tag(title, "this node");
  if (node.leader) tag(title, "leader", "good");
  if (node.draining) tag(title, "draining", "bad");
  card.append(title);
  const address = make("p", "dim");
  const link = make("a", "", node.url.replace("http://", ""));
  link.href = node.url;
  address.append(link, ` · ${node.build ? `llama.cpp ${node.build}` : node.setup || "no llama.cpp yet"}`);
  card.append(address);
  for (const device of node.devices) {
    const limit = Math.max(1, Math.min(device.limit, device.total) || device.total);
    const bar = make("div", "bar");
    const granted = make("span");
    granted.style.width = `${Math.min(100, (100 * device.granted) / limit)}%`;
    const other = make("span", "other");
    other.style.width = `${Math.max(0, (100 * (limit - device.granted - device.available)) / limit)}%`;
    bar.append(granted, other);
    const words = `${device.id}${device.kind === "gpu" ? ` ${device.name}` : ""}: `
      + `${bytes(device.granted)} granted, ${bytes(device.available)} free of ${bytes(limit)}`;
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", words);
    card.append(bar, make("p", "dim", words));
  }
  return card;
}

// The output counts as one more layer behind the last; people know it by its name.
function layerRange(placed, layers) {
  const last = Math.min(placed.last, layers || placed.last);
  const words = [];
  if (last > placed.first) words.push(last === placed.first + 1 ? `${placed.first}` : `${placed.first}–${last - 1}`);
  if (layers && placed.last > layers) words.push("output");
  return words.join(" + ") || "embedding";
}

function deploymentCard(found) {
  const card = make("article", "card");
  const title = make("h3", "", found.model);
  const loading = found.state === "loading" || found.state === "starting";
  const state = loading ? `${found.state} ${Math.round(found.progress * 100)} %` : found.state;
  tag(title, state, found.state === "ready" ? "good" : found.state === "failed" ? "bad" : "");
  tag(title, found.backend);
  card.append(title);
  if (found.reason) card.append(make("p", "", found.reason));
  if (found.placed.length) {
    const bar = make("div", "layers");
    for (const placed of found.placed) {
      const count = Math.max(0, placed.last - placed.first);
      const range = layerRange(placed, found.layers);
      const words = `${placed.node_name} ${placed.device}: ${range}, ${bytes(placed.bytes)}`;
      const piece = make("span", "", words);
      piece.title = words;
      piece.style.flex = `${Math.max(count, 0.3)} 1 0`;
      bar.append(piece);
    }
    card.append(bar);
  }
  const words = [`answers on ${found.node_name}`];
  if (found.bytes) words.push(bytes(found.bytes));
  if (found.context) words.push(`context ${found.context}`);
  words.push(`${found.active} active${found.waiting ? `, ${found.waiting} waiting` : ""}`);
  if (found.speed) words.push(`${found.speed.toFixed(1)} tokens/s`);
  if (found.pinned || found.expires < 0) words.push("stays loaded");
  else if (found.expires > 0) words.push(`unloads in ${span(found.expires)} of idleness`);
  card.append(make("p", "dim", words.join(" · ")));
  return card;
}

function requestTable(requests) {
  if (!requests.length) return make("p", "dim", "none at the moment");
  const box = make("div", "scroll");
  const table = make("table");
  const head = make("tr");
  for (const name of ["model", "route", "stage", "node", "events", "time"]) head.append(make("th", "", name));
  table.append(head);
  for (const one of requests) {
    const row = make("tr");
    for (const text of [one.model, one.path, one.stage, one.node, one.events, span(one.seconds)]) {
      row.append(make("td", "", text));
    }
    table.append(row);
  }
  box.append(table);
  return box;
}

function show(state) {
  const count = state.nodes.length;
  const leader = state.leader_name || "none yet";
  byId("headline").textContent =
    `${count} node${count === 1 ? "" : "s"}, leader ${leader} (term ${state.term}), seen from ${state.name}`;
  byId("warning").hidden = !state.open;
  byId("nodes").replaceChildren(...state.nodes.map(nodeCard));
  const running = state.deployments.map(deploymentCard);
  byId("running").replaceChildren(
    ...(running.length ? running : [make("p", "dim", "none; the first request for a model loads it")]));
  byId("requests").replaceChildren(requestTable(state.requests));
}

async function getJson(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(8000) });
  if (!answer.ok) throw new Error(`${path}: status ${answer.status}`);
  return answer.json();
}

let models = "";

async function refreshModels() {
  const found = (await getJson("/api/tags")).models.filter(
    (one) => !one.unusable && (one.capabilities || []).includes("completion"));
  const names = found.map((one) => one.name);
  if (names.join("\n") === models) return;
  models = names.join("\n");
  const select = byId("model");
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => { const o = make("option", "", name); o.value = name; return o; }));
  if (names.includes(chosen)) select.value = chosen;
}

let round = 0;

async function watch() {
  if (!document.hidden) {
    try {
      show(await getJson("/api/cluster"));
      if (round % 5 === 0) await refreshModels();
      round += 1;
      byId("trouble").hidden = true;
    } catch (error) {
      byId("trouble").textContent = `The node does not answer (${error.message}); asking again.`;
      byId("trouble").hidden = false;
    }
  }
  setTimeout(watch, 2000);
}

// The chat.

let history = [];
let asking = null;

async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    rest += value;
    const whole = rest.split("\n");
    rest = whole.pop();
    for (const line of whole) if (line.trim()) yield JSON.parse(line);
  }
}

async function ask(event) {
  event.preventDefault();
  const text = byId("message").value.trim();
  if (!text || asking) return;
  asking = new AbortController();
  byId("message").value = "";
  byId("send").disabled = true;
  byId("stop").hidden = false;
  byId("talk").append(make("div", "user", text));
  const box = make("div", "assistant");
  const thought = make("span", "thinking");
  const said = make("span", "", "");
  const source = make("span", "source", "…");
  box.append(thought, said, source);
  byId("talk").append(box);
  const messages = [...history, { role: "user", content: text }];
  try {
    const answer = await fetch("/api/chat", {
      method: "POST", signal: asking.signal, body: JSON.stringify({ model: byId("model").value, messages }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error || `status ${answer.status}`);
    for await (const record of lines(answer)) {
      if (record.error) throw new Error(record.error);
      thought.textContent += record.message.thinking || "";
      said.textContent += record.message.content || "";
      if (record._waiting) source.textContent = `${record._waiting} …`;
      if (record.done) {
        const routing = record._routing || {};
        const speed = record.eval_duration ? `, ${(record.eval_count / (record.eval_duration / 1e9)).toFixed(1)} tokens/s` : "";
        source.textContent = `${routing.backend || ""} on ${routing.node || "?"}${speed}`;
      }
    }
    history = [...messages, { role: "assistant", content: said.textContent }];
  } catch (error) {
    source.textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    asking = null;
    byId("send").disabled = false;
    byId("stop").hidden = true;
    byId("message").focus();
  }
}

byId("chat").addEventListener("submit", ask);
byId("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) ask(event);
});
byId("stop").addEventListener("click", () => asking && asking.abort());
byId("clear").addEventListener("click", () => {
  if (asking) asking.abort();
  history = [];
  byId("talk").replaceChildren();
});
watch();

// The cluster as a picture: machines with their devices, the layers of models as bands, links between them.

import { actionButton } from "./actions.js";
import { el, keyed, setAttribute, setText, svg } from "./dom.js";
import { bytes, clock, colourOf, duration, isolated, layerRange, number, shortModel, shortName, stateText } from "./format.js";
import { send } from "./http.js";
import { onState, refreshModels, state } from "./store.js";
import { sparkline } from "./plot.js";
import { recentHistory } from "./history.js";
import { showEvents, showWaiting } from "./doctor.js";

const modelLink = (name) => `#/model/${encodeURIComponent(name)}`;

export function clusterView(place) {
  const figures = el("dl", { class: "figures" });
  const spark = sparkline("tokens per second, the last two minutes");
  const open = el("p", { class: "notice", hidden: true },
    "This is an open cluster: any machine on this network can join it. ", el("code", { text: "sollold cluster secure" }),
    " gives it a secret.");
  const waiting = el("section", { hidden: true });
  const links = svg("svg", { class: "links", "aria-hidden": "true" });
  const machines = el("ul", { class: "machines", "aria-label": "Machines" });
  const picture = el("div", { class: "picture" }, links, machines);
  const running = el("ul", { class: "running plain" });
  const none = el("p", { class: "empty", hidden: true }, el("span"), " ", el("a", { href: "#/models", text: "Models" }));
  const alone = el("p", { class: "dim small", hidden: true, text: "Only this machine so far. Start sollold on another machine on this network, and it will appear here." });
  const events = el("ol", { class: "events plain" });
  const quiet = el("p", { class: "empty", hidden: true, text: "Nothing has happened since this node started." });
  const runningTitle = el("h2", { text: "Running models" });
  const eventsTitle = el("h2", { text: "Events" });
  place.append(
    el("h1", { class: "visually-hidden", text: "Cluster" }), open, waiting,
    el("div", { class: "summary" }, figures, spark.node),
    el("h2", { class: "visually-hidden", text: "Machines" }), picture, alone, legend(),
    el("div", { class: "columns" },
      el("section", {}, runningTitle, running, none),
      el("section", {}, eventsTitle, events, quiet)));

  const draw = () => {
    const cluster = state.cluster;
    open.hidden = !cluster.open;
    showWaiting(waiting);
    showFigures(figures, cluster);
    const everybody = [...cluster.nodes, ...(cluster.offline || []).map((one) => ({ ...one, offline: true, devices: [] }))];
    machines.classList.toggle("many", everybody.length > 8);
    keyed(machines, everybody, (one) => `${one.node}${one.offline ? "-" : ""}`, makeMachine, (node, one) => updateMachine(node, one, cluster));
    keyed(running, cluster.deployments, (one) => `${one.node}/${one.id}`, makeRunning, updateRunning);
    none.hidden = cluster.deployments.length > 0;
    setText(none.firstChild, state.models.length ? "No model is loaded. The first request for one loads it; or load one under"
      : "There is no model yet. Pull one, or watch a pull, under");
    alone.hidden = everybody.length > 1;
    showEvents(events, state.events.slice(-12));
    quiet.hidden = state.events.length > 0;
    drawLinks(links, machines, cluster);
  };
  const resized = new ResizeObserver(() => { if (state.cluster) drawLinks(links, machines, state.cluster); });
  resized.observe(machines);
  const endState = onState(draw);
  refreshModels().catch(() => {});
  const endHistory = recentHistory((total) => spark.show(total.tokens_per_second, "tokens/s"));
  return () => { endState(); endHistory(); resized.disconnect(); };
}

function showFigures(list, cluster) {
  const sum = (name) => cluster.nodes.reduce((total, node) => total + node[name], 0);
  const active = cluster.deployments.reduce((total, one) => total + one.active, 0);
  const waiting = cluster.deployments.reduce((total, one) => total + one.waiting, 0);
  const inState = (...states) => cluster.deployments.filter((one) => states.includes(one.state)).length;
  const loading = inState("loading", "starting");
  const failed = inState("failed");
  const rows = [
    ["machines", String(cluster.nodes.length), cluster.offline?.length ? `${cluster.offline.length} offline` : cluster.nodes.length > 1 ? "all online" : "online"],
    ["memory free", bytes(sum("available")), `of ${bytes(sum("total"))}`],
    ["models loaded", String(inState("ready")),
      [loading ? `${loading} loading` : "", failed ? `${failed} failed` : ""].filter(Boolean).join(", ")],
    ["requests", String(active), waiting ? `${waiting} waiting` : "none waiting"],
  ];
  keyed(list, rows, (row) => row[0],
    (row) => el("div", {}, el("dt", { text: row[0] }), el("dd", {}, el("b"), " ", el("span", { class: "dim" }))),
    (node, row) => { setText(node.querySelector("b"), row[1]); setText(node.querySelector("span"), row[2]); });
}

function badges(node) {
  const found = [];
  if (node.offline) found.push([node.stopped ? "stopped" : "offline", "bad"]);
  if (node.me) found.push(["this node", ""]);
  if (node.leader) found.push(["leader", "good"]);
  if (node.draining) found.push([node.empty ? "drained" : "draining", "warn"]);
  return found;
}

function makeMachine(node) {
  return el("li", { class: "machine", "data-node": node.node },
    el("div", { class: "machine-head" }, el("h3", { text: node.name, title: node.name }), el("span", { class: "tags" })),
    el("div", { class: "devices" }),
    el("p", { class: "dim small about" }),
    el("div", { class: "buttons" }));
}

function updateMachine(card, node, cluster) {
  card.classList.toggle("is-offline", Boolean(node.offline));
  card.classList.toggle("is-draining", Boolean(node.draining));
  setText(card.querySelector("h3"), node.name);
  keyed(card.querySelector(".tags"), badges(node), (one) => one[0],
    (one) => el("span", { class: `tag ${one[1]}`, text: one[0] }));
  keyed(card.querySelector(".devices"), node.devices, (one) => one.id, makeDevice,
    (place, device) => updateDevice(place, device, node, cluster));
  const about = card.querySelector(".about");
  if (node.offline) {
    const held = node.held.reduce((total, one) => total + one.bytes, 0);
    const models = [...new Set([...node.held.map((one) => one.model), ...node.served])].map(shortModel).join(", ");
    setText(about, `since ${clock(node.since)}${held ? `; it held ${bytes(held)} of ${models}` : models ? `; it served ${models}` : ""}`);
    keyed(card.querySelector(".buttons"), [node], () => "remove", () => actionButton("Remove from the list",
      `Remove from the list (${node.name})`, () => send("POST", "/api/cluster/forget", { node: node.node })));
    return;
  }
  const from = cluster.nodes.find((one) => one.me);
  const link = from?.links.find((one) => one.node === node.node);
  const words = [node.build ? `llama.cpp ${node.build}` : node.setup || "no llama.cpp yet"];
  if (link) words.push(`${number(link.round_trip_ms)} ms from ${shortName(from.name)}`);
  if (link?.bytes_per_second) words.push(`${bytes(link.bytes_per_second)}/s`);
  keyed(about, [node.url, ...words], (one) => one,
    (one) => one === node.url ? el("a", { href: node.url, text: node.url.replace(/^https?:\/\//, "") }) : el("span", { text: one }));
  keyed(card.querySelector(".buttons"), [node.draining ? "undrain" : "drain"], (one) => one, (one) => one === "drain"
    ? actionButton("Drain", `Drain ${node.name}: finish running requests and take no new ones`, () => drain(node, true))
    : actionButton("Take requests again", `Let ${node.name} take requests again`, () => drain(node, false)));
}

const drain = (node, on) => send("POST", "/api/cluster/drain", { node: node.node, on });

function makeDevice() {
  return el("div", { class: "device" },
    el("p", { class: "small" }, el("span", { class: "device-name" }), el("span", { class: "dim device-free" })),
    el("div", { class: "bar", role: "img" }));
}

function updateDevice(place, device, node, cluster) {
  const total = Math.max(1, Math.min(device.limit || device.total, device.total || device.limit));
  const bands = [];
  for (const one of cluster.deployments) {
    // A failed one has released its memory.
    for (const share of one.state === "failed" ? [] : one.placed) {
      if (share.node === node.node && share.device === device.id && share.bytes > 0) {
        bands.push({ key: `${one.id}/${share.first}`, model: one.model, share, layers: one.layers, state: one.state, active: one.active });
      }
    }
  }
  const banded = bands.reduce((sum, band) => sum + band.share.bytes, 0);
  const other = Math.max(0, total - device.available - Math.max(banded, device.granted));
  const reserved = Math.max(0, device.granted - banded);
  const named = device.kind === "cpu" ? "CPU" : device.id;
  const short = device.name.replace(/^(NVIDIA|AMD|Intel)(\(R\))?\s+(GeForce\s+)?/i, "");
  setText(place.querySelector(".device-name"), device.kind === "gpu" ? `${named} · ${short}` : named);
  place.querySelector(".device-name").title = device.name;
  setText(place.querySelector(".device-free"), `${bytes(device.available)} free of ${bytes(total)}`);
  const bar = place.querySelector(".bar");
  const parts = [...bands.map((band) => ({ ...band, bytes: band.share.bytes }))];
  if (reserved > total / 200) parts.push({ key: "reserved", bytes: reserved, kind: "reserved", words: "reserved" });
  if (other > total / 200) parts.push({ key: "other", bytes: other, kind: "other", words: "other programs" });
  keyed(bar, parts, (part) => part.key, () => el("span", {}, el("i")), (piece, part) => {
    const words = part.kind ? `${part.words}: ${bytes(part.bytes)}`
      : `${shortModel(part.model)}, layers ${layerRange(part.share, part.layers)}: ${bytes(part.bytes)}`;
    piece.className = part.kind || `band ${colourOf(part.model)}${part.state === "ready" ? "" : " pending"}`;
    piece.style.width = `${Math.min(100, 100 * part.bytes / total)}%`;
    setText(piece.querySelector("i"), part.kind ? "" : layerRange(part.share, part.layers));
    setAttribute(piece, "title", words);
  });
  const spoken = bands.map((band) => `${shortModel(band.model)} layers ${layerRange(band.share, band.layers)}, ${bytes(band.share.bytes)}`);
  setAttribute(bar, "aria-label", `${named}: ${bytes(device.available)} free of ${bytes(total)}${spoken.length ? `; ${spoken.join("; ")}` : ""}`);
}

function makeRunning(one) {
  return el("li", { class: "run" },
    el("div", { class: "run-head" },
      el("span", { class: "run-title" }, el("span", { class: `dot ${colourOf(one.model)}`, "aria-hidden": "true" }),
        el("a", { class: "run-name", href: modelLink(one.model), text: shortModel(one.model), title: one.model })),
      el("span", { class: "tags" }),
      actionButton("Unload", `Unload ${one.model}`, () => send("POST", "/api/cluster/unload", { model: one.id }))),
    el("div", { class: "layers", role: "img" }),
    el("p", { class: "small reason" }),
    el("p", { class: "dim small words" }),
    el("p", { class: "small again", hidden: true }, "Load it again, or see its engine log: ", el("a", { href: modelLink(one.model), text: "its page" })));
}

/** Show why a deployment failed, or what it waits for. */
export function showReason(place, one) {
  setText(place, one.reason);
  place.hidden = !one.reason;
  place.classList.toggle("bad-text", one.state === "failed");
}

export function runningWords(one) {
  const node = shortName(one.node_name);
  if (one.state === "failed") return `failed on ${node}${one.bytes ? `, where it had ${bytes(one.bytes)}` : ""}`;
  const words = [one.state === "ready" ? `answers on ${node}` : `will answer on ${node}`];
  if (one.bytes) words.push(bytes(one.bytes));
  if (one.context) words.push(`${one.context} tokens of context`);
  if (one.state === "ready") words.push(`${one.active} active${one.waiting ? `, ${one.waiting} waiting` : ""}`);
  if (one.speed) words.push(`${number(one.speed)} tokens/s`);
  if (one.speculation) words.push(draftWords(one.speculation));
  if (one.state === "ready" && (one.pinned || one.expires < 0)) words.push("stays loaded");
  else if (one.state === "ready" && one.expires > 0) words.push(`unloads ${one.active ? "after" : "in"} ${duration(one.expires)} without requests`);
  return words.join(" · ");
}

function draftWords({ by, drafted, acceptance }) {
  const accepted = drafted ? `${number(100 * acceptance)} % accepted` : "none accepted or rejected yet";
  return `drafts by ${by}, ${accepted}`;
}

export function updateLayers(bar, { placed, layers, model, state: now }) {
  const ready = now === "ready";
  const shown = placed.filter((share) => share.last > share.first);
  keyed(bar, shown, (share) => `${share.node}/${share.device}/${share.first}`, () => el("span"), (piece, share) => {
    const name = isolated(share.node_name);
    const words = `${name} ${share.device}: ${layerRange(share, layers)}, ${bytes(share.bytes)}`;
    piece.className = `band ${colourOf(model)}${ready ? "" : " pending"}`;
    piece.style.flexGrow = String(Math.max(0.3, share.last - share.first));
    // A narrow piece has room for only one of the two.
    setText(piece, shown.length > 8 ? layerRange(share, layers) : `${name} ${layerRange(share, layers)}`);
    setAttribute(piece, "title", words);
  });
  bar.hidden = !shown.length;
  setAttribute(bar, "aria-label", shown.map((share) => `${share.node_name} ${share.device} layers ${layerRange(share, layers)}, ${bytes(share.bytes)}`).join("; "));
}

function updateRunning(node, one) {
  const kind = one.state === "ready" ? "good" : one.state === "failed" ? "bad" : "warn";
  keyed(node.querySelector(".tags"), [[stateText(one), kind], [one.backend, ""]], (tag) => tag[0],
    (tag) => el("span", { class: `tag ${tag[1]}`, text: tag[0] }));
  node.classList.toggle("busy", one.active > 0);
  updateLayers(node.querySelector(".layers"), one);
  showReason(node.querySelector(".reason"), one);
  setText(node.querySelector(".words"), runningWords(one));
  node.querySelector(".again").hidden = one.state !== "failed";
}

function legend() {
  const entry = (kind, words) => el("li", {}, el("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), words);
  return el("ul", { class: "legend plain small dim", "aria-label": "Legend" },
    entry("c0 band", "a model's layers, by number"), entry("c0 band pending", "loading"), entry("reserved", "reserved"),
    entry("other", "other programs"), entry("", "free"));
}

const linkWords = (link) => `${number(link.round_trip_ms)} ms${link.bytes_per_second ? `, ${bytes(link.bytes_per_second)}/s` : ""}`;

// Draws a line for each step of a model between machines, in its colour, with what was measured of the link.
function drawLinks(picture, machines, cluster) {
  const frame = machines.getBoundingClientRect();
  const cards = new Map([...machines.children].map((card) => [card.dataset.node, card.getBoundingClientRect()]));
  const alive = new Set(cluster.nodes.map((one) => one.node));
  const steps = [];
  for (const one of cluster.deployments.filter((each) => each.state !== "failed")) {
    const way = [];
    for (const share of one.placed) if (alive.has(share.node) && share.node !== way.at(-1) && share.last > share.first) way.push(share.node);
    for (let at = 1; at < way.length; at += 1) steps.push({ key: `${one.id}/${at}`, model: one.model, active: one.active > 0, from: way[at - 1], to: way[at] });
  }
  setAttribute(picture, "viewBox", `0 0 ${frame.width} ${frame.height}`);
  setAttribute(picture, "width", frame.width);
  setAttribute(picture, "height", frame.height);
  const between = new Map();
  keyed(picture, steps.filter((step) => cards.has(step.from) && cards.has(step.to)), (step) => step.key,
    () => svg("g", {}, svg("path", { fill: "none" }), svg("text"), svg("text")),
    (group, step) => {
      const pair = [step.from, step.to].sort().join();
      const place = between.get(pair) || 0;
      between.set(pair, place + 1);
      const way = wayBetween(cards.get(step.from), cards.get(step.to), frame, place * 14);
      setAttribute(group, "class", `${colourOf(step.model)}${step.active ? " flows" : ""}`);
      setAttribute(group.firstChild, "d", way.d);
      const link = cluster.nodes.find((one) => one.node === step.from)?.links.find((one) => one.node === step.to)
        || cluster.nodes.find((one) => one.node === step.to)?.links.find((one) => one.node === step.from);
      const words = link && !place ? linkWords(link) : "";
      const rows = way.y.length > 1 ? words.split(", ") : [words];
      [...group.querySelectorAll("text")].forEach((label, at) => {
        setText(label, rows[at] || "");
        setAttribute(label, "text-anchor", way.anchor);
        setAttribute(label, "x", way.x);
        setAttribute(label, "y", way.y[at] ?? 0);
      });
    });
}

function wayBetween(a, b, frame, shift) {
  const mid = (box) => ({ x: (box.left + box.right) / 2 - frame.left, y: (box.top + box.bottom) / 2 - frame.top });
  const sameRow = Math.abs(a.top - b.top) < 8;
  if (sameRow) {
    const [left, right] = a.left < b.left ? [a, b] : [b, a];
    const y = Math.min(left.bottom, right.bottom) - frame.top - 26 - shift;
    const x1 = left.right - frame.left;
    const x2 = right.left - frame.left;
    const far = x2 - x1 > left.width / 2;
    return { d: `M${x1} ${y} L${x2} ${y}`, x: far ? x1 + 28 : (x1 + x2) / 2, y: [y - 6, y + 15], anchor: "middle" };
  }
  const [upper, lower] = a.top < b.top ? [a, b] : [b, a];
  const x1 = mid(upper).x + shift;
  const x2 = mid(lower).x + shift;
  const y1 = upper.bottom - frame.top;
  const y2 = lower.top - frame.top;
  const bend = Math.max(18, (y2 - y1) / 2);
  const straight = Math.abs(x1 - x2) < 2;
  return {
    d: straight ? `M${x1} ${y1} L${x2} ${y2}` : `M${x1} ${y1} C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`,
    x: x1 + 8, y: [y1 + 16], anchor: "start",
  };
}



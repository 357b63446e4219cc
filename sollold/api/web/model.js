// A model's page: its properties, where each copy of it runs layer by layer, and why it was placed there.

import { el, keyed, scrolling, setText } from "./dom.js";
import { bytes, count, duration, layerRange, number, shortModel, stateText } from "./format.js";
import { getJson, send } from "./http.js";
import { onState, refresh, refreshModels, state } from "./store.js";
import { runningWords, showReason, updateLayers } from "./cluster.js";
import { showPlan } from "./plan.js";
import { requestTable } from "./requests.js";

export function modelView(place, name) {
  const facts = el("dl", { class: "facts" });
  const running = el("div", { class: "running" });
  const none = el("p", { class: "empty", hidden: true, text: "It is not loaded." });
  const whyTitle = el("h2", { text: "Where it would be placed, and why" });
  const why = el("div", { text: "planning …", class: "dim" });
  const logs = el("div", {}, el("button", { type: "button", text: "Show", on: { click: () => showLogs(logs, name) } }));
  const requests = requestTable("Requests for this model through this node");
  const load = el("button", { type: "button", class: "primary", text: "Load" });
  const trouble = el("p", { class: "bad-text", role: "alert" });
  const chat = el("a", { class: "button", href: `#/chat/${encodeURIComponent(name)}`, text: "Chat" });
  const about = el("div");
  const gone = el("p", { class: "empty", hidden: true }, "No machine that is online has this model. To download it, or to choose another: ",
    el("a", { href: "#/models", text: "Models" }), ".");
  load.addEventListener("click", async () => {
    // A disabled button would lose the focus.
    if (load.ariaBusy === "true") return;
    load.ariaBusy = "true";
    setText(trouble, "");
    try { await send("POST", "/api/cluster/load", { model: name }); } catch (error) { setText(trouble, error.message); }
    load.ariaBusy = "false";
    refresh();
    explain();
  });
  place.append(
    el("div", { class: "title-row" }, el("h1", { text: shortModel(name), title: name }), load, chat), gone, about);
  about.append(
    trouble, facts,
    el("h2", { text: "Where it runs" }), running, none,
    whyTitle, why,
    el("h2", { text: "Requests through this node" }), requests.node,
    el("h2", { text: "Engine log" }), logs);

  const explain = async () => {
    try {
      const found = await send("POST", "/api/cluster/plan", { model: name });
      why.className = "";
      why.replaceChildren(showPlan(found));
      const placed = state.cluster.deployments.filter((one) => meant(one.model) && one.state === "ready").map((one) => places(one.placed));
      const planned = places(found.plan?.shares || []);
      setText(whyTitle, placed.includes(planned) ? "Why it is placed this way"
        : placed.length ? "Where it would be placed now" : "Where it would be placed, and why");
    } catch (error) { setText(why, error.message); }
  };
  const places = (shares) => shares.filter((one) => one.last > one.first).map((one) => `${one.node}/${one.device}/${one.first}`).sort().join();
  const meant = (other) => other === name || other === `${name}:latest`;
  let explained = false;
  let asked = false;
  const draw = () => {
    const found = state.cluster.deployments.filter((one) => meant(one.model));
    const model = state.models.find((one) => meant(one.name));
    const missing = asked && !model && !found.length;
    gone.hidden = !missing;
    about.hidden = missing;
    chat.hidden = missing;
    if (asked && !missing && !explained) { explained = true; explain(); }
    load.hidden = missing || found.some((one) => one.state !== "failed");
    none.hidden = found.length > 0;
    keyed(running, found, (one) => `${one.node}/${one.id}`, makeDeployment, updateDeployment);
    if (model) showFacts(facts, model);
  };
  const showRequests = async () => {
    try {
      const shown = await getJson("/api/cluster/requests");
      const mine = (one) => shortModel(one.model) === shortModel(name);
      requests.show(shown.active.filter(mine), shown.recent.filter(mine));
    } catch { /* an older node */ }
  };
  const end = onState(draw);
  refreshModels().then(() => { asked = true; if (state.cluster) draw(); }).catch((error) => setText(trouble, error.message));
  showRequests();
  const timer = setInterval(showRequests, 3000);
  return () => { end(); clearInterval(timer); };
}

async function showLogs(place, name) {
  try {
    const { logs } = await getJson(`/api/cluster/logs/${encodeURIComponent(name)}?lines=60`, 15);
    place.replaceChildren(...(logs.length ? logs.map((one) => el("details", { open: true },
      el("summary", { text: `${one.node} ${one.process}` }), el("pre", { tabindex: "0", text: one.text }))) : [el("p", { class: "empty", text: "The log is empty." })]));
    place.querySelector("summary")?.focus({ preventScroll: true });
  } catch (error) { place.append(el("p", { class: "bad-text", text: error.message })); }
}

function showFacts(list, model) {
  const rows = [
    ["architecture", model.details.family], ["parameters", model.details.parameter_size],
    ["quantization", model.details.quantization_level], ["size on disk", bytes(model.size)],
    ["trained context", model.details.context_length ? `${model.details.context_length} tokens` : ""],
    ["capabilities", (model.capabilities || []).join(", ")], ["files on", model.nodes.join(", ")],
    ["can't be used", model.unusable],
  ].filter((row) => row[1]);
  keyed(list, rows, (row) => row[0], (row) => el("div", {}, el("dt", { text: row[0] }), el("dd")),
    (node, row) => setText(node.lastChild, row[1]));
}

function makeDeployment() {
  return el("article", { class: "panel" },
    el("p", { class: "tags" }), el("div", { class: "layers", role: "img" }), el("p", { class: "reason" }), el("p", { class: "words" }),
    scrolling("Layers of each machine", el("table", {},
      el("thead", {}, el("tr", {}, ...["machine", "device", "layers", "memory"].map((one) => el("th", { scope: "col", text: one, class: one === "memory" ? "figure" : "" })))), el("tbody"))));
}

function updateDeployment(node, one) {
  const kind = one.state === "ready" ? "good" : one.state === "failed" ? "bad" : "warn";
  keyed(node.querySelector(".tags"), [[stateText(one), kind], [one.backend, ""], [one.id, ""]], (tag) => tag[0],
    (tag) => el("span", { class: `tag ${tag[1]}`, text: tag[0] }));
  updateLayers(node.querySelector(".layers"), one);
  const words = [runningWords(one)];
  if (one.state === "ready") {
    words.push(`${count(one.slots, "request")} at a time`);
    if (one.speed) words.push(`${duration(1 / one.speed)} per token`);
    if (one.idle) words.push(`idle for ${duration(one.idle)}`);
  }
  showReason(node.querySelector(".reason"), one);
  setText(node.querySelector(".words"), words.join(" · "));
  keyed(node.querySelector("tbody"), one.placed, (share) => `${share.node}/${share.device}/${share.first}`,
    () => el("tr", {}, el("th", { scope: "row" }), el("td"), el("td"), el("td", { class: "figure" })),
    (row, share) => {
      setText(row.children[0], share.node_name);
      setText(row.children[1], share.device);
      setText(row.children[2], `${layerRange(share, one.layers)} (${number(Math.max(0, Math.min(share.last, one.layers) - share.first))})`);
      setText(row.children[3], bytes(share.bytes));
    });
}

// Entry point: shows the view named by the URL's hash, and keeps the state of the cluster up to date.
import { byId, el, keyed, setText } from "./dom.js";
import { count, shortName } from "./format.js";
import { followEvents, onState, onTrouble, refresh, state, watchDoctor } from "./store.js";
import { key, logIn, needsLogin } from "./http.js";
import { clusterView } from "./cluster.js";
import { modelsView } from "./models.js";
import { modelView } from "./model.js";
import { chatView } from "./chat.js";
import { requestsView } from "./requests.js";
import { historyView } from "./history.js";
import { connectView } from "./connect.js";
import { keysView } from "./keys.js";
import { doctorView } from "./doctor.js";

// Each takes the element to draw in and the rest of the hash, and returns a function that ends the view.
const views = {
  cluster: clusterView, models: modelsView, model: modelView, chat: chatView, requests: requestsView,
  history: historyView, connect: connectView, keys: keysView, doctor: doctorView,
};
let leave = () => {};
let first = true;

function show() {
  const [, name = "", ...rest] = location.hash.split("/");
  const view = views[name] ? name : "cluster";
  leave();
  const content = byId("content");
  content.replaceChildren();
  content.dataset.view = view;
  let argument = rest.join("/");
  try { argument = decodeURIComponent(argument); } catch { argument = ""; }
  leave = views[view](content, argument) || (() => {});
  const section = view === "model" ? "models" : view;
  for (const link of byId("nav").querySelectorAll("a")) {
    if (link.hash === `#/${section}`) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else link.removeAttribute("aria-current");
  }
  const title = content.querySelector("h1")?.textContent;
  document.title = title ? `${title} · sollold` : "sollold";
  if (!first) content.focus({ preventScroll: true });
  if (!first) scrollTo(0, 0);
  first = false;
}

onTrouble(() => {
  const trouble = byId("trouble");
  trouble.hidden = !state.trouble;
  // Without a key, nothing is known: the views would say that nothing is there.
  byId("content").hidden = state.refused;
  if (state.refused) setText(byId("headline"), "not logged in");
  // If this node has failed, the user can continue at another one.
  const others = state.trouble && !state.refused ? (state.cluster?.nodes || []).filter((one) => !one.me) : [];
  const words = [state.trouble, others.length ? " Other nodes: " : ""].filter(Boolean);
  const parts = [...words.map((text) => ({ text })), ...others.slice(0, 8)];
  keyed(trouble, parts, (one) => one.text || one.node, (one) => (one.text ? el("span", { text: one.text }) : el("span", {}, el("a", { href: one.url, text: one.name }), " ")));
});
let release = "";
byId("upgraded").querySelector("button").addEventListener("click", () => location.reload());
onState(() => {
  const cluster = state.cluster;
  // The page's scripts are those of the release that it was loaded from.
  const now = cluster.nodes.find((one) => one.me)?.release || "";
  release ||= now;
  byId("upgraded").hidden = now === release;
  const offline = cluster.offline?.length ? `, ${cluster.offline.length} offline` : "";
  const leader = cluster.leader_name ? `leader ${shortName(cluster.leader_name)}` : "no leader";
  byId("leaderless").hidden = Boolean(cluster.leader_name);
  setText(byId("headline"), `${count(cluster.nodes.length, "node")}${offline} · ${leader} · seen from ${shortName(cluster.name)}`);
  const badge = byId("finding-count");
  const problems = state.findings.filter((one) => one.grade === "problem").length;
  badge.hidden = !problems;
  setText(badge, String(problems));
  badge.setAttribute("aria-label", `, ${count(problems, "problem")}`);
});

needsLogin(() => { byId("login").hidden = false; });
byId("login").addEventListener("click", () => logIn().then((done) => { if (done) { refresh(); show(); } }));
if (key()) byId("login").hidden = false;
// Followed, the link would replace the hash, which names the view.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("content").focus();
});
addEventListener("hashchange", show);
show();
refresh();
followEvents();
watchDoctor();

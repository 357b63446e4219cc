// Requests through this node: those in progress and the last hundred.

import { el, keyed, scrolling, setText } from "./dom.js";
import { clock, duration, number, shortModel } from "./format.js";
import { getJson } from "./http.js";

const columns = ["when", "model", "route", "state", "node", "tokens", "first token", "total", "tokens/s"];

/** A table of requests; `show(active, recent)` fills it. */
export function requestTable(label) {
  const body = el("tbody");
  const none = el("p", { class: "empty", hidden: true, text: "None yet. Ask something in the chat, or point a client at this node." });
  const table = el("table", { class: "stacking" }, el("caption", { class: "visually-hidden", text: label }),
    el("thead", {}, el("tr", {}, ...columns.map((one, at) => el("th", { scope: "col", text: one, class: at > 4 ? "figure" : "" })))), body);
  const node = el("div", {}, scrolling(label, table), none);
  return {
    node,
    show(active, recent) {
      none.hidden = active.length + recent.length > 0;
      table.hidden = !none.hidden;
      const rows = [...active.map(rowOfActive), ...recent.map(rowOfRecent)];
      keyed(body, rows, (row) => row.key,
        () => el("tr", {}, ...columns.map((name, at) => el(at === 1 ? "th" : "td", { scope: at === 1 ? "row" : null, "data-label": name, class: at > 4 ? "figure" : "" }))),
        (tr, row) => {
          row.cells.forEach((text, at) => setText(tr.children[at], text));
          tr.className = row.kind;
          tr.title = row.title;
        });
    },
  };
}

function rowOfActive(one) {
  return { key: `a${one.id}`, kind: "active-row", title: `request ${one.id}`, cells: [
    "now", shortModel(one.model), one.path, one.stage, one.node, String(one.events), "", duration(one.seconds), ""] };
}

function rowOfRecent(one) {
  const resumed = one.resumed ? `, resumed${one.resumed > 1 ? ` ${one.resumed} times` : ""}` : "";
  const words = one.outcome === "error" ? `error: ${one.error}` : one.outcome + resumed;
  return { key: `r${one.id}`, kind: one.outcome === "error" ? "bad-row" : "", title: `request ${one.id}${one.queue_seconds ? `, ${duration(one.queue_seconds)} in the queue` : ""}`, cells: [
    clock(one.time), shortModel(one.model), one.path, words, one.node, `${one.prompt_tokens} → ${one.tokens}`,
    one.first_token_seconds === null ? "–" : duration(one.first_token_seconds), duration(one.seconds),
    one.tokens_per_second === null ? "–" : number(one.tokens_per_second)] };
}

export function requestsView(place) {
  const table = requestTable("Requests through this node");
  const trouble = el("p", { class: "notice", hidden: true });
  place.append(el("h1", { text: "Requests" }),
    el("p", { class: "dim", text: "Requests through this node: those in progress, then the last hundred. Tokens: prompt → answer." }), trouble, table.node);
  let ended = false;
  let timer = 0;
  const draw = async () => {
    try {
      if (!document.hidden) {
        const shown = await getJson("/api/cluster/requests");
        if (ended) return;
        table.show(shown.active, shown.recent);
        trouble.hidden = true;
      }
    } catch (error) {
      setText(trouble, error.message);
      trouble.hidden = false;
    }
    if (!ended) timer = setTimeout(draw, 2000);
  };
  draw();
  return () => { ended = true; clearTimeout(timer); };
}

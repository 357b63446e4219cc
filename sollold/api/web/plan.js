// Draws a plan: what is placed where, with the arithmetic; or how much memory is missing, and what would help.

import { el, scrolling } from "./dom.js";
import { bytes, colourOf, count, duration, layerRange, number } from "./format.js";
import { state } from "./store.js";

const nameOf = (node) => state.cluster?.nodes.find((one) => one.node === node)?.name || node;

/** Draw a response of `/api/cluster/plan`; `close`, if given, is called by a close button. */
export function showPlan(found, close) {
  const box = el("div", { class: "plan" });
  if (close) box.append(el("button", { type: "button", class: "quiet small close", text: "Close", on: { click: close } }));
  box.append(el("p", { class: found.ok ? "" : "bad-text", text: reasonOf(found) }));
  if (found.plan) box.append(...placement(found));
  if (found.missing) box.append(...shortfall(found.missing));
  if (found.evicts?.length) box.append(el("p", { class: "small", text: `Unloaded to make room: ${found.evicts.map((one) => one[1]).join(", ")}` }));
  if (found.options?.length) {
    box.append(el("details", {}, el("summary", { text: `What else was considered (${found.options.length})` }),
      el("ul", { class: "small" }, ...found.options.map((one) => el("li", {
        text: `${one.what}: ${one.tokens_per_second ? `${number(one.tokens_per_second)} tokens/s; ` : ""}${one.reason}` })))));
  }
  return box;
}

function placement(found) {
  const plan = found.plan;
  const shares = [plan.host, ...plan.shares].filter((share) => total(share) > 0);
  const most = Math.max(...shares.map(total));
  const rows = shares.map((share) => {
    const free = found.free?.find((one) => one.node === share.node && one.device === share.device);
    const range = share.last > share.first ? `layers ${layerRange(share, plan.layers)}` : "embedding and buffers";
    const parts = [["weights", share.weights, ""], ["context", share.state, "state"], ["buffers", share.compute + share.overhead, "buffer"]];
    return el("tr", {},
      el("th", { scope: "row", text: `${nameOf(share.node)} ${share.device}` }), el("td", { text: range }),
      el("td", { class: "wide" }, el("div", { class: "bar", role: "img", style: `width:${Math.max(4, 100 * total(share) / most)}%`,
        "aria-label": parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", ") },
      ...parts.map(([name, size, kind]) => el("span", { class: kind ? `band ${kind} ${colourOf(plan.model)}` : `band ${colourOf(plan.model)}`, title: `${name}: ${bytes(size)}`, style: `width:${100 * size / total(share)}%` })))),
      el("td", { class: "figure", text: bytes(total(share)) }),
      el("td", { class: "figure dim", text: free ? `${bytes(free.before)} → ${bytes(free.after)} free` : "" }));
  });
  const words = [];
  if (plan.tokens_per_second) words.push(`about ${number(plan.tokens_per_second)} tokens/s`);
  if (found.prompt_tokens_per_second) words.push(`prompts at ${number(found.prompt_tokens_per_second)} tokens/s`);
  if (plan.load_seconds) words.push(`loads in about ${duration(Math.max(1, plan.load_seconds))}`);
  if (found.context) words.push(`${found.context} tokens of context`);
  if (plan.run?.slots) words.push(count(plan.run.slots, "request") + " at a time");
  const sums = `${bytes(found.weights)} weights + ${bytes(found.state)} context + ${bytes(found.compute)} compute + ${bytes(found.overhead)} processes = `
    + `${bytes(found.weights + found.state + found.compute + found.overhead)}`;
  const parts = [scrolling("Placement", el("table", { class: "plan-table" }, el("tbody", {}, ...rows)))];
  if (words.length) parts.push(el("p", { text: words.join(" · ") }));
  parts.push(el("p", { class: "dim small", text: `${sums}${found.estimate ? " (an estimate: this architecture is unknown)" : ""}` }));
  if (plan.reasons?.length) parts.push(el("ul", { class: "small" }, ...plan.reasons.map((reason) => el("li", { text: reason }))));
  return parts;
}

const total = (share) => share.weights + share.state + share.compute + share.overhead;

/** Return why, without the sentence on remedies, which are drawn as a list. */
function reasonOf(found) {
  const reason = found.reason || found.message || (found.ok ? "It fits." : "It does not fit.");
  return found.missing ? reason.replace(` What would help: ${found.missing.remedies.join("; ")}.`, () => "") : reason;
}

function shortfall(missing) {
  const rest = missing.missing ? `: ${bytes(missing.missing)} missing` : ", but in parts that hold no layer";
  return [
    el("p", { text: `Needed ${bytes(missing.needed)}, available ${bytes(missing.there)}${rest}.` }),
    el("p", { class: "dim small", text: `${bytes(missing.weights)} weights + ${bytes(missing.state)} context + ${bytes(missing.buffers)} buffers` }),
    ...(missing.remedies.length ? [el("p", { text: "What would help:" }), el("ul", {}, ...missing.remedies.map((one) => el("li", { text: one })))] : []),
  ];
}

// Problems and how to fix them; machines waiting for admission.

import { copyButton, el, keyed, setText } from "./dom.js";
import { clock } from "./format.js";
import { send } from "./http.js";
import { onState, refresh, refreshDoctor, state } from "./store.js";

export function doctorView(place) {
  const again = el("button", { type: "button", text: "Check again" });
  const list = el("ul", { class: "findings plain" });
  const well = el("p", { class: "notice good", hidden: true, text: "No problems found." });
  const waiting = el("section", { hidden: true });
  const events = el("ol", { class: "events plain" });
  place.append(el("div", { class: "title-row" }, el("h1", { text: "Doctor" }), again), waiting, well, list,
    el("h2", { text: "Events recorded by this node" }), events);
  again.addEventListener("click", async () => {
    // A disabled button would lose the focus.
    if (again.ariaBusy === "true") return;
    again.ariaBusy = "true";
    await refreshDoctor().catch(() => {});
    again.ariaBusy = "false";
  });
  const draw = () => {
    keyed(list, state.findings, (one) => `${one.grade}${one.what}`, makeFinding);
    well.hidden = state.findings.length > 0;
    showWaiting(waiting);
    showEvents(events, state.events);
  };
  const end = onState(draw);
  refreshDoctor().catch(() => {});
  return end;
}

const bad = ["node.lost", "model.failed", "model.lost"];

/** Draw events, the newest first. */
export function showEvents(list, events) {
  keyed(list, [...events].reverse(), (one) => one.id,
    (one) => el("li", { class: bad.includes(one.kind) ? "bad-text" : "" },
      el("time", { class: "dim", datetime: new Date(one.time * 1000).toISOString() }), " ", one.message),
    // The next day, the time gets its date.
    (node, one) => setText(node.firstChild, clock(one.time)));
}

function makeFinding(one) {
  const node = el("li", { class: `finding is-${one.grade}` }, el("span", { class: `tag ${one.grade === "problem" ? "bad" : "warn"}`, text: one.grade }), el("p", { text: one.what }));
  for (const [command, text] of fixParts(one.fix || "")) node.append(command ? commandToCopy(text) : el("p", { class: "dim", text }));
  return node;
}

/** Split a fix into [isCommand, text] parts: commands are in backticks, unless the whole fix is one. */
function fixParts(fix) {
  if (!fix.includes("`")) return fix ? [[/^(sudo|sollold|journalctl|systemctl) /.test(fix), fix]] : [];
  return fix.split("`").map((part, at) => [at % 2 === 1, part.trim()]).filter(([, text]) => /\w/.test(text));
}

const commandToCopy = (command, ...more) => el("div", { class: "fix" }, el("code", { text: command }), copyButton(() => command), ...more);

/** Quote a word for a shell, if needed. */
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

/** Draw the machines that are waiting for admission, if any. */
export function showWaiting(place) {
  const found = state.cluster.nodes.flatMap((node) => node.waiting || []);
  place.hidden = !found.length;
  if (!place.firstChild) place.append(el("h2", { text: "Machines waiting for admission" }), el("ul", { class: "plain waiting" }));
  keyed(place.querySelector("ul"), found, (one) => one.node, (one) => {
    const command = `sollold admit ${quoted(one.code)}`;
    const said = el("span", { class: "bad-text small", role: "alert" });
    const admit = el("button", { type: "button", class: "primary small", text: "Admit", "aria-label": `Admit: ${one.name}`,
      on: { click: () => send("POST", "/api/cluster/admit", { machine: one.node }).then(refresh).catch((error) => setText(said, error.message)) } });
    return el("li", { class: "finding" }, el("p", {}, el("b", { text: one.name }), " shows the code ", el("code", { text: one.code }), " if it is the machine that you mean."),
      commandToCopy(command, admit), said);
  });
}

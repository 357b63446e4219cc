// The cluster's API keys: shows, creates and revokes them.

import { copyButton, el, keyed, say, scrolling, setText } from "./dom.js";
import { getJson, send } from "./http.js";

const PATH = "/api/cluster/keys";
const scopes = [["infer", "use models"], ["models", "use, load, pull and delete models"], ["admin", "everything"]];
const ends = [["", "never"], ["30d", "in 30 days"], ["365d", "in a year"]];
const gone = (one) => Boolean(one.revoked) || (one.expires && new Date(one.expires) <= new Date());
const columns = ["name", "may", "created", "state", ""];

export function keysView(place) {
  const words = el("p", { class: "dim" });
  const trouble = el("p", { class: "notice bad", role: "alert", hidden: true });
  const made = el("div", {});
  const body = el("tbody");
  const table = scrolling("Keys", el("table", { class: "stacking" },
    el("thead", {}, el("tr", {}, ...columns.map((one) => (one ? el("th", { scope: "col", text: one }) : el("td"))))), body));
  let ended = false;
  const complain = (error) => { setText(trouble, error ? error.message : ""); trouble.hidden = !error; };
  const load = async () => {
    try {
      const found = await getJson(PATH);
      if (ended) return;
      complain(null);
      show(found);
    } catch (error) { complain(error); }
  };
  const show = ({ open, keys }) => {
    setText(words, open ? "Other machines may use models without a key; loading, deleting and draining always need one."
      : "Other machines need a key for everything. Programs of this machine never do.");
    table.hidden = !keys.length;
    keyed(body, [...keys].sort((a, b) => Number(gone(a)) - Number(gone(b))), (one) => `${one.id}${one.revoked ? "-" : ""}`,
      (one) => row(one, revoke));
  };
  const revoke = async (one) => {
    try { await send("DELETE", PATH, { name: one.id }); say(`${one.name} was revoked`); } catch (error) { complain(error); return; }
    load();
  };
  const form = makeForm(async (wanted) => {
    made.replaceChildren();
    try {
      const found = await send("POST", PATH, wanted);
      made.replaceChildren(el("div", { class: "notice good" },
        el("p", { text: `The key ${found.name} is shown only once. Use it as the API key of the program that needs it.` }),
        el("div", { class: "fix" }, el("code", { text: found.key }), copyButton(() => found.key))));
      say(`Created the key ${found.name}`);
      await load();
      return true;
    } catch (error) { complain(error); return false; }
  });
  table.hidden = true;
  place.append(el("h1", { text: "Keys" }), words, trouble, el("section", { class: "panel" }, form, made), table);
  load();
  return () => { ended = true; };
}

function makeForm(make) {
  const choice = (id, options) => el("select", { id }, ...options.map(([value, text]) => el("option", { value, text })));
  const name = el("input", { id: "key-name", type: "text", required: true, maxlength: "64", autocomplete: "off", placeholder: "laptop" });
  const scope = choice("key-scope", scopes);
  const end = choice("key-end", ends);
  const field = (id, words, control) => el("label", { for: id }, words, control);
  const form = el("form", {}, el("div", { class: "fields" },
    field("key-name", "Name", name), field("key-scope", "Scope", scope), field("key-end", "Expires", end)),
  el("div", { class: "buttons" }, el("button", { type: "submit", class: "primary", text: "Create key" })));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (await make({ name: name.value.trim(), scope: scope.value, ...(end.value ? { expires: end.value } : {}) })) name.value = "";
  });
  return form;
}

function row(one, revoke) {
  const day = (text) => text.slice(0, 10);
  const over = gone(one);
  const state = one.revoked ? `revoked ${day(one.revoked)}` : one.expires ? `${over ? "expired" : "expires"} ${day(one.expires)}` : "never expires";
  const may = scopes.find(([scope]) => scope === one.scope)?.[1] || one.scope;
  const place = el("td", { class: "figure" });
  const button = (text, act, kind = "") => el("button", { type: "button", class: `small ${kind}`, text, "aria-label": `${text} ${one.name}`, on: { click: act } });
  const first = button("Revoke", () => ask(), "quiet");
  // Programs that use the key lose access at once, so ask for confirmation.
  const ask = () => {
    const sure = button("Revoke it", () => revoke(one), "danger");
    place.replaceChildren(sure, " ", button("Cancel", () => { place.replaceChildren(first); first.focus(); }));
    sure.focus();
  };
  if (!one.revoked && !over) place.append(first);
  return el("tr", { class: one.revoked || over ? "dim" : "" }, ...columns.map((name, at) => {
    if (at === 4) return place;
    return el(at ? "td" : "th", { scope: at ? null : "row", "data-label": name, text: [one.name, may, day(one.created), state][at] });
  }));
}

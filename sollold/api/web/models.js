// The library: every model with its size and nodes; plan, load, unload, pull, copy, delete.

import { el, keyed, say, setAttribute, setText } from "./dom.js";
import { bytes, shortModel, stateText } from "./format.js";
import { lines, request, send } from "./http.js";
import { onState, refresh, refreshModels, state } from "./store.js";
import { showPlan } from "./plan.js";

/** The number of models above which they can be filtered. */
const FILTERED = 12;

export function modelsView(place) {
  const pull = pullForm(() => load());
  const list = el("ul", { class: "models plain" });
  const none = el("p", { class: "empty", hidden: true, text: "No model yet. Pull one above, or put GGUF files into the models folder of any machine." });
  const trouble = el("p", { class: "notice bad", hidden: true });
  const filter = el("input", { type: "search", "aria-label": "Filter by name", placeholder: "Filter by name", hidden: true });
  const unmatched = el("p", { class: "empty", hidden: true, text: "No model has this in its name." });
  place.append(el("div", { class: "title-row" }, el("h1", { text: "Models" }), el("span", { class: "spacer" }), filter), pull, trouble, list, none, unmatched);
  const load = async () => {
    try {
      await refreshModels();
      trouble.hidden = true;
    } catch (error) {
      setText(trouble, error.message);
      trouble.hidden = false;
    }
  };
  const draw = () => {
    filter.hidden = state.models.length <= FILTERED;
    const wanted = filter.hidden ? "" : filter.value.trim().toLowerCase();
    const found = state.models.filter((one) => one.name.toLowerCase().includes(wanted));
    keyed(list, found, (one) => one.name, (one) => makeModel(one, load), updateModel);
    none.hidden = state.models.length > 0;
    unmatched.hidden = found.length > 0 || !none.hidden;
  };
  filter.addEventListener("input", draw);
  const end = onState(draw);
  load();
  const timer = setInterval(() => { if (!document.hidden) load(); }, 10000);
  return () => { end(); clearInterval(timer); };
}

function pullForm(done) {
  const name = el("input", { id: "pull-name", type: "text", required: true, autocomplete: "off", autocapitalize: "none", spellcheck: "false",
    placeholder: "llama3.2:3b or hf.co/OWNER/REPOSITORY:Q4_K_M" });
  const button = el("button", { type: "submit", class: "primary", text: "Pull" });
  const progress = el("ul", { class: "pulls plain" });
  const form = el("form", { class: "row-form" },
    el("label", { class: "grow", for: "pull-name" }, "Pull a model from Ollama's library or Hugging Face"), name, button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = name.value.trim();
    if (!wanted) return;
    name.value = "";
    follow(wanted, progress, done);
  });
  return el("section", { class: "panel" }, form, progress);
}

async function follow(wanted, place, done) {
  const words = el("span", { text: "starting" });
  const bar = el("progress", { max: 1, "aria-label": `Pulling ${wanted}` });
  const stop = new AbortController();
  const cancel = el("button", { type: "button", class: "quiet small", text: "Stop", on: { click: () => stop.abort() } });
  const row = el("li", {}, el("b", { text: wanted }), bar, words, cancel);
  place.append(row);
  const parts = new Map();
  try {
    const answer = await request("/api/pull", { method: "POST", body: JSON.stringify({ model: wanted }), signal: stop.signal });
    for await (const step of lines(answer)) {
      if (step.error) throw new Error(step.error);
      if (step.digest && step.total) parts.set(step.digest, [step.completed || 0, step.total]);
      const total = [...parts.values()].reduce((sum, part) => sum + part[1], 0);
      const have = [...parts.values()].reduce((sum, part) => sum + part[0], 0);
      if (total) {
        bar.value = have / total;
        setText(words, `${bytes(have)} of ${bytes(total)}`);
      } else setText(words, step.status || "");
    }
    bar.value = 1;
    setText(words, "done");
    say(`${wanted} was pulled`);
  } catch (error) {
    bar.remove();
    words.className = error.name === "AbortError" ? "" : "bad-text";
    setText(words, error.name === "AbortError" ? "stopped; pulling it again resumes from here" : error.message);
    say(`${wanted} was not pulled`);
  }
  setText(cancel, "Hide");
  cancel.addEventListener("click", () => row.remove());
  done();
}

function makeModel(model, reload) {
  const panel = el("div", { class: "model-panel", "aria-live": "polite" });
  let opener = null;
  const button = (text, act, kind = "") => el("button", { type: "button", class: `small ${kind}`, text, "data-act": text, "aria-label": `${text} ${model.name}`,
    on: { click: (event) => { opener = event.currentTarget; act(); } } });
  /** Show `nodes` in the panel; the focus returns from what was there to the button that opened it. */
  const fill = (...nodes) => {
    const hadFocus = panel.contains(document.activeElement);
    panel.replaceChildren(...nodes);
    if (hadFocus) opener.focus();
  };
  const close = () => fill();
  const attempt = async (what, act) => {
    const words = el("p", { class: "dim", text: `${what} …` });
    fill(words);
    // Leave the panel alone if it shows something else by now.
    const replace = (...nodes) => { if (words.isConnected) fill(...nodes); };
    try {
      const shown = await act();
      replace(...(shown instanceof Node ? [shown] : []));
      refresh();
    } catch (error) {
      replace(el("p", { class: "bad-text", role: "alert", text: error.message }));
    }
  };
  const plan = () => attempt("Planning", async () => {
    const found = await send("POST", "/api/cluster/plan", { model: model.name });
    return showPlan(found, close);
  });
  const load = () => attempt("Loading; this continues if you leave the page", () => send("POST", "/api/cluster/load", { model: model.name }));
  const unload = () => attempt("Unloading", () => send("POST", "/api/cluster/unload", { model: model.name }));
  const copy = () => {
    const name = el("input", { type: "text", required: true, "aria-label": `New name for the copy of ${model.name}`, placeholder: "new name" });
    const form = el("form", { class: "row-form" }, name, el("button", { type: "submit", class: "small primary", text: "Copy" }),
      el("button", { type: "button", class: "small", text: "Cancel", on: { click: close } }));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const destination = name.value.trim();
      attempt("Copying", async () => { await send("POST", "/api/copy", { source: model.name, destination }); await reload(); });
    });
    fill(form);
    name.focus();
  };
  const remove = () => {
    const yes = el("button", { type: "button", class: "small danger", text: "Delete it", on: { click: () => attempt("Deleting", async () => {
      await send("DELETE", "/api/delete", { model: model.name });
      await reload();
    }) } });
    fill(el("p", {}, `Delete ${model.name} from every machine that has it? `, yes, " ",
      el("button", { type: "button", class: "small", text: "Cancel", on: { click: close } })));
    yes.focus();
  };
  return el("li", { class: "model" },
    el("div", { class: "model-row" },
      el("div", { class: "model-about" },
        el("h2", {}, el("a", { href: `#/model/${encodeURIComponent(model.name)}`, text: shortModel(model.name), title: model.name }), el("span", { class: "tags" })),
        el("p", { class: "dim small about" }), el("p", { class: "bad-text small reason" })),
      el("div", { class: "buttons" },
        button("Plan", plan), button("Load", load, "primary"), button("Unload", unload), button("Copy", copy, "quiet"), button("Delete", remove, "quiet"))),
    panel);
}

function updateModel(node, model) {
  const running = state.cluster ? state.cluster.deployments.filter((one) => one.model === model.name) : [];
  const words = [model.details.parameter_size, model.details.quantization_level, bytes(model.size)].filter((one) => one && one !== "0");
  words.push(`on ${model.nodes.slice(0, 6).join(", ")}${model.nodes.length > 6 ? ` and ${model.nodes.length - 6} more` : ""}`);
  if (model.unusable) words.push(`can't be used: ${model.unusable}`);
  setText(node.querySelector(".about"), words.join(" · "));
  const reason = running.find((one) => one.state === "failed")?.reason || "";
  setText(node.querySelector(".reason"), reason);
  node.querySelector(".reason").hidden = !reason;
  const tags = running.map((one) => [stateText(one), one.state === "ready" ? "good" : one.state === "failed" ? "bad" : "warn"]);
  for (const ability of model.capabilities || []) if (ability !== "completion") tags.push([ability, ""]);
  keyed(node.querySelector(".tags"), tags, (tag) => tag[0], (tag) => el("span", { class: `tag ${tag[1]}`, text: tag[0] }));
  const shown = { Load: running.every((one) => one.state === "failed") && !model.unusable, Unload: running.length > 0, Plan: !model.unusable };
  for (const [act, wanted] of Object.entries(shown)) node.querySelector(`[data-act=${act}]`).hidden = !wanted;
  setAttribute(node, "data-model", model.name);
}

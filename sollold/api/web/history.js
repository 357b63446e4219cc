// History: the last hour by seconds, the last day by minutes, of the whole cluster and of each machine.

import { el, keyed, setText } from "./dom.js";
import { bytes, duration } from "./format.js";
import { getJson } from "./http.js";
import { plot } from "./plot.js";

const ranges = [[600, "10 minutes"], [3600, "1 hour"], [86400, "1 day"]];
const titles = [
  ["tokens_per_second", "Tokens generated per second", "tokens/s"],
  ["first_token_seconds", "Time to the first token", "s"],
  ["active", "Requests in progress", ""],
  ["waiting", "Requests waiting", ""],
  ["requests_per_second", "Requests finished per second", "/s"],
  ["failed_per_second", "Requests failed per second", "/s"],
];

const COLOURS = 8;

/** Combine lines that are too many for a plot with one line each. */
function combined(lines, way) {
  const values = lines[0].values.map((_, at) => {
    const known = lines.map((line) => line.values[at]).filter((value) => value !== null && value !== undefined);
    if (!known.length) return null;
    if (way === "highest") return Math.max(...known);
    const sum = known.reduce((total, value) => total + value, 0);
    return way === "mean" ? sum / known.length : sum;
  });
  return { name: way, values };
}

/** Call `show` with the totals of the last two minutes, every two seconds; returns a function that stops it. */
export function recentHistory(show) {
  let ended = false;
  const round = async () => {
    while (!ended) {
      try {
        if (!document.hidden) {
          const { total } = await getJson("/api/cluster/history?seconds=120&step=1");
          if (!ended) show(total);
        }
      } catch { /* the header shows that the node does not answer */ }
      await new Promise((done) => setTimeout(done, 2000));
    }
  };
  round();
  return () => { ended = true; };
}

export function historyView(place) {
  let range = 600;
  let ended = false;
  let timer = 0;
  const buttons = el("div", { class: "segments", role: "group", "aria-label": "Time range" },
    ...ranges.map(([seconds, words]) => el("button", {
      type: "button", text: words, "aria-pressed": String(seconds === range),
      on: { click: (event) => {
        range = seconds;
        for (const one of buttons.children) one.setAttribute("aria-pressed", one === event.currentTarget);
        draw();
      } },
    })));
  const choice = el("select", { id: "history-of" });
  const offer = (nodes) => keyed(choice, [{ node: "", name: "the whole cluster" }, ...nodes], (one) => one.node || "all",
    (one) => el("option", { value: one.node, text: one.name }));
  offer([]);
  choice.addEventListener("change", () => draw());
  const plots = el("div", { class: "plots" });
  const trouble = el("p", { class: "notice", hidden: true });
  const made = new Map(titles.map(([name, title]) => [name, plot(title)]));
  const devices = el("div", { class: "plots" });
  plots.append(...[...made.values()].map((one) => one.node));
  place.append(
    el("div", { class: "title-row" }, el("h1", { text: "History" }), buttons,
      el("label", { class: "inline", for: "history-of" }, "of "), choice),
    trouble, plots, el("h2", { text: "Memory and GPUs" }), devices);

  const drawing = new Map();
  async function draw() {
    clearTimeout(timer);
    const asked = range;
    try {
      const found = await getJson(`/api/cluster/history?seconds=${range}`, 20);
      if (ended || asked !== range) return;
      trouble.hidden = true;
      offer(found.nodes);
      const node = found.nodes.find((one) => one.node === choice.value);
      const series = node ? node.series : found.total;
      const frame = { step: found.step, end: found.time };
      for (const [name, , unit] of titles) {
        const text = name === "first_token_seconds" ? duration : undefined;
        made.get(name).show({ ...frame, lines: [{ name, values: series[name] || [] }], unit, text, dots: name === "first_token_seconds" });
      }
      showDevices(node ? [node] : found.nodes, frame);
    } catch (error) {
      setText(trouble, error.status === 404 ? "This node keeps no history." : `No history: ${error.message}`);
      trouble.hidden = false;
    }
    if (!ended) timer = setTimeout(draw, range > 3600 ? 30000 : range > 600 ? 10000 : 2000);
  }

  function showDevices(nodes, frame) {
    const wanted = [["granted_bytes", "Memory reserved for models", bytes, "sum"], ["used_bytes", "Memory in use", bytes, "sum"],
      ["utilization", "GPU utilization", (value) => (value === null ? "–" : `${Math.round(value * 100)} %`), "mean"],
      ["temperature_celsius", "GPU temperature", (value) => (value === null ? "–" : `${Math.round(value)} °C`), "highest"],
      ["power_watts", "GPU power", (value) => (value === null ? "–" : `${Math.round(value)} W`), "sum"]];
    const figures = [];
    for (const [name, title, text, way] of wanted) {
      const lines = nodes.flatMap((node) => node.devices.filter((device) => device[name]?.some((value) => value !== null))
        .map((device) => ({ name: `${node.name} ${device.id}`, values: device[name] })));
      if (lines.length > COLOURS) figures.push({ name, title: `${title}, ${way} of ${lines.length}`, text, lines: [combined(lines, way)] });
      else if (lines.length) figures.push({ name, title, text, lines });
    }
    keyed(devices, figures, (one) => one.title, (one) => {
      const figure = plot(one.title);
      drawing.set(one.title, figure);
      return figure.node;
    }, (_, one) => drawing.get(one.title).show({ ...frame, lines: one.lines, text: one.text, top: one.name === "utilization" ? 1 : 0, base: one.text === bytes ? 2 ** 30 : 1 }));
  }

  draw();
  return () => { ended = true; clearTimeout(timer); };
}

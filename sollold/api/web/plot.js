// Small line plots in SVG: a sparkline, and a plot with axes that shows the values under the pointer.

import { el, setAttribute, setText, svg } from "./dom.js";
import { clock, number } from "./format.js";

const known = (value) => value !== null && value !== undefined;

/** Return a path through the known values; a missing value interrupts the line. */
function pathOf(values, x, y) {
  let path = "";
  let pen = false;
  values.forEach((value, at) => {
    if (!known(value)) { pen = false; return; }
    path += `${pen ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    // A single point between two gaps becomes a dot.
    if (!pen && !known(values[at + 1])) path += "h0.1";
    pen = true;
  });
  return path;
}

const dotsOf = (values, x, y) => values.map((value, at) => (known(value) ? `M${x(at).toFixed(1)} ${y(value).toFixed(1)}h0.1` : "")).join("");

export function sparkline(label) {
  const width = 240;
  const height = 44;
  const area = svg("path", { class: "spark-area" });
  const line = svg("path", { class: "spark-line" });
  const figure = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", role: "img", "aria-label": label, preserveAspectRatio: "none" }, area, line);
  const now = el("b", { text: "–" });
  const node = el("div", { class: "spark-box" }, el("div", {}, now, " ", el("span", { class: "dim small unit" })), figure);
  return {
    node,
    show(values, unit) {
      const numbers = values.filter(known);
      const top = Math.max(1, ...numbers);
      const x = (at) => (at * width) / Math.max(1, values.length - 1);
      const y = (value) => height - 2 - (value * (height - 6)) / top;
      const path = pathOf(values, x, y);
      line.setAttribute("d", path);
      const first = values.findIndex(known);
      area.setAttribute("d", path && first >= 0 ? `${path}L${width} ${height}L${x(first)} ${height}Z` : "");
      // The mean of five values, since a single second says little.
      const last = numbers.slice(-5);
      const mean = last.length ? last.reduce((a, b) => a + b, 0) / last.length : 0;
      setText(now, number(mean));
      setText(node.querySelector(".unit"), unit);
      setAttribute(figure, "aria-label", `${label}: now ${number(mean)}, highest ${number(numbers.length ? Math.max(...numbers) : 0)}`);
    },
  };
}

function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  for (const step of [1, 2, 2.5, 5, 10]) if (value <= step * power) return step * power;
  return 10 * power;
}

/** A plot with a title; `show({ lines: [{ name, values }], step, end, unit, text, top })` draws it. */
export function plot(title) {
  const width = 560;
  const height = 150;
  const left = 4;
  const bottom = 18;
  const figure = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "plot-figure" });
  const legend = el("ul", { class: "legend plain small" });
  const read = el("p", { class: "dim small plot-read" });
  const node = el("section", { class: "plot" }, el("h2", { text: title }), figure, read, legend);
  let shown = null;

  figure.addEventListener("pointermove", (event) => {
    if (!shown) return;
    const box = figure.getBoundingClientRect();
    const at = Math.round(((event.clientX - box.left) / box.width) * (shown.length - 1));
    if (at < 0 || at >= shown.length) return;
    const when = clock(shown.end - (shown.length - 1 - at) * shown.step);
    const values = shown.lines.map((line) => `${shown.lines.length > 1 ? `${line.name} ` : ""}${shown.text(line.values[at])}`);
    setText(read, `${when}: ${values.slice(0, 6).join(", ")}`);
    marker.setAttribute("x1", (at * width) / (shown.length - 1));
    marker.setAttribute("x2", (at * width) / (shown.length - 1));
    marker.setAttribute("visibility", "visible");
  });
  figure.addEventListener("pointerleave", () => { setText(read, shown?.summary || ""); marker.setAttribute("visibility", "hidden"); });
  const marker = svg("line", { y1: 0, y2: height - bottom, class: "plot-marker", visibility: "hidden" });

  return {
    node,
    show({ lines, step, end, unit, text = (value) => `${number(value)}${unit ? ` ${unit}` : ""}`, top = 0, base = 1, dots = false }) {
      const numbers = lines.flatMap((line) => line.values.filter(known));
      const high = top || base * niceTop((numbers.length ? Math.max(...numbers) : 0) / base);
      const length = Math.max(2, ...lines.map((line) => line.values.length));
      const x = (at) => (at * width) / (length - 1);
      const y = (value) => (height - bottom) * (1 - value / high) + 1;
      const parts = [];
      const labels = [];
      for (const share of [0, 0.5, 1]) {
        parts.push(svg("line", { x1: 0, x2: width, y1: y(high * share), y2: y(high * share), class: "plot-grid" }));
        if (share) {
          const label = svg("text", { x: left, y: y(high * share) + 11, class: "plot-label" });
          label.textContent = text(high * share);
          labels.push(label);
        }
      }
      const span = (length - 1) * step;
      for (const share of [0, 0.5, 1]) {
        const label = svg("text", { x: share * width, y: height - 4, class: "plot-label", "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" });
        label.textContent = share === 1 ? "now" : `${Math.round((span * (1 - share)) / (span > 7200 ? 3600 : span > 120 ? 60 : 1))} ${span > 7200 ? "h" : span > 120 ? "min" : "s"} ago`;
        labels.push(label);
      }
      lines.forEach((line, at) => parts.push(svg("path", { d: dots ? dotsOf(line.values, x, y) : pathOf(line.values, x, y), class: `plot-line${dots ? " dots" : ""} c${at % 8}`, fill: "none" })));
      // Labels are above the lines, which would make them illegible.
      figure.replaceChildren(...parts, ...labels, marker);
      const summary = lines.slice(0, 8).map((line) => {
        const values = line.values.filter(known);
        if (!values.length) return lines.length > 1 ? `${line.name}: no data yet` : "no data yet";
        return `${lines.length > 1 ? `${line.name}: ` : ""}now ${text(values.at(-1))}, highest ${text(Math.max(...values))}`;
      }).join("; ");
      setAttribute(figure, "aria-label", `${title}: ${summary}`);
      if (marker.getAttribute("visibility") === "hidden") setText(read, lines.length === 1 ? summary : "");
      legend.replaceChildren(...(lines.length > 1 ? lines.map((line, at) => el("li", {}, el("span", { class: `dot c${at % 8}`, "aria-hidden": "true" }), line.name)) : []));
      shown = { lines, step, end, length, text, summary: lines.length === 1 ? summary : "" };
    },
  };
}

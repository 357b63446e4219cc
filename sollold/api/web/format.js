// Formats numbers, names and times for people.

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let value = number || 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return joined(Math.floor(whole / 60), "min", whole % 60, "s");
  if (whole < 172800) return joined(Math.floor(whole / 3600), "h", Math.floor((whole % 3600) / 60), "min");
  return `${Math.floor(whole / 86400)} days`;
}

const joined = (large, unit, small, smallUnit) => (small ? `${large} ${unit} ${small} ${smallUnit}` : `${large} ${unit}`);

export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0 || Number.isInteger(value)) return String(value);
  if (Math.abs(value) >= 100) return value.toFixed(0);
  return Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export const count = (value, word) => `${value} ${word}${value === 1 ? "" : "s"}`;

/** Format a time in the browser's time zone, as the commands do: without the date if it is today. */
export function clock(seconds) {
  const moment = new Date(seconds * 1000);
  const today = moment.toDateString() === new Date().toDateString();
  // The Swedish form is ISO 8601; other languages have other digits, ambiguous dates, or 24:00 for midnight.
  return today ? moment.toLocaleTimeString("sv-SE") : moment.toLocaleString("sv-SE");
}

/** Format a share's range of layers; the output, which counts as one more layer after the last, by its name. */
export function layerRange(share, layers) {
  const last = Math.min(share.last, layers || share.last);
  const words = [];
  if (last > share.first) words.push(last === share.first + 1 ? `${share.first}` : `${share.first}–${last - 1}`);
  if (layers && share.last > layers) words.push("output");
  return words.join(" + ") || "embedding";
}

const colours = 8;
const given = new Map();

/** Return the class of one of eight colours for a model, the same as long as the page is open. */
export function colourOf(model) {
  if (!given.has(model)) given.set(model, given.size % colours);
  return `c${given.get(model)}`;
}

export const stateText = (one) => {
  if (one.state === "loading" || one.state === "starting") return `${one.state} ${Math.round(one.progress * 100)} %`;
  return one.state;
};

const rightToLeft = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/;

/** Isolate a name for use within other text: a right-to-left one would reverse the numbers after it. */
export const isolated = (name) => (rightToLeft.test(name) ? `\u2068${name}\u2069` : name);

/** Shorten a node's name for small spaces; names may be of any length. */
export const shortName = (name) => isolated(name.length > 40 ? `${name.slice(0, 39)}…` : name);

export const shortModel = (name) => name.replace(/:latest$/, "");

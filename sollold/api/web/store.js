// The known state of the cluster: polled every two seconds while the page is visible, and at once after an event.

import { getJson, request, serverEvents } from "./http.js";
import { say } from "./dom.js";
import { clock } from "./format.js";

export const state = { cluster: null, events: [], findings: [], models: [], paths: new Set(), trouble: "", refused: false, asOf: 0 };
const listeners = new Set();
const EVERY = 2000;
const KEPT = 200;

/** Call `callback` once the cluster is known, and after each change; returns a function that stops it. */
export function onState(callback) {
  listeners.add(callback);
  if (state.cluster) callback();
  return () => listeners.delete(callback);
}

const troubled = new Set();
/** Call `callback` after each refresh, which may have changed whether the node answers. */
export const onTrouble = (callback) => troubled.add(callback);

function tell() {
  for (const callback of troubled) callback();
  if (state.cluster) for (const callback of [...listeners]) callback();
}

let timer = 0;
let asking = false;
let again = false;

export async function refresh() {
  if (asking) { again = true; return; }
  asking = true;
  clearTimeout(timer);
  try {
    if (!document.hidden || !state.cluster) {
      state.cluster = await getJson("/api/cluster");
      state.asOf = Date.now() / 1000;
    }
    state.trouble = "";
    state.refused = false;
  } catch (error) {
    state.refused = error.status === 401;
    state.trouble = error.status
      ? `The node refused: ${error.message}`
      : `The node does not answer. ${state.asOf ? `This page shows its state at ${clock(state.asOf)}. ` : ""}Trying again.`;
  }
  asking = false;
  tell();
  if (again) { again = false; refresh(); return; }
  timer = setTimeout(refresh, EVERY);
}
addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });

/** Fetch all usable models again. */
export async function refreshModels() {
  state.models = (await getJson("/api/tags")).models;
  tell();
  return state.models;
}

/** Wait until the page is visible. */
function shown() {
  return new Promise((done) => {
    if (document.hidden) addEventListener("visibilitychange", done, { once: true });
    else done();
  });
}

/** Follow the events while the page is open and visible. */
export async function followEvents() {
  let seen = -1;
  let control = new AbortController();
  // A page in the back/forward cache or in a background tab would keep its connection, and a browser opens only
  // six to one node: with six tabs open, no request of any of them would be answered.
  addEventListener("pagehide", () => control.abort());
  addEventListener("visibilitychange", () => { if (document.hidden) control.abort(); });
  for (;;) {
    await shown();
    control = new AbortController();
    try {
      const query = seen < 0 ? `last=${KEPT}` : `after=${seen}`;
      const began = performance.now();
      for await (const event of serverEvents(await request(`/api/cluster/events?follow=1&${query}`, { signal: control.signal }))) {
        if (!event) continue;
        // Ids keep rising across restarts, unless the node's clock was set back.
        if (event.id <= seen) state.events = [];
        seen = event.id;
        state.events = [...state.events, event].slice(-KEPT);
        if (performance.now() - began > 1000) {
          if (event.kind.startsWith("node.")) say(event.message);
          refresh();
        } else tell();
      }
    } catch (error) {
      if (error.status === 404) return;
      // Known events stay visible; they are continued when the node answers again.
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
}

export async function refreshDoctor() {
  state.findings = (await getJson("/api/doctor", 20)).findings;
  tell();
}

/** Fetch the findings every 30 seconds, and once the endpoints that this node has. */
export async function watchDoctor() {
  try { state.paths = new Set(Object.keys((await getJson("/openapi.json")).paths)); } catch { /* older node */ }
  for (;;) {
    try { if (!document.hidden) await refreshDoctor(); } catch { /* try again next time */ }
    await new Promise((done) => setTimeout(done, 30000));
  }
}

// What is known of the cluster: asked for every two seconds while the page is looked at, and at once when
// something happens.

import { getJson, request, serverEvents } from "./http.js";
import { say } from "./dom.js";

export const state = { cluster: null, events: [], findings: [], models: [], paths: new Set(), trouble: "" };
const listeners = new Set();
const EVERY = 2000;
const KEPT = 200;

/** Call `callback` once the cluster is known, and after each change; returns what ends that. */
export function onState(callback) {
  listeners.add(callback);
  if (state.cluster) callback();
  return () => listeners.delete(callback);
}

const troubled = new Set();
/** Call `callback` when the node stops to answer, or answers again. */
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
    if (!document.hidden || !state.cluster) state.cluster = await getJson("/api/cluster");
    state.trouble = "";
  } catch (error) {
    state.trouble = error.status
      ? `The node refused: ${error.message}`
      : "The node does not answer; this page may be out of date. Trying again.";
  }
  asking = false;
  tell();
  if (again) { again = false; refresh(); return; }
  timer = setTimeout(refresh, EVERY);
}
addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });

/** Every usable model, asked anew. */
export async function refreshModels() {
  state.models = (await getJson("/api/tags")).models;
  tell();
  return state.models;
}

/** Until the page is looked at. */
function shown() {
  return new Promise((done) => {
    if (document.hidden) addEventListener("visibilitychange", done, { once: true });
    else done();
  });
}

/** Follow the events for as long as the page is open and looked at. */
export async function followEvents() {
  let seen = -1;
  let control = new AbortController();
  // A page that is kept for the way back, or in another tab, would keep its connection, of which a browser has
  // but six to one node: with six tabs open nothing would be answered in any.
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
        // Ids rise over restarts, too, unless the node's clock was set back.
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
      // What is known stays to be read, and is gone on from when the node answers again.
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
}

export async function refreshDoctor() {
  state.findings = (await getJson("/api/doctor", 20)).findings;
  tell();
}

/** Ask now and then what is wrong, and once which routes this node has. */
export async function watchDoctor() {
  try { state.paths = new Set(Object.keys((await getJson("/openapi.json")).paths)); } catch { /* older node */ }
  for (;;) {
    try { if (!document.hidden) await refreshDoctor(); } catch { /* the next time */ }
    await new Promise((done) => setTimeout(done, 30000));
  }
}

// Buttons that do something: they wait while it is done, and what can't be done is said until it is dismissed.

import { byId, el, setText } from "./dom.js";
import { refresh } from "./store.js";

const box = byId("failed");
box.querySelector("button").addEventListener("click", () => { box.hidden = true; });

/** Say that something could not be done, and why. */
function fail(what, why) {
  setText(box.firstElementChild, `${what}: ${why}`);
  box.hidden = false;
}

/** A button for `act`, a promise; `what` names it to people. It can't be pressed twice. */
export function actionButton(text, what, act) {
  const button = el("button", { type: "button", class: "quiet small", text, "aria-label": what });
  button.addEventListener("click", async () => {
    box.hidden = true;
    // Disabled it would lose the focus.
    if (button.ariaBusy === "true") return;
    button.ariaBusy = "true";
    try {
      await act();
    } catch (error) {
      fail(what, error.message);
    }
    button.ariaBusy = "false";
    refresh();
  });
  return button;
}

// Action buttons: they are busy until the action has finished, and a failure is shown until it is dismissed.

import { byId, el, setText } from "./dom.js";
import { refresh } from "./store.js";

const box = byId("failed");
box.querySelector("button").addEventListener("click", () => { box.hidden = true; });

/** Show that an action failed, and why. */
function fail(what, why) {
  setText(box.firstElementChild, `${what}: ${why}`);
  box.hidden = false;
}

/** Make a button that runs `act`, an async function; `what` describes it to users. It ignores clicks while busy. */
export function actionButton(text, what, act) {
  const button = el("button", { type: "button", class: "quiet small", text, "aria-label": what });
  button.addEventListener("click", async () => {
    box.hidden = true;
    // A disabled button would lose the focus.
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

// The page's parts put together: theme, views, the state of the server.

import { askKey, findModel, startChat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { startKv } from "./kv.js";
import { startSettings } from "./settings.js";

const STATES = {
  ready: "ready",
  starting: "starting",
  draining: "shutting down",
  failed: "failed",
  away: "no answer",
  locked: "needs a key",
};

function showModel(name) {
  setText(byId("model-name"), name);
  if (name) setText(byId("empty-model"), name);
}

function showServer({ state, model }) {
  byId("state").dataset.state = state;
  setText(byId("state"), STATES[state] ?? state);
  if (model) showModel(model);
  if (state === "locked") askKey({ focus: false });
}

function showTheme() {
  byId("theme").setAttribute("aria-pressed", String(window.kvantTheme.isDark()));
}

function showView(view) {
  document.body.dataset.view = view;
  for (const name of ["chat", "kv"]) {
    byId(`view-${name}`).setAttribute("aria-pressed", String(name === view));
  }
  document.dispatchEvent(new Event("viewchange"));
}

byId("theme").addEventListener("click", () => window.kvantTheme.toggle());
document.addEventListener("themechange", showTheme);
for (const name of ["chat", "kv"]) byId(`view-${name}`).addEventListener("click", () => showView(name));

showTheme();
startSettings();
startChat(showModel);
startKv(showServer);
findModel().catch(() => {}); // what is wrong shows when it matters: on sending, or in the cache view

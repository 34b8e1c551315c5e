// The settings panel: values as the server's request fields, kept in this browser.

import { byId, recall, remember } from "./dom.js";

const KEY = "kvant.settings";
const dialog = byId("settings");
const form = dialog.querySelector("form");
const fields = [...form.querySelectorAll("[name]")];

function valueOf(field) {
  if (field.name === "system") return field.value.trim() || null;
  return field.value !== "" && field.checkValidity() ? field.valueAsNumber : null;
}

/** What is set: {system, temperature, ...}, without what is left to the server. */
export function settings() {
  return Object.fromEntries(fields.map((f) => [f.name, valueOf(f)]).filter(([, v]) => v !== null));
}

function changed() {
  for (const field of fields) field.setAttribute("aria-invalid", String(!field.checkValidity()));
  const now = settings();
  remember(KEY, now);
  const count = Object.keys(now).length;
  byId("open-settings").classList.toggle("changed", count > 0);
  byId("open-settings").title = count ? `${count} changed from the server's` : "";
}

export function startSettings() {
  const kept = recall(KEY) ?? {};
  for (const field of fields) field.value = kept[field.name] ?? "";
  changed();
  form.addEventListener("input", changed);
  byId("open-settings").addEventListener("click", () => dialog.showModal());
  byId("reset-settings").addEventListener("click", () => {
    form.reset();
    changed();
    byId("set-system").focus();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

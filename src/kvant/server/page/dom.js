// Small helpers around the document.

export const byId = (id) => document.getElementById(id);

/** A new element: `properties` are set as they are, `on` holds listeners, `aria` and `data` too. */
export function el(tag, { on = {}, aria = {}, data = {}, ...properties } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(aria)) node.setAttribute(`aria-${name}`, value);
  for (const [name, value] of Object.entries(on)) node.addEventListener(name, value);
  Object.assign(node.dataset, data);
  node.append(...children);
  return node;
}

export function button(label, action, properties = {}) {
  return el("button", { type: "button", textContent: label, on: { click: action }, ...properties });
}

/** Sets text only if it differs: no work for the browser, no repeats for screen readers. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Copies text; also where the clipboard API is closed because the page is plain http. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement;
    const area = el("textarea", { value: text, className: "sr" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}

export function copyButton(text) {
  const node = button("Copy", async () => {
    node.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => { node.textContent = "Copy"; }, 1500);
  }, { className: "plain", data: { action: "copy" } });
  return node;
}

/** What is stored as JSON under a key, or null: also if storage is closed or holds nonsense. */
export function recall(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

export function remember(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // Full or closed: the page works on, only without memory.
  }
}

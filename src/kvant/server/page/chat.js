// The conversation on the page: sending, streaming, editing, trying again.

import { ApiError, hasKey, listModels, setKey, streamChat } from "./client.js";
import {
  addDelta, hasPrevious, loadMessages, saveMessages, startNew, takePrevious, toSend,
} from "./conversation.js";
import { button, byId, copyButton, el, setText } from "./dom.js";
import { render } from "./markdown.js";
import { settings } from "./settings.js";

const SAVE_MS = 1000;
const RETRIES = 5; // after "too many requests", before a person has to ask
const NEAR = 48; // pixels from the end that still count as reading along

const list = byId("messages");
const scroller = byId("scroller");
const prompt = byId("prompt");

let messages = loadMessages();
let items = []; // the list item of each message
let model = "";
let current = null; // {answer, item, controller} of the answer that streams
let following = true;
let shown = () => {};

export async function findModel() {
  const models = await listModels();
  model = models[0]?.id ?? "";
  shown(model);
}

// Messages as list items

function makeItem(message) {
  const item = el("li", { className: `message ${message.role}`, data: { testid: message.role } });
  item.append(el("h3", { className: "sr" }, message.role === "user" ? "You" : "Answer"));
  if (message.role === "user") fillUser(item, message);
  else fillAnswer(item, message);
  return item;
}

function fillUser(item, message) {
  item.append(
    el("div", { className: "body" }, message.content),
    el("div", { className: "foot" }, actions(
      copyButton(() => message.content),
      button("Edit", () => edit(message), { className: "plain", data: { action: "edit" } }),
    )),
  );
}

const actions = (...buttons) => el("div", { className: "actions" }, ...buttons);

function fillAnswer(item, message) {
  item.append(
    el("details", { className: "reasoning", hidden: true },
      el("summary", {}, "Reasoning"), el("div", { className: "markdown" })),
    el("div", { className: "body markdown" }),
    el("div", { className: "tools-called" }),
    el("p", { className: "pending", hidden: true }, "Waiting for the first token"),
    el("div", { className: "problem", role: "alert", hidden: true }),
    el("div", { className: "foot" }, el("p", { className: "stats", data: { testid: "stats" } }), actions(
      copyButton(() => message.content),
      button("Regenerate", () => regenerate(message), {
        className: "plain", data: { action: "regenerate" },
      }),
    )),
  );
  const reasoning = item.querySelector(".reasoning");
  reasoning.querySelector("summary").addEventListener("click", () => { reasoning.touched = true; });
  update(item, message);
}

function update(item, message) {
  const streams = current?.answer === message;
  item.classList.toggle("streaming", streams);
  item.setAttribute("aria-busy", String(streams));
  updateReasoning(item.querySelector(".reasoning"), message, streams);
  render(item.querySelector(".body"), message.content);
  updateTools(item.querySelector(".tools-called"), message.tools ?? []);
  const blank = !message.content && !message.reasoning && !message.tools;
  item.querySelector(".pending").hidden = !(streams && blank && !message.error);
  setText(item.querySelector(".stats"), [message.note, message.stats].filter(Boolean).join(" · "));
  item.querySelector(".foot").hidden = streams || blank && !message.note && !message.stats;
  updateProblem(item.querySelector(".problem"), message);
}

function updateReasoning(box, { reasoning, content }, streams) {
  box.hidden = !reasoning;
  if (!reasoning) return;
  const thinking = streams && !content;
  if (!box.touched) box.open = thinking;
  setText(box.firstChild, thinking ? "Reasoning …" : "Reasoning");
  render(box.lastChild, reasoning);
}

function updateTools(box, tools) {
  const calls = tools.filter(Boolean);
  calls.forEach((call, i) => {
    const node = box.children[i] ?? box.appendChild(el("figure", { className: "code tool" },
      el("figcaption", {}, el("span"), copyButton(() => node.querySelector("code").textContent)),
      el("pre", { tabIndex: 0 }, el("code"))));
    setText(node.querySelector("span"), `Calls ${call.name}`);
    setText(node.querySelector("code"), pretty(call.arguments));
  });
  while (box.children.length > calls.length) box.lastChild.remove();
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function updateProblem(box, message) {
  box.hidden = !message.error;
  if (!message.error || box.error === message.error) return;
  box.error = message.error;
  const { text, requestId } = message.error;
  box.replaceChildren(
    el("p", { className: "what" }, text),
    ...(requestId ? [el("p", { className: "hint" }, `Request ${requestId}`)] : []),
    el("div", { className: "row" },
      button("Try again", () => regenerate(message), { data: { action: "retry" } }),
      el("span", { className: "hint countdown", role: "timer" })),
  );
}

function showAll() {
  items = messages.map(makeItem);
  list.replaceChildren(...items);
  showState();
  follow(true);
}

function append(message) {
  const item = makeItem(message);
  messages.push(message);
  items.push(item);
  list.append(item);
  return item;
}

/** Takes the messages from `index` on away. */
function cut(index) {
  messages.splice(index);
  for (const item of items.splice(index)) item.remove();
}

function showState() {
  const streams = current !== null;
  byId("empty").hidden = messages.length > 0;
  byId("restore").hidden = !hasPrevious();
  byId("send").hidden = streams;
  byId("stop").hidden = !streams;
  byId("new-chat").disabled = messages.length === 0;
  list.classList.toggle("busy", streams);
  items.forEach((item, i) => item.classList.toggle("last", i === items.length - 1));
}

// Answering

async function ask(text) {
  append({ role: "user", content: text });
  await answer();
}

async function regenerate(message) {
  const index = messages.indexOf(message);
  if (current || index < 0) return;
  const tries = message.tries ?? 0;
  cut(index);
  await answer(tries);
}

async function answer(tries = 0) {
  const message = { role: "assistant", content: "", tries };
  current = { answer: message, controller: new AbortController(), dirty: false };
  current.item = append(message);
  byId("key-form").hidden = true;
  showState();
  follow(true);
  setText(byId("announce"), "Answering");
  const clock = { sent: performance.now(), first: null, last: null, deltas: 0, usage: null };
  try {
    await stream(message, clock);
  } catch (error) {
    explain(message, error);
  }
  finish(message, clock);
}

async function stream(message, clock) {
  const { controller } = current;
  if (!model) await findModel();
  const body = requestBody(messages.slice(0, -1));
  clock.sent = performance.now();
  for await (const chunk of streamChat(body, controller.signal)) {
    clock.usage = chunk.usage ?? clock.usage;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (addDelta(message, choice.delta ?? {})) {
      clock.last = performance.now();
      clock.first ??= clock.last;
      clock.deltas += 1;
      schedule();
    }
    if (choice.finish_reason === "length") message.note = "Stopped at the token limit";
  }
}

function requestBody(before) {
  const { system, ...sampling } = settings();
  return {
    model,
    messages: toSend(before, system),
    stream: true,
    stream_options: { include_usage: true },
    ...sampling,
  };
}

function explain(message, error) {
  if (error.name === "AbortError") {
    message.note = "Stopped";
    return;
  }
  const known = error instanceof ApiError;
  if (!known) console.error(error);
  message.error = {
    text: known ? error.message : `The page failed: ${error.message}`,
    requestId: error.requestId ?? "",
  };
  if (error.status === 404) model = ""; // another model may be served by now
  if (error.status === 401) askKey();
  if (error.status === 429) message.wait = error.retryAfter ?? 5;
}

function finish(message, clock) {
  const { item } = current;
  current = null;
  message.stats = describe(clock);
  update(item, message);
  showState();
  follow();
  saveMessages(messages);
  setText(byId("announce"), message.error ? "No answer" : `Answer complete. ${message.stats}`);
  if (message.wait !== undefined) retryLater(message, item);
}

/** "212 tokens · 34.1 tokens/s · first after 0.12 s · 64 of 100 prompt tokens cached" */
function describe({ sent, first, last, deltas, usage }) {
  if (first === null) return "";
  const tokens = usage?.completion_tokens ?? deltas;
  const seconds = (last - first) / 1000;
  const parts = [`${usage ? "" : "about "}${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`first after ${((first - sent) / 1000).toFixed(2)} s`);
  const hits = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`${hits ?? 0} of ${usage.prompt_tokens} prompt tokens cached`);
  return parts.join(" · ");
}

function retryLater(message, item) {
  const countdown = item.querySelector(".countdown");
  if (message.tries >= RETRIES) return;
  const end = performance.now() + message.wait * 1000;
  const tick = () => {
    if (!item.isConnected || current || message.cancelled) return setText(countdown, "");
    const left = Math.ceil((end - performance.now()) / 1000);
    if (left <= 0) {
      message.tries += 1;
      return regenerate(message);
    }
    setText(countdown, `by itself in ${left} s`);
    return setTimeout(tick, 250);
  };
  tick();
}

/** Renders at the next frame, or soon if the page is hidden, where frames do not come. */
function schedule() {
  const mine = current;
  if (mine.dirty) return;
  mine.dirty = true;
  const draw = () => {
    mine.dirty = false;
    if (mine !== current) return;
    update(mine.item, mine.answer);
    follow();
    saveNow();
  };
  if (document.hidden) setTimeout(draw, 500);
  else requestAnimationFrame(draw);
}

let saved = 0;
function saveNow() {
  if (performance.now() - saved < SAVE_MS) return;
  saved = performance.now();
  saveMessages(messages);
}

function stop() {
  const last = messages.at(-1);
  if (last?.wait !== undefined) last.cancelled = true;
  current?.controller.abort();
}

// Editing

function edit(message) {
  if (current) return;
  const item = items[messages.indexOf(message)];
  const area = el("textarea", { value: message.content, rows: 3, aria: { label: "Edit message" } });
  const close = () => {
    form.remove();
    item.classList.remove("editing");
    item.querySelector('[data-action="edit"]').focus();
  };
  const form = el("form", { className: "edit" }, area,
    el("div", { className: "row end" },
      el("p", { className: "hint" }, "Replaces what follows."),
      button("Cancel", close, { className: "plain", data: { action: "cancel" } }),
      el("button", { className: "primary", data: { action: "resend" } }, "Send")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = area.value.trim();
    if (!text || current) return;
    cut(messages.indexOf(message));
    ask(text);
    prompt.focus();
  });
  area.addEventListener("keydown", (event) => {
    if (isSend(event)) {
      event.preventDefault();
      form.requestSubmit();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      close();
    }
  });
  area.addEventListener("input", () => grow(area));
  if (item.classList.contains("editing")) return;
  item.classList.add("editing");
  item.append(form);
  grow(area);
  area.focus();
}

const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

// Scrolling

function follow(force = false) {
  if (force) following = true;
  if (following) scroller.scrollTop = scroller.scrollHeight;
  showJump();
}

function showJump() {
  byId("jump").hidden = following || scroller.scrollHeight <= scroller.clientHeight + NEAR;
}

function watchScroll() {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  showJump();
}

// The key

/** Shows the field for the API key, for a person who lacks one or whose key was refused. */
export function askKey({ focus = true } = {}) {
  const form = byId("key-form");
  if (!form.hidden) return;
  form.hidden = false;
  setText(byId("key-note"), hasKey()
    ? "The last key was refused. A key is kept until this tab is closed."
    : "Kept until this tab is closed.");
  if (focus) byId("key-input").focus();
}

async function useKey(event) {
  event.preventDefault();
  setKey(byId("key-input").value.trim());
  byId("key-input").value = "";
  byId("key-form").hidden = true;
  prompt.focus();
  document.dispatchEvent(new Event("keychange"));
  const last = messages.at(-1);
  if (last?.error && !current) await regenerate(last);
}

function submit(event) {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || current) return;
  prompt.value = "";
  grow(prompt);
  ask(text);
}

function newChat() {
  stop();
  startNew(messages);
  messages = [];
  showAll();
  prompt.focus();
}

function restore() {
  messages = takePrevious();
  saveMessages(messages);
  showAll();
  prompt.focus();
}

function onPromptKey(event) {
  if (isSend(event)) {
    event.preventDefault();
    byId("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !prompt.value) {
    const last = messages.findLast((m) => m.role === "user");
    if (last) edit(last);
  }
}

/** Wires the chat up; `onModel` hears the name of the model. */
export function startChat(onModel) {
  shown = onModel;
  byId("composer").addEventListener("submit", submit);
  byId("stop").addEventListener("click", () => {
    stop();
    prompt.focus();
  });
  byId("new-chat").addEventListener("click", newChat);
  byId("restore").addEventListener("click", restore);
  byId("key-form").addEventListener("submit", useKey);
  byId("jump").addEventListener("click", () => follow(true));
  byId("starters").addEventListener("click", (event) => {
    if (event.target.tagName === "BUTTON" && !current) ask(event.target.textContent);
  });
  prompt.addEventListener("keydown", onPromptKey);
  prompt.addEventListener("input", () => grow(prompt));
  scroller.addEventListener("scroll", watchScroll, { passive: true });
  new ResizeObserver(() => follow()).observe(scroller);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("settings").open) stop();
  });
  addEventListener("pagehide", () => { if (current) saveMessages(messages); });
  showAll();
  if (matchMedia("(hover: hover)").matches) prompt.focus();
}

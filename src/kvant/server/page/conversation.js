// The conversation as data: what is kept in this browser and what is sent to the server.

import { recall, remember } from "./dom.js";

const NOW = "kvant.chat";
const BEFORE = "kvant.previous";

const isMessage = (m) =>
  (m?.role === "user" || m?.role === "assistant") && typeof m.content === "string";

function load(key) {
  const messages = recall(key);
  return Array.isArray(messages) ? messages.filter(isMessage) : [];
}

export const loadMessages = () => load(NOW);
export const hasPrevious = () => load(BEFORE).length > 0;

/** Keeps the messages. What can only be tried again now (`retry`) is not worth keeping. */
export function saveMessages(messages) {
  remember(NOW, messages.map(({ role, content, reasoning, tools, stats, note, error }) => ({
    role, content, reasoning, tools, stats, note, error,
  })));
}

export function startNew(messages) {
  if (messages.length) remember(BEFORE, messages);
  remember(NOW, null);
}

export function takePrevious() {
  const messages = load(BEFORE);
  remember(BEFORE, null);
  return messages;
}

/**
 * Messages as the server wants them: empty answers are left out, and user messages that then
 * follow one another are one, since many chat templates insist on turns.
 */
export function toSend(messages, system) {
  const out = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (role === "assistant" && !content) continue;
    if (out.at(-1)?.role === role) out.at(-1).content += `\n\n${content}`;
    else out.push({ role, content });
  }
  return out;
}

/** Adds one delta of a stream to an answer; true if it carried something to read. */
export function addDelta(answer, delta) {
  const thought = delta.reasoning_content ?? "";
  if (thought) answer.reasoning = (answer.reasoning ?? "") + thought;
  if (delta.content) answer.content += delta.content;
  for (const call of delta.tool_calls ?? []) addToolCall(answer, call);
  return Boolean(thought || delta.content || delta.tool_calls?.length);
}

function addToolCall(answer, { index = 0, function: part = {} }) {
  answer.tools ??= [];
  const call = (answer.tools[index] ??= { name: "", arguments: "" });
  call.name += part.name ?? "";
  call.arguments += part.arguments ?? "";
}

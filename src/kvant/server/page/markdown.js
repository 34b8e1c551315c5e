// Markdown as DOM nodes. Text only ever becomes text nodes: no HTML of a model is parsed.

import { copyButton, el } from "./dom.js";

const DEPTH = 8; // of nested blocks, and of nested emphasis: deeper markup stays text
const SCHEMES = new Set(["http:", "https:", "mailto:"]);

const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const DIVIDER = /^\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?$/;

/** Cuts lines into blocks: {kind, lines, ...}. Every line is in one block, blank ones aside. */
function* blocks(lines) {
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const block = readBlock(lines, i);
    yield { ...block, lines: lines.slice(i, block.end) };
    i = block.end;
  }
}

function readBlock(lines, start) {
  const line = lines[start];
  const fence = fenceOf(line);
  if (fence) return readFence(lines, start, fence);
  if (HEADING.test(line)) return { kind: "heading", end: start + 1 };
  if (RULE.test(line)) return { kind: "rule", end: start + 1 };
  if (QUOTE.test(line)) return { kind: "quote", end: endOf(lines, start, (l) => l.trim() && !opens(l) || QUOTE.test(l)) };
  if (ITEM.test(line)) return readList(lines, start);
  if (startsTable(lines, start)) {
    return { kind: "table", end: endOf(lines, start, (l) => l.includes("|")) };
  }
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !opens(lines[end]) && !startsTable(lines, end)) {
    end += 1;
  }
  return { kind: "paragraph", end };
}

/** [mark, language] if a line opens a block of code. In code: a pattern for it backtracks. */
function fenceOf(line) {
  const [, mark, info] = line.match(FENCE) ?? [];
  if (mark === undefined || info.includes("`")) return null;
  return [mark, info.trim().split(/\s/, 1)[0]];
}

const opens = (line) =>
  fenceOf(line) !== null || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

const startsTable = (lines, i) =>
  lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") &&
  DIVIDER.test(lines[i + 1].trim());

function endOf(lines, start, belongs) {
  let end = start + 1;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

function readFence(lines, start, [mark, language]) {
  const closing = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}\\s*$`);
  let end = start + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  return { kind: "code", language, code: lines.slice(start + 1, end).join("\n"), end: Math.min(end + 1, lines.length) };
}

const isOrdered = (marker) => /\d/.test(marker);

function readList(lines, start) {
  const [, indent, marker] = lines[start].match(ITEM);
  const ordered = isOrdered(marker);
  let end = start + 1;
  for (let i = end; i < lines.length; i += 1) {
    const line = lines[i];
    if (!line.trim()) continue;
    const item = line.match(ITEM);
    const inside = line.search(/\S/) > indent.length + 1;
    const next = item && item[1].length <= indent.length + 1 && isOrdered(item[2]) === ordered;
    const lazy = i === end && !item && !opens(line) && lines[i - 1].trim();
    if (!inside && !next && !lazy || RULE.test(line)) break;
    end = i + 1;
  }
  return { kind: "list", ordered, first: Number.parseInt(marker, 10), indent: indent.length, end };
}

function makeBlock(block, depth) {
  const { kind, lines } = block;
  if (kind === "code") return makeCode(block);
  if (kind === "rule") return el("hr");
  if (depth >= DEPTH) return el("p", {}, lines.join("\n"));
  if (kind === "heading") {
    const [, marks, text] = lines[0].match(HEADING);
    // The page has levels 1 and 2, its messages level 3.
    return el(`h${Math.min(6, marks.length + 3)}`, {}, ...inline(text.replace(/\s+#+\s*$/, "")));
  }
  if (kind === "quote") {
    const inner = lines.map((line) => line.replace(QUOTE, ""));
    return el("blockquote", {}, ...makeAll(inner, depth + 1));
  }
  if (kind === "list") return makeList(block, depth);
  if (kind === "table") return makeTable(lines);
  return el("p", {}, ...inlineLines(lines));
}

const makeAll = (lines, depth) => [...blocks(lines)].map((block) => makeBlock(block, depth));

function makeCode({ language, code }) {
  const text = el("code", {}, code);
  const head = el("figcaption", {}, el("span", {}, language), copyButton(() => text.textContent));
  const pre = el("pre", { tabIndex: 0, aria: { label: language ? `Code, ${language}` : "Code" } }, text);
  return el("figure", { className: "code" }, head, pre);
}

function makeList({ lines, ordered, first, indent }, depth) {
  const items = [];
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent + 1) {
      const width = item[1].length + item[2].length + Math.min(Math.max(item[3].length, 1), 4);
      items.push({ width, lines: [item[4]] });
    } else {
      const { width, lines: own } = items.at(-1);
      own.push(line.slice(Math.min(width, Math.max(0, line.search(/\S/)))));
    }
  }
  const list = el(ordered ? "ol" : "ul");
  if (ordered && first !== 1) list.start = first;
  for (const { lines: own } of items) {
    const nodes = makeAll(own, depth + 1);
    const tight = nodes.filter((node) => node.tagName === "P").length === 1;
    list.append(el("li", {}, ...nodes.flatMap((n) => (tight && n.tagName === "P" ? [...n.childNodes] : [n]))));
  }
  return list;
}

const cells = (line) =>
  line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));

function alignment(mark) {
  if (/^:-+:$/.test(mark)) return "center";
  return /^-+:$/.test(mark) ? "right" : "";
}

function makeTable([head, divider, ...rows]) {
  const names = cells(head);
  const aligned = cells(divider).map(alignment);
  const row = (tag, texts) =>
    el("tr", {}, ...names.map((_, i) => el(tag, { className: aligned[i] ?? "" }, ...inline(texts[i] ?? ""))));
  const table = el("table", {},
    el("thead", {}, row("th", names)),
    el("tbody", {}, ...rows.map((line) => row("td", cells(line)))));
  return el("div", { className: "table", tabIndex: 0, role: "group", aria: { label: "Table" } }, table);
}

/** Lines of a paragraph. Chat models break lines on purpose, so a break stays one. */
function inlineLines(lines) {
  return inline(lines.map((line) => line.trim()).join("\n"));
}

const WORD = /[\p{L}\p{N}_]/u;
const BARE = /https?:\/\/[^\s<>"'`]+/y;
const AUTO = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const ESCAPED = /[!-/:-@[-`{-~]/;

/** Text within a block as nodes. Linear but for nesting, whose depth is limited. */
export function inline(text, depth = 0) {
  const out = [];
  let plain = "";
  const missing = new Set(); // delimiters without a closing one in what is left
  const push = (node) => {
    if (plain) out.push(...withBreaks(plain));
    plain = "";
    out.push(node);
  };
  let i = 0;
  while (i < text.length) {
    const found = "\\`*_~[!<h".includes(text[i]) ? special(text, i, depth, missing) : null;
    if (found?.node) push(found.node);
    else plain += found ? found.text : text[i];
    i = found ? found.end : i + 1;
  }
  if (plain) out.push(...withBreaks(plain));
  return out;
}

function withBreaks(text) {
  return text.split("\n").flatMap((line, i) => (i ? [el("br"), line] : [line])).filter((n) => n !== "");
}

function special(text, i, depth, missing) {
  switch (text[i]) {
    case "\\":
      return ESCAPED.test(text[i + 1] ?? "") ? { text: text[i + 1], end: i + 2 } : null;
    case "`":
      return codeSpan(text, i, missing);
    case "[":
      return link(text, i, depth, missing);
    case "!":
      // Pictures become links: nothing is loaded from elsewhere.
      return text[i + 1] === "[" ? link(text, i + 1, depth, missing) : null;
    case "<":
      return address(text, i, AUTO);
    case "h":
      return WORD.test(text[i - 1] ?? "") ? null : address(text, i, BARE);
    default:
      return emphasis(text, i, depth, missing);
  }
}

function run(text, i) {
  let end = i;
  while (text[end] === text[i]) end += 1;
  return text.slice(i, end);
}

function codeSpan(text, i, missing) {
  const mark = run(text, i);
  const whole = { text: mark, end: i + mark.length };
  if (missing.has(mark)) return whole;
  for (let end = text.indexOf(mark, i + mark.length); end >= 0;) {
    const closing = run(text, end);
    if (closing.length === mark.length) {
      let code = text.slice(i + mark.length, end).replaceAll("\n", " ");
      if (/^ .*\S.* $/.test(code)) code = code.slice(1, -1);
      return { node: el("code", {}, code), end: end + mark.length };
    }
    end = text.indexOf(mark, end + closing.length);
  }
  missing.add(mark);
  return whole;
}

function emphasis(text, i, depth, missing) {
  const marks = run(text, i);
  const whole = { text: marks, end: i + marks.length };
  const [mark] = marks;
  const known = mark === "~" ? marks.length === 2 : marks.length <= 3;
  const wordBefore = mark === "_" && WORD.test(text[i - 1] ?? "");
  const after = text[i + marks.length];
  if (!known || wordBefore || !after || /\s/.test(after) || depth >= DEPTH || missing.has(marks)) {
    return whole;
  }
  const end = closingAt(text, i + marks.length, marks);
  if (end < 0) {
    missing.add(marks);
    return whole;
  }
  const inner = inline(text.slice(i + marks.length, end), depth + 1);
  const node = {
    1: () => el("em", {}, ...inner),
    2: () => el(mark === "~" ? "del" : "strong", {}, ...inner),
    3: () => el("strong", {}, el("em", {}, ...inner)),
  }[marks.length]();
  return { node, end: end + marks.length };
}

function closingAt(text, start, marks) {
  for (let i = start; i < text.length;) {
    if (text[i] === "\\") {
      i += 2;
    } else if (text[i] === "`") {
      const tick = run(text, i);
      const end = text.indexOf(tick, i + tick.length);
      i = (end < 0 ? i : end) + tick.length;
    } else if (text[i] === marks[0]) {
      const found = run(text, i);
      const end = i + found.length;
      const fits = found.length === marks.length && !/\s/.test(text[i - 1]);
      if (fits && !(marks[0] === "_" && WORD.test(text[end] ?? ""))) return i;
      i = end;
    } else {
      i += 1;
    }
  }
  return -1;
}

function link(text, i, depth, missing) {
  if (depth >= DEPTH || missing.has("](")) return null;
  const middle = text.indexOf("](", i);
  if (middle < 0) {
    missing.add("](");
    return null;
  }
  const label = text.slice(i + 1, middle);
  const inner = label.lastIndexOf("[");
  if (inner >= 0 && !label.includes("]", inner)) return null; // the label of a later link
  const end = closingParenthesis(text, middle + 2);
  if (end < 0) return null;
  const target = text.slice(middle + 2, end).trim().match(/^<?(\S*?)>?(?:\s+["'(].*["')])?$/s);
  if (!target) return null;
  const nodes = inline(label, depth + 1);
  return { node: anchor(target[1], nodes) ?? el("span", {}, ...nodes), end: end + 1 };
}

function closingParenthesis(text, start) {
  let open = 0;
  const limit = Math.min(text.length, start + 2000);
  for (let i = start; i < limit && text[i] !== "\n"; i += 1) {
    if (text[i] === "(") open += 1;
    if (text[i] === ")") {
      if (open === 0) return i;
      open -= 1;
    }
  }
  return -1;
}

function address(text, i, pattern) {
  pattern.lastIndex = i;
  const match = pattern.exec(text);
  if (!match) return null;
  let url = match[1] ?? match[0];
  let end = pattern.lastIndex;
  if (!match[1]) {
    end -= url.length;
    url = withoutTail(url);
    end += url.length;
  }
  const node = anchor(url, [url]);
  return node && { node, end };
}

/** A bare address without the punctuation of the sentence around it. */
function withoutTail(url) {
  let open = 0;
  for (const c of url) open += (c === "(") - (c === ")");
  let end = url.length;
  for (; end > 0; end -= 1) {
    const unopened = url[end - 1] === ")" && open < 0;
    if (unopened) open += 1;
    else if (!".,;:!?*_~]".includes(url[end - 1])) break;
  }
  return url.slice(0, end);
}

/** A link that opens elsewhere, or null for schemes that could run code or leave the web. */
function anchor(address, nodes) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!SCHEMES.has(url.protocol)) return null;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...nodes);
}

/**
 * Shows text in a container. Blocks whose source is unchanged keep their nodes, so that a growing
 * answer costs its last block only, and selections and focus above stay.
 */
export function render(container, text) {
  const old = container.sources ?? [];
  const fresh = [...blocks(text.replaceAll("\r\n", "\n").split("\n"))];
  fresh.forEach((block, i) => {
    const source = block.lines.join("\n");
    const before = old[i];
    if (before?.source === source && before.kind === block.kind) return;
    const node = container.children[i];
    if (block.kind === "code" && before?.kind === "code" && before.language === block.language) {
      node.querySelector("code").textContent = block.code;
    } else if (node) {
      node.replaceWith(makeBlock(block, 0));
    } else {
      container.append(makeBlock(block, 0));
    }
  });
  while (container.children.length > fresh.length) container.lastElementChild.remove();
  container.sources = fresh.map(({ kind, language, lines }) => ({ kind, language, source: lines.join("\n") }));
}

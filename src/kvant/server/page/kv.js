// The live view of the cache: asks for GET /kv and shows what it says.

import { ApiError, readKv } from "./client.js";
import { byId, el, setText } from "./dom.js";
import { PageMap, colourName } from "./map.js";
import { Pool, Slots } from "./pool.js";

const POLL_MS = 500;
const ASIDE_MS = 2000; // while the chat covers the view, on a phone
const HIDDEN_MS = 5000;
const AWAY_MS = 10_000; // at most, while the server does not answer
const RATE_S = 2; // tokens/s are an average over this long
const HISTORY = 120; // points of the small curve

const slots = new Slots();
const rows = new Map(); // request id -> row
let pool = null;
let latest = null; // the snapshot that is shown
let map = null;
let history = []; // {uptime, generated, rate}
let failures = 0;
let timer = 0;
let asking = null;
let pinned = null;
let showsWhole = false; // the map, also where a large pool is free
let hovered = null;
let onState = () => {};

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const number = (n) => whole.format(n);
const bytes = (n) => (n < 1000 ? `${number(n)} B` : `${(n / 1000).toFixed(n < 99_950 ? 1 : 0)} kB`);
const percent = (part, all) => `${all ? Math.round((100 * part) / all) : 0} %`;

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

// Asking

async function poll() {
  clearTimeout(timer);
  if (asking) return;
  asking = AbortSignal.timeout(AWAY_MS);
  try {
    const snapshot = await readKv(asking);
    failures = 0;
    show(snapshot);
    onState({ state: snapshot.state, model: snapshot.model });
  } catch (error) {
    failures += 1;
    showProblem(error);
  }
  asking = null;
  timer = setTimeout(poll, delay());
}

function delay() {
  if (document.hidden) return HIDDEN_MS;
  if (failures) return Math.min(AWAY_MS, POLL_MS * 2 ** failures);
  return byId("kv").offsetParent === null ? ASIDE_MS : POLL_MS;
}

function showProblem(error) {
  const known = error instanceof ApiError;
  if (!known) console.error(error);
  const away = known && error.status === 0;
  byId("kv-status").hidden = false;
  setText(byId("kv-status"), away ? "No answer from the server. Trying again." : error.message);
  byId("kv").classList.add("stale");
  history = [];
  const other = error.status === 401 ? "locked" : "failed";
  onState({ state: away ? "away" : other });
}

// Showing

function show(snapshot) {
  const loaded = snapshot.kv !== undefined; // not before the model is
  byId("kv-status").hidden = loaded;
  byId("kv-body").hidden = !loaded;
  if (!loaded) return setText(byId("kv-status"), "The model is being loaded.");
  byId("kv").classList.remove("stale");
  showFormat(snapshot.kv);
  showNumbers(snapshot);
  pool = new Pool(snapshot, slots.assign(snapshot.requests));
  latest = snapshot;
  map.show(pool);
  showCounts(snapshot);
  return showRequests(snapshot);
}

function showFormat({ label, bytes_per_token: now, bytes_per_token_16bit: plain }) {
  const ratio = now / plain;
  setText(byId("kv-label"), label);
  const gain = ratio < 0.995 ? `${(1 / ratio).toFixed(1)}× the tokens` : "";
  setText(byId("kv-gain"), gain);
  setText(byId("kv-bytes"), `${bytes(now)} per token, ${ratio.toFixed(2)} of 16 bit (${bytes(plain)})`);
  byId("kv-bar").firstElementChild.style.width = `${Math.min(100, 100 * ratio)}%`;
  byId("kv-bar").setAttribute("aria-label", `${bytes(now)} of ${bytes(plain)}`);
}

function showNumbers({ pages, kv, tokens, running, waiting, max_running, preemptions, uptime_s }) {
  setText(byId("n-room"), number((pages.free + pages.cached) * kv.page_tokens));
  setText(byId("n-room-note"), `of ${number(pages.total * kv.page_tokens)}`);
  setText(byId("n-running"), number(running));
  setText(byId("n-waiting"), `${number(waiting)} waiting, limit ${number(max_running)}`);
  setText(byId("n-hits"), percent(tokens.cached, tokens.prompt));
  setText(byId("n-preempted"), number(preemptions));
  setText(byId("n-generated"), number(tokens.generated));
  setText(byId("n-uptime"), `in ${duration(uptime_s)}`);
  showSpeed(uptime_s, tokens.generated);
}

function showSpeed(uptime, generated) {
  const last = history.at(-1);
  if (last && (uptime < last.uptime || generated < last.generated)) history = [];
  if (last && uptime === last.uptime) return;
  const from = history.findLast((point) => uptime - point.uptime >= RATE_S) ?? history[0];
  const rate = from ? (generated - from.generated) / (uptime - from.uptime) : 0;
  history = [...history.slice(1 - HISTORY), { uptime, generated, rate }];
  setText(byId("n-speed"), rate >= 100 ? number(rate) : rate.toFixed(1));
  const most = Math.max(1, ...history.map((point) => point.rate));
  const line = history.map((point, i) =>
    `${120 - (history.length - 1 - i) * (120 / (HISTORY - 1))},${20 - (point.rate / most) * 18}`);
  const spark = byId("spark");
  spark.lastElementChild.setAttribute("points", line.join(" "));
  const first = line[0].split(",")[0];
  spark.firstElementChild.setAttribute("d", `M${first},22 L${line.join(" L")} L120,22 Z`);
}

function showCounts({ pages, running, waiting, requests }) {
  const { share, extent } = map;
  const all = `${number(pages.total)} pages`;
  const part = extent < pages.total ? `The first ${number(extent)} of ${all}` : all;
  const squares = share === 1 ? "" : `, ${number(share)} in a square`;
  setText(byId("map-caption"), `${part}${squares}`);
  byId("map-whole").hidden = extent === pages.total && !showsWhole;
  setText(byId("c-held"), number(pages.held));
  setText(byId("c-shared"), number(pool.shared));
  setText(byId("c-cached"), number(pages.cached));
  setText(byId("c-free"), number(pages.free));
  const label = `Map of ${number(pages.total)} pages of ${pool.pageTokens} tokens: ${number(pages.held)} held, ` +
    `${number(pool.shared)} of them shared, ${number(pages.cached)} cached, ` +
    `${number(pages.free)} free. One square is ${share === 1 ? "one page" : `${number(share)} pages`}.`;
  if (byId("map").getAttribute("aria-label") !== label) byId("map").setAttribute("aria-label", label);
  const more = running + waiting - requests.length;
  byId("more-requests").hidden = more <= 0;
  setText(byId("more-requests"), `${number(more)} more are neither listed nor drawn.`);
}

const pagesOf = ({ pages }) => pages.reduce((sum, [, count]) => sum + count, 0);

function showRequests({ requests }) {
  const body = byId("requests").tBodies[0];
  const ids = new Set(requests.map(({ id }) => id));
  for (const [id, row] of rows) {
    if (ids.has(id)) continue;
    row.remove();
    rows.delete(id);
  }
  if (!ids.has(pinned)) pinned = null;
  if (!ids.has(hovered)) hovered = null;
  requests.forEach((request, i) => {
    if (!rows.has(request.id)) rows.set(request.id, makeRow(request.id));
    const row = rows.get(request.id);
    if (body.rows[i] !== row) body.insertBefore(row, body.rows[i] ?? null);
    fillRow(row, request);
  });
  byId("requests").hidden = requests.length === 0;
  byId("no-requests").hidden = requests.length > 0;
  setTabStop();
  light();
}

function makeRow(id) {
  const name = el("button", { type: "button", tabIndex: -1, aria: { pressed: "false" } },
    el("i"), el("span"), el("small"));
  const row = el("tr", { data: { testid: "request", request: id } },
    el("th", { scope: "row" }, name), ...Array.from({ length: 4 }, () => el("td")));
  name.addEventListener("click", () => {
    pinned = pinned === id ? null : id;
    light();
  });
  const enter = () => { hovered = id; light(); };
  const leave = () => { hovered = null; light(); };
  row.addEventListener("pointerenter", (e) => { if (e.pointerType === "mouse") enter(); });
  row.addEventListener("pointerleave", leave);
  name.addEventListener("focus", () => { if (name.matches(":focus-visible")) enter(); setTabStop(name); });
  name.addEventListener("blur", leave);
  return row;
}

function fillRow(row, request) {
  const [swatch, name, note] = row.querySelectorAll("i, span, small");
  swatch.style.color = `var(${colourName(pool.slots.get(request.id))})`;
  swatch.classList.toggle("none", pagesOf(request) === 0);
  setText(name, `#${request.id}`);
  setText(note, request.status === "waiting" ? "waiting" : "");
  const { prompt_tokens: prompt, generated, cached_tokens: cached } = request;
  const recent = request.recent?.length ? ` + ${request.recent.length}` : "";
  const texts = [number(prompt), number(generated), percent(cached, prompt), `${number(pagesOf(request))}${recent}`];
  [...row.querySelectorAll("td")].forEach((cell, i) => setText(cell, texts[i]));
  row.lastElementChild.title = recent && "Pages in the format, and those of recent tokens in a finer one";
}

/** One row can be reached with Tab; arrows go on from there. */
function setTabStop(wanted) {
  const names = [...byId("requests").querySelectorAll("button")];
  const stop = wanted ?? names.find((name) => name.tabIndex === 0) ?? names[0];
  for (const name of names) name.tabIndex = name === stop ? 0 : -1;
}

function onArrow(event) {
  const names = [...byId("requests").querySelectorAll("button")];
  const at = names.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: names.length - 1 }[event.key];
  if (at < 0 || to === undefined || !names[to]) return;
  event.preventDefault();
  names[to].focus();
}

function light() {
  const id = hovered ?? pinned;
  for (const [other, row] of rows) {
    row.classList.toggle("lit", other === id);
    row.querySelector("button").setAttribute("aria-pressed", String(other === pinned));
  }
  map.highlight(id);
}

function switchExtent() {
  showsWhole = !showsWhole;
  setText(byId("map-whole"), showsWhole ? "Show the used part" : "Show all");
  map.showWhole(showsWhole);
}

// What is under the pointer

function readOut(event) {
  const pages = map.pagesAt(event.clientX, event.clientY);
  setText(byId("map-readout"), pages && pool ? describe(...pages) : "");
}

function describe(first, count) {
  if (count > 1) return `${number(first)} to ${number(first + count - 1)}`;
  const holders = pool.holdersOf(first).map((id) => `#${id}`);
  const few = holders.length > 3 ? [...holders.slice(0, 2), `${holders.length - 2} more`] : holders;
  const state = pool.owner[first] ? "cached" : "free";
  return `${number(first)}: ${few.join(", ") || state}`;
}

/** Starts asking; `listener` hears {state, model} after each answer or failure. */
export function startKv(listener) {
  onState = listener;
  map = new PageMap(byId("map-wrap"), byId("map"), byId("map-flash"), () => showCounts(latest));
  byId("requests").addEventListener("keydown", onArrow);
  byId("map-whole").addEventListener("click", switchExtent);
  byId("map-wrap").addEventListener("pointermove", readOut);
  byId("map-wrap").addEventListener("pointerleave", () => setText(byId("map-readout"), ""));
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  document.addEventListener("keychange", poll);
  document.addEventListener("viewchange", poll);
  poll();
}

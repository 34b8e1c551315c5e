// The map of pages: a canvas with one square for each page, or for some pages if there are many.

import { CACHED } from "./pool.js";

const LARGEST = 20; // pixels of a square with its gap
const SMALLEST = 6;
const FIRST = 512; // pages of a larger pool that are shown at first, while the others are free
const FLASH_MS = 450; // shorter than the time between two snapshots
const TAKEN = 0.7; // how dark the flash is of a page that changed hands
const WRITTEN = 0.35; // and of one that got tokens
const FRAME_MS = 80; // few frames: the model may be computed by the same processor
const COLOURS = 10;

const calm = matchMedia("(prefers-reduced-motion: reduce)");

export const colourName = (slot) => `--r${slot % COLOURS}`;

/** Colours of the style sheet as the canvas takes them, whatever they are made of there. */
function readColours(probe) {
  const read = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const requests = Array.from({ length: COLOURS }, (_, i) => read(colourName(i)));
  const colours = {
    requests, free: read("--free"), cached: read("--cached"), paper: read("--panel"), ink: read("--ink"),
  };
  probe.style.color = "";
  return colours;
}

/** How many pages a square stands for, how large squares are, and how many go in a row. */
export function arrange(total, width, height) {
  const room = (size) => Math.floor(width / size) * Math.floor(height / size);
  let share = 1;
  while (Math.ceil(total / share) > room(SMALLEST)) share *= 2;
  const count = Math.ceil(total / share);
  let size = LARGEST;
  while (size > SMALLEST && room(size) < count) size -= 1;
  const left = (one) => width % one;
  for (const less of [size - 1, size - 2]) {
    if (less >= SMALLEST && left(less) < left(size)) size = less; // rows end nearer to the edge
  }
  const columns = Math.max(1, Math.floor(width / size));
  return { share, count, size, columns, rows: Math.ceil(count / columns) };
}

export class PageMap {
  #pool = null;
  #squares = [];
  #place = null;
  #lit = null; // the id of the highlighted request
  #flashes = new Map(); // square -> {since, dark}
  #extent = 0; // pages in the map; the pool's first ones, since the lowest free one is taken
  #whole = false;
  #timer = 0;

  /** `arranged` is called when `share` or `extent` may have changed. */
  constructor(wrap, base, overlay, arranged) {
    this.wrap = wrap;
    this.arranged = arranged;
    this.base = base;
    this.overlay = overlay;
    this.colours = readColours(wrap);
    new ResizeObserver(() => this.#arrange()).observe(wrap);
    document.addEventListener("themechange", () => {
      this.colours = readColours(wrap);
      this.#draw();
    });
  }

  /** How many pages one square stands for. */
  get share() {
    return this.#place?.share ?? 1;
  }

  /** How many pages are in the map: all, or the first ones if the others are free. */
  get extent() {
    return this.#extent;
  }

  show(pool) {
    const before = this.#pool;
    this.#pool = pool;
    const fresh = before?.total !== pool.total;
    if (fresh) this.#extent = 0;
    if (fresh || this.#extent < pool.end) this.#arrange();
    else if (this.#place && (this.#lit !== null || !pool.looksLike(before))) this.#count();
    if (fresh) return;
    this.#flash(pool.writtenSince(before), WRITTEN);
    this.#flash(pool.changedSince(before), TAKEN);
  }

  /** Shows the whole pool, also where it is free, or only the part that was used. */
  showWhole(whole) {
    this.#whole = whole;
    this.#extent = 0;
    this.#arrange();
  }

  highlight(id) {
    if (this.#lit === id) return;
    this.#lit = id;
    this.#draw();
  }

  /** The pages of the square at a point of the page: [first, count], or null. */
  pagesAt(clientX, clientY) {
    if (!this.#place) return null;
    const box = this.base.getBoundingClientRect();
    const { size, columns, count, share } = this.#place;
    const column = Math.floor((clientX - box.left) / size);
    const square = Math.floor((clientY - box.top) / size) * columns + column;
    if (column < 0 || column >= columns || square < 0 || square >= count) return null;
    return [square * share, Math.min(share, this.#extent - square * share)];
  }

  #arrange() {
    const width = this.wrap.clientWidth;
    if (!this.#pool || width === 0) { // nothing to show, or not in view
      this.#place = null;
      return;
    }
    const { total, end } = this.#pool;
    let extent = Math.max(FIRST, this.#extent); // only grows, so that pages stay where they are
    while (extent < end) extent *= 2;
    this.#extent = this.#whole ? total : Math.min(extent, total);
    const ratio = devicePixelRatio || 1;
    const height = Math.min(Math.max(220, innerHeight * 0.36), width);
    const wanted = [this.#extent, width, height, ratio].join();
    if (this.#place?.wanted === wanted) return;
    this.#place = { wanted, ...arrange(this.#extent, width, height) };
    for (const canvas of [this.base, this.overlay]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.ceil(this.#place.rows * this.#place.size * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${canvas.height / ratio}px`;
      canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    this.#flashes.clear();
    this.#count();
    this.arranged();
  }

  /** What is in each square: pages, held, cached, shared, and the slot that holds most. */
  #count() {
    const { share, count } = this.#place;
    this.#squares = Array.from({ length: count }, (_, i) => this.#tally(i * share, share));
    this.#draw();
  }

  #tally(first, share) {
    const pool = this.#pool;
    const end = Math.min(first + share, this.#extent);
    const tally = { pages: end - first, held: 0, cached: 0, shared: 0, slot: 0 };
    let votes = 0;
    for (let page = first; page < end; page += 1) {
      const slot = pool.slotOf(page);
      if (slot === null) {
        tally.cached += pool.owner[page] === CACHED;
        continue;
      }
      tally.held += 1;
      tally.shared += pool.holders[page] > 1;
      if (votes === 0) tally.slot = slot;
      votes += slot === tally.slot ? 1 : -1;
    }
    return tally;
  }

  #box(square) {
    const { columns, size } = this.#place;
    const gap = size >= 10 ? 2 : 1;
    return [(square % columns) * size, Math.floor(square / columns) * size, size - gap];
  }

  #draw() {
    if (!this.#place) return;
    const context = this.base.getContext("2d");
    context.clearRect(0, 0, this.base.width, this.base.height);
    const { free, cached, requests } = this.colours;
    const fade = this.#lit === null ? 1 : 0.22;
    const layers = new Map(); // colour -> path: each colour is filled once
    const add = (colour, square, from, to) => {
      if (to <= from) return;
      if (!layers.has(colour)) layers.set(colour, new Path2D());
      this.#addPart(layers.get(colour), square, from, to);
    };
    const stripes = new Path2D();
    this.#squares.forEach((tally, square) => {
      const held = tally.held / tally.pages;
      const used = held + tally.cached / tally.pages;
      add(requests[tally.slot % COLOURS], square, 0, held);
      add(cached, square, held, used);
      add(free, square, used, 1);
      if (tally.shared) this.#addPart(stripes, square, 0, tally.shared / tally.pages);
    });
    context.globalAlpha = fade;
    for (const [colour, path] of layers) {
      context.fillStyle = colour;
      context.fill(path);
    }
    context.globalAlpha = 1;
    this.#drawLit(context);
    context.fillStyle = this.#stripes(context);
    context.fill(stripes);
  }

  /** A part of a square, from the bottom up, as shares of its height. */
  #addPart(path, square, from, to) {
    const [x, y, side] = this.#box(square);
    const top = y + side * (1 - to);
    const height = Math.max(side * (to - from), 1);
    if (side >= 8 && from === 0 && to === 1) path.roundRect(x, top, side, height, side / 6);
    else path.rect(x, top, side, height);
  }

  #drawLit(context) {
    const request = this.#pool.requests.get(this.#lit);
    if (!request) return;
    const { share, count } = this.#place;
    const pages = new Map(); // square -> pages of the request in it
    for (const [first, n] of request.pages) {
      for (let page = first; page < first + n; page += 1) {
        const square = Math.floor(page / share);
        if (square < count) pages.set(square, (pages.get(square) ?? 0) + 1);
      }
    }
    const path = new Path2D();
    for (const [square, n] of pages) {
      this.#addPart(path, square, 0, Math.min(1, n / this.#squares[square].pages));
    }
    context.fillStyle = this.colours.requests[this.#pool.slots.get(this.#lit) % COLOURS];
    context.fill(path);
  }

  #stripes(context) {
    const tile = document.createElement("canvas");
    const ratio = devicePixelRatio || 1;
    const side = Math.round(6 * ratio);
    tile.width = side;
    tile.height = side;
    const pen = tile.getContext("2d");
    pen.strokeStyle = this.colours.paper;
    pen.lineWidth = 1.8 * ratio;
    for (const shift of [-side, 0, side]) {
      pen.moveTo(shift - 1, side + 1);
      pen.lineTo(shift + side + 1, -1);
    }
    pen.stroke();
    const pattern = context.createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix().scale(1 / ratio));
    return pattern;
  }

  #flash(pages, dark) {
    if (!this.#place || calm.matches || document.hidden || !pages.length) return;
    const since = performance.now();
    for (const page of pages) {
      this.#flashes.set(Math.floor(page / this.#place.share), { since, dark });
    }
    if (!this.#timer) this.#fade();
  }

  #fade() {
    this.#timer = 0;
    if (!this.#place) return;
    const now = performance.now();
    const context = this.overlay.getContext("2d");
    context.clearRect(0, 0, this.overlay.width, this.overlay.height);
    context.fillStyle = this.colours.ink;
    for (const [square, { since, dark }] of this.#flashes) {
      const left = 1 - (now - since) / FLASH_MS;
      if (left <= 0 || square >= this.#squares.length) {
        this.#flashes.delete(square);
        continue;
      }
      const [x, y, side] = this.#box(square);
      context.globalAlpha = dark * left;
      context.fillRect(x, y, side, side);
    }
    context.globalAlpha = 1;
    if (this.#flashes.size) this.#timer = setTimeout(() => this.#fade(), FRAME_MS);
  }
}

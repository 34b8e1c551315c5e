// A snapshot of GET /kv as arrays over pages, and what changed since the one before.

export const FREE = 0;
export const CACHED = 1;
const HELD = 2; // and up: HELD + slot of the first holder

/** Gives every listed request a small number, its slot, that it keeps while it is listed. */
export class Slots {
  #slots = new Map();

  assign(requests) {
    const ids = new Set(requests.map(({ id }) => id));
    for (const id of this.#slots.keys()) if (!ids.has(id)) this.#slots.delete(id);
    const taken = new Set(this.#slots.values());
    let next = 0;
    for (const id of ids) {
      if (this.#slots.has(id)) continue;
      while (taken.has(next)) next += 1;
      taken.add(next);
      this.#slots.set(id, next);
    }
    return this.#slots;
  }
}

export class Pool {
  /** From a snapshot; `slots` from Slots.assign. Ranges outside of the pool are left out. */
  constructor({ pages, cached, requests, kv }, slots) {
    this.total = pages.total;
    this.pageTokens = kv.page_tokens;
    this.owner = new Uint16Array(this.total);
    this.holders = new Uint8Array(this.total); // 2 stands for more, too
    this.requests = new Map(requests.map((request) => [request.id, request]));
    this.slots = new Map(slots);
    for (const [first, count] of cached) this.owner.fill(CACHED, first, first + count);
    for (const { id, pages: ranges } of requests) this.#hold(slots.get(id), ranges);
    /** Pages from here on are free. */
    this.end = this.owner.findLastIndex((owner) => owner !== FREE) + 1;
    this.shared = this.holders.reduce((sum, n) => sum + (n > 1), 0);
  }

  #hold(slot, ranges) {
    for (const [first, count] of ranges) {
      for (let page = first; page < Math.min(first + count, this.total); page += 1) {
        if (this.holders[page] === 0) this.owner[page] = HELD + slot;
        if (this.holders[page] < 2) this.holders[page] += 1;
      }
    }
  }

  /** The slot of the first request that holds a page, or null. */
  slotOf(page) {
    return this.owner[page] >= HELD ? this.owner[page] - HELD : null;
  }

  holdersOf(page) {
    const holds = ({ pages }) => pages.some(([first, n]) => page >= first && page < first + n);
    return [...this.requests.values()].filter(holds).map(({ id }) => id);
  }

  /** Whether both would be drawn alike. */
  looksLike(other) {
    return other?.total === this.total && sameBytes(this.owner, other.owner) &&
      sameBytes(this.holders, other.holders);
  }

  /** Pages that changed hands since `before`. */
  changedSince(before) {
    const pages = [];
    for (let page = 0; page < this.total; page += 1) {
      if (this.owner[page] !== before.owner[page]) pages.push(page);
    }
    return pages;
  }

  /** Pages that tokens were written to since `before`: the last one of each request that grew. */
  writtenSince(before) {
    const pages = [];
    for (const [id, { computed, pages: ranges, recent }] of this.requests) {
      const last = ranges.at(-1);
      const grew = computed > (before.requests.get(id)?.computed ?? Infinity);
      // With a recent part, new tokens go to its pages, which are not in the map.
      if (last && grew && !recent.length) pages.push(last[0] + last[1] - 1);
    }
    return pages;
  }
}

const sameBytes = (a, b) => a.every((value, i) => value === b[i]);

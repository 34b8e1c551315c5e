"""Sequences over shared pages: what is in a page is always what its holders computed.

The state machine plays the scheduler (the protocol in paged.py) and keeps, instead of bytes, the
history of tokens up to each position that was written. Whatever order sequences come, grow,
fork, lose their pages and end in, each position of each holder must have its own history.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from kvant.cache.paged import Holding, PagedCache
from kvant.cache.pages import BlockHash, PageAllocator, page_hash
from kvant.formats.base import PAGE_TOKENS

MAX_SUBMITTED, MAX_ALIVE = 4, 7

Content = list[int | None]  # for each slot the history that was written there


class Histories:
    """A number for every sequence of tokens, equal if and only if the tokens are."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}

    def of(self, tokens: list[int]) -> list[int]:
        """The histories that end at each position of ``tokens``."""
        out, last = [], 0
        for token in tokens:
            last = self._known.setdefault((last, token), len(self._known) + 1)
            out.append(last)
        return out


@dataclass(eq=False)
class Sequence:
    """What the scheduler knows of a sequence."""

    tokens: list[int]
    holding: Holding = field(default_factory=Holding)
    computed: int = 0


class Simulation:
    """A :class:`PagedCache` with histories in the place of bytes."""

    def __init__(
        self, num_pages: int, num_recent: int, *, sink: bool = False, prefix_caching: bool
    ) -> None:
        self.cache = PagedCache(num_pages, num_recent, sink=sink, prefix_caching=prefix_caching)
        self.base: list[Content] = [[None] * PAGE_TOKENS for _ in range(num_pages)]
        self.recent: list[Content] = [[None] * PAGE_TOKENS for _ in range(num_recent)]
        self.histories = Histories()
        self.alive: list[Sequence] = []
        self.full_pages: dict[BlockHash, list[int]] = {}  # all that was ever computed

    def submit(self, tokens: list[int]) -> Sequence:
        """Start a sequence with what the cache has of it."""
        seq = Sequence(tokens)
        seq.computed = self.cache.adopt_prefix(seq.holding, tokens, len(tokens) - 1)
        self.alive.append(seq)
        return seq

    def step(self, sequences: list[Sequence], count: int) -> None:
        """Compute up to ``count`` more tokens of each sequence whose pages suffice: all
        reservations first, then all copies, then all writes."""
        parts, copies = [], []
        for seq in sequences:
            start, target = seq.computed, len(seq.tokens)
            end = self.cache.chunk_end(start, min(start + count, target), target)
            assert start < end <= min(start + count, target)
            before = self._state(seq)
            made = self.cache.reserve(seq.holding, start, end)
            if made is None:
                assert self._state(seq) == before, "a refusal changed something"
            else:
                copies += made
                parts.append((seq, start, end))
        for recent, source, target in copies:
            pool = self.recent if recent else self.base
            pool[target] = list(pool[source])
        for seq, start, end in parts:
            self._write(seq, start, end)
        for seq, _, end in parts:
            seq.computed = end
            self.cache.commit(seq.holding, seq.tokens, end)
            self._remember_full_pages(seq)

    def _state(self, seq: Sequence) -> object:
        return copy.deepcopy((seq.holding, vars(self.cache.base), vars(self.cache.recent)))

    def finish(self, seq: Sequence) -> None:
        """End a sequence."""
        self.alive.remove(seq)
        self.cache.release(seq.holding)

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's pages away and start it again with what can still be found."""
        self.cache.release(seq.holding)
        seq.computed = self.cache.adopt_prefix(seq.holding, seq.tokens, len(seq.tokens) - 1)

    def fork(self, parent: Sequence, end: int, tail: list[int]) -> Sequence:
        """A sequence with the first ``end`` computed tokens of ``parent``, then ``tail``."""
        child = Sequence(parent.tokens[:end] + tail)
        child.computed = self.cache.adopt_fork(child.holding, parent.holding, parent.computed, end)
        self.alive.append(child)
        return child

    def _write(self, seq: Sequence, start: int, end: int) -> None:
        """Write histories where a backend writes vectors (kernels/reference.py)."""
        history = self.histories.of(seq.tokens[:end])
        groups = range(start // PAGE_TOKENS, -(-end // PAGE_TOKENS))
        for group in groups:
            first, last = group * PAGE_TOKENS, (group + 1) * PAGE_TOKENS
            new = range(max(first, start), min(last, end))
            if not self._is_recent_while_open(group):
                self._put(seq.holding, group, history, new)
                continue
            page: Content = [None] * PAGE_TOKENS  # scratch, for a group that this step fills
            if start > first or end < last:
                assert seq.holding.recent is not None
                assert not self.cache.recent.is_shared(seq.holding.recent)
                page = self.recent[seq.holding.recent]
            for position in new:
                page[position - first] = history[position]
            if end >= last:  # the group is full: its base page is encoded from the fine page
                assert page == history[first:last], "the fine page lost the group's beginning"
                self._put(seq.holding, group, history, range(first, last))

    def _is_recent_while_open(self, group: int) -> bool:
        return self.cache.has_recent and not (self.cache.sink and group == 0)

    def _pool(self, group: int) -> tuple[PageAllocator, list[Content]]:
        """Where the page of a group in ``Holding.pages`` is."""
        if self.cache.sink and group == 0:
            return self.cache.recent, self.recent
        return self.cache.base, self.base

    def _put(self, holding: Holding, group: int, history: list[int], positions: range) -> None:
        allocator, contents = self._pool(group)
        page = holding.pages[group]
        assert not allocator.is_shared(page), "somebody else holds this page"
        for position in positions:
            contents[page][position % PAGE_TOKENS] = history[position]

    def _remember_full_pages(self, seq: Sequence) -> None:
        history, digest = self.histories.of(seq.tokens), None
        for first in range(0, seq.computed - PAGE_TOKENS + 1, PAGE_TOKENS):
            digest = page_hash(digest, seq.tokens[first : first + PAGE_TOKENS])
            self.full_pages[digest] = history[first : first + PAGE_TOKENS]

    def check(self) -> None:
        """Every position of every sequence is where it belongs and has its own history; every
        hash leads to the content that it stands for."""
        self.cache.check(seq.holding for seq in self.alive)
        for seq in self.alive:
            history = self.histories.of(seq.tokens[: seq.computed])
            group, open_tokens = divmod(seq.computed, PAGE_TOKENS)
            if not self._is_recent_while_open(group):
                open_tokens = 0
            pages = [self._pool(group)[1][page] for group, page in enumerate(seq.holding.pages)]
            assert len(pages) == -(-(seq.computed - open_tokens) // PAGE_TOKENS)
            stored = [slot for page in pages for slot in page][: seq.computed - open_tokens]
            assert (seq.holding.recent is not None) == (open_tokens > 0)
            if seq.holding.recent is not None:
                stored += self.recent[seq.holding.recent][:open_tokens]
            assert stored == history, "a page was overwritten or found for other tokens"
        for digest, content in self.full_pages.items():
            for allocator, contents in self._pool(0), self._pool(1):
                page = allocator.find(digest)
                assert page is None or contents[page] == content, "a hash leads to other content"


def _tokens(letters: str, length: int) -> list[int]:
    """One letter per group of 64, so that prefixes coincide often."""
    return [ord(letters[n // PAGE_TOKENS % len(letters)]) for n in range(length)]


PROMPTS = st.lists(
    st.tuples(
        st.text("ab", min_size=1, max_size=4),
        st.sampled_from((1, 63, 64, 65, 128, 129)) | st.integers(1, 330),
    ),
    min_size=1,
    max_size=3,
)


class PagedCacheMachine(RuleBasedStateMachine):
    """Random schedules over a small pool."""

    num_recent_pages: tuple[int, ...] = (0,)
    sink = False

    @initialize(data=st.data(), pages=st.integers(4, 24), caching=st.booleans(), prompts=PROMPTS)
    def start(
        self, data: st.DataObject, pages: int, caching: bool, prompts: list[tuple[str, int]]
    ) -> None:
        num_recent = data.draw(st.sampled_from(self.num_recent_pages))
        self.sim = Simulation(pages, num_recent, sink=self.sink, prefix_caching=caching)
        self.submit(prompts)

    def _any(self, data: st.DataObject, of: list[Sequence]) -> Sequence | None:
        return of[data.draw(st.integers(0, len(of) - 1))] if of else None

    @rule(prompts=PROMPTS)
    def submit(self, prompts: list[tuple[str, int]]) -> None:
        for letters, length in prompts[: max(MAX_SUBMITTED - len(self.sim.alive), 0)]:
            seq = self.sim.submit(_tokens(letters, length))
            assert seq.computed < length, "no token is left to compute logits from"

    @rule(data=st.data(), count=st.sampled_from((1, 17, 64, 100, 512)))
    def step(self, data: st.DataObject, count: int) -> None:
        batch = [seq for seq in self.sim.alive if data.draw(st.booleans())]
        for seq in batch:
            if seq.computed == len(seq.tokens):  # a token was sampled
                seq.tokens.append(ord(data.draw(st.sampled_from("ab"))))
        self.sim.step(batch, count)

    @rule(count=st.sampled_from((64, 100, 512)))
    def step_all(self, count: int) -> None:
        self.sim.step([seq for seq in self.sim.alive if seq.computed < len(seq.tokens)], count)

    @rule(
        data=st.data(),
        tail=st.sampled_from(("a", "b", "c" * 70)),
        at_end=st.booleans(),
        parent_ends=st.booleans(),
    )
    def fork(self, data: st.DataObject, tail: str, at_end: bool, parent_ends: bool) -> None:
        parent = self._any(data, [seq for seq in self.sim.alive if seq.computed])
        if parent and len(self.sim.alive) < MAX_ALIVE:
            end = parent.computed if at_end else data.draw(st.integers(1, parent.computed))
            child = self.sim.fork(parent, end, [ord(letter) for letter in tail])
            assert end - PAGE_TOKENS < child.computed <= end
            if parent_ends:
                self.sim.finish(parent)

    @rule(data=st.data(), restart=st.booleans())
    def drop(self, data: st.DataObject, restart: bool) -> None:
        if seq := self._any(data, self.sim.alive):
            self.sim.preempt(seq) if restart else self.sim.finish(seq)

    @rule()
    def clear(self) -> None:
        self.sim.cache.base.clear_cached()
        self.sim.cache.recent.clear_cached()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "sim"):
            self.sim.check()

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            for seq in list(self.sim.alive):
                self.sim.finish(seq)
            self.sim.check()
            assert self.sim.cache.base.num_held == self.sim.cache.recent.num_held == 0


class RecentPartMachine(PagedCacheMachine):
    """The same with a recent part, down to a single recent page."""

    num_recent_pages = (1, 4, 8)


class SinkMachine(PagedCacheMachine):
    """The same with a sink, down to the two recent pages of a single sequence."""

    num_recent_pages = (2, 5, 12)
    sink = True


for _machine in (PagedCacheMachine, RecentPartMachine, SinkMachine):
    _machine.TestCase.settings = settings(
        max_examples=150,
        stateful_step_count=40,
        phases=[phase for phase in Phase if phase is not Phase.explain],
    )
TestPlain = PagedCacheMachine.TestCase
TestRecentPart = RecentPartMachine.TestCase
TestSink = SinkMachine.TestCase


def _computed(sim: Simulation, tokens: list[int]) -> Sequence:
    """A sequence with all of ``tokens`` computed."""
    seq = sim.submit(tokens)
    while seq.computed < len(tokens):
        sim.step([seq], 512)
        sim.check()
    return seq


@pytest.mark.parametrize(("num_recent", "sink"), ((0, False), (4, False), (2, True)))
def test_a_hit_is_the_longest_run_of_full_pages_that_leaves_a_token(
    num_recent: int, sink: bool
) -> None:
    """Held down: a prompt found as a whole, with no position left whose logits are wanted."""
    sim = Simulation(8, num_recent, sink=sink, prefix_caching=True)
    writer = _computed(sim, _tokens("abc", 192))
    for tokens, hit in (
        (_tokens("abc", 193), 192),
        (_tokens("abc", 192), 128),
        (_tokens("abd", 192), 128),
        (_tokens("aab", 192), 64),
        (_tokens("bbc", 192), 0),
        (_tokens("a", 64), 0),
    ):
        seq = sim.submit(tokens)
        assert seq.computed == hit
        assert seq.holding.pages == writer.holding.pages[: hit // PAGE_TOKENS]
        sim.finish(seq)


def test_without_prefix_caching_nothing_is_found_or_kept() -> None:
    sim = Simulation(3, 0, prefix_caching=False)
    sim.finish(_computed(sim, _tokens("a", 129)))
    assert sim.submit(_tokens("a", 129)).computed == 0
    assert sim.cache.base.num_cached == 0


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    """A chain of hashes is worth nothing without its first pages."""
    sim = Simulation(4, 0, prefix_caching=True)
    sim.finish(_computed(sim, _tokens("abcd", 256)))
    _computed(sim, _tokens("x", 100))  # takes two pages
    assert sim.submit(_tokens("abcd", 256)).computed == 128


def test_an_evicted_sink_is_a_miss() -> None:
    """The rest of its prefix is still in the base pool, and of no use."""
    sim = Simulation(8, 2, sink=True, prefix_caching=True)
    sim.finish(_computed(sim, _tokens("abc", 192)))
    again = sim.submit(_tokens("abc", 193))
    assert again.computed == 192
    sim.finish(again)
    sim.finish(_computed(sim, _tokens("x", 100)))  # takes both recent pages
    assert sim.cache.base.num_cached == 2
    again = sim.submit(_tokens("abc", 193))
    assert again.computed == 0
    sim.finish(again)
    _computed(sim, _tokens("abc", 193))


def test_a_sequence_lacks_the_base_pages_that_it_then_takes() -> None:
    """Without a sink page 0 is one of them, open or full; with a sink it never is."""
    for num_recent, sink, taken in ((0, False, 4), (2, False, 3), (2, True, 2)):
        sim = Simulation(8, num_recent, sink=sink, prefix_caching=False)
        seq = sim.submit(_tokens("a", 200))
        for count in (0, 30, 34, 70, 66):
            missing = sim.cache.missing_base_pages(seq.holding, 200)
            assert missing + sim.cache.base.num_held == taken
            while count > 0:
                before = seq.computed
                sim.step([seq], count)
                count -= seq.computed - before
        assert sim.cache.missing_base_pages(seq.holding, 200) == 0


@pytest.mark.parametrize(
    ("num_recent", "sink", "length"),
    ((0, False, 100), (4, False, 100), (4, True, 100), (4, True, 30)),
)
def test_an_open_page_is_copied_for_all_writers_but_the_last(
    num_recent: int, sink: bool, length: int
) -> None:
    """Copy-on-write: two forks and their parent go on apart with two copies, not three."""
    sim = Simulation(8, num_recent, sink=sink, prefix_caching=False)
    parent = _computed(sim, _tokens("a", length))
    family = [parent, *(sim.fork(parent, length, [n]) for n in (1, 2))]
    parent.tokens.append(3)
    allocator = sim.cache.recent if num_recent else sim.cache.base
    before = allocator.num_held
    sim.step(family, 1)
    assert allocator.num_held == before + 2
    sim.check()


@pytest.mark.parametrize(("num_recent", "sink", "end"), ((0, False, 100), (2, True, 30)))
def test_a_page_that_can_be_found_is_copied_before_a_fork_writes_into_it(
    num_recent: int, sink: bool, end: int
) -> None:
    """A fork inside a full page, whose other holder ends before the fork's first step, is its
    only holder; but the page is still found by the hash of what the parent wrote."""
    sim = Simulation(8, num_recent, sink=sink, prefix_caching=True)
    parent = _computed(sim, _tokens("a", 128))
    child = sim.fork(parent, end, _tokens("b", 28))
    assert child.computed == end
    sim.finish(parent)
    sim.step([child], 512)
    assert child.computed == end + 28
    sim.check()
    assert sim.submit(_tokens("a", 128)).computed == 64


@pytest.mark.parametrize("has_recent", (False, True))
@given(start=st.integers(0, 300), rows=st.integers(1, 600), rest=st.integers(0, 300))
def test_a_chunk_makes_progress_and_touches_one_open_group(
    has_recent: bool, start: int, rows: int, rest: int
) -> None:
    """With a recent part there is one recent page for each sequence, so a chunk that starts in
    a group ends in it, and one that ends in a group has nothing left or started in it."""
    cache = PagedCache(1, int(has_recent), sink=False, prefix_caching=False)
    end, target = start + rows, start + rows + rest
    chosen = cache.chunk_end(start, end, target)
    assert start < chosen <= end
    if not has_recent:
        assert chosen == end
        return
    same_group = start // PAGE_TOKENS == (chosen - 1) // PAGE_TOKENS
    if start % PAGE_TOKENS:
        assert same_group
    if chosen % PAGE_TOKENS and chosen < target:
        assert same_group


@pytest.mark.parametrize(
    ("num_pages", "num_recent", "sink"),
    ((2, 0, False), (2, 1, False), (9, 1, False), (9, 2, True), (0, 9, True)),
)
def test_running_out_of_pages_changes_nothing_and_heals(
    num_pages: int, num_recent: int, sink: bool
) -> None:
    sim = Simulation(num_pages, num_recent, sink=sink, prefix_caching=True)
    first = _computed(sim, _tokens("a", 100))
    second = sim.submit(_tokens("b", 150))
    sim.step([second], 512)
    sim.step([second], 512)
    assert second.computed < 150
    sim.check()
    sim.finish(first)
    sim.preempt(second)
    sim.check()
    third = _computed(sim, _tokens("b", 100))
    assert third.computed == 100

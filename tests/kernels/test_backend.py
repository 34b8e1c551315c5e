"""Every backend against the oracle: what it writes, what it reads, and what it must not see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvant import kernels
from kvant.errors import ConfigError
from kvant.formats import FORMATS, PAGE_TOKENS, PRESETS, KVShape, KVSpec
from kvant.formats.pages import open_pages
from kvant.kernels import BACKENDS, KVMemory, make_backend
from tests.kernels.attention_oracle import LayerFormats, stored
from tests.kernels.driver import Driver, Sequence, assert_accurate

PAIR = "k=int8h,v=int4h"
BY_LAYER = "k4v4;0,-1=int8h"

SPECS = (
    *(name for name, fmt in FORMATS.items() if not fmt.by_page),
    *PRESETS,
    PAIR,
    BY_LAYER,
    "k=int4h,v=f16",
    "int4h+r64",
    "int4h+r64:bf16",
    "int4h+s64r64",
    "k=int8,v=int4+r64:f32",
    "k=int4,v=int3c+r64:k=int8h,v=f16",
    "int5c+s64r64:bf16;1=k=f32,v=int2m",
)
FEW_SPECS = ("f32", "int8", PAIR, "int4h+r64", "k4v4")

# Every format once for keys and once for values.
_ALL = [*FORMATS.values()]
EACH_FORMAT = tuple(
    f"k={k},v={v}" + ("+s64r64:f16" if k.by_page or v.by_page else "")
    for k, v in zip(_ALL, _ALL[3:] + _ALL[:3], strict=True)
)

# Lengths around page borders; with MIXED chunks their prompts and decodes share batches.
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 193)
MIXED = (1, 17, 1, 200, 1, 64)

Floats = tuple[float, ...]
SINKS = (-1e4, 0.5, 8.0, 1e4)


def _layers(kv: str, least: int = 2) -> int:
    """As many that a spec which names some has others too."""
    return 3 if ";" in kv else least


@pytest.mark.parametrize("kv", SPECS)
def test_a_batch_of_prompts_and_decodes_over_shuffled_pages(backend: str, kv: str) -> None:
    """Sequences of all lengths in one batch, each with its own chunks and its own pages."""
    driver = Driver(backend, kv, layers=_layers(kv))
    sequences = [driver.add(length) for length in LENGTHS]
    driver.run(*sequences, chunks=MIXED)
    assert_accurate(driver, *sequences)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kv", FEW_SPECS)
def test_a_prompt_in_one_step(backend: str, kv: str, length: int) -> None:
    """No chunk before, no page shared: lengths on both sides of a page border."""
    driver = Driver(backend, kv)
    seq = driver.add(length)
    driver.run(seq)
    assert_accurate(driver, seq)


@pytest.mark.parametrize("share", (1, 2, 3, 4, 16))
@pytest.mark.parametrize("kv", FEW_SPECS)
def test_query_heads_that_share_keys(backend: str, kv: str, share: int) -> None:
    """Held down: heads assigned to keys by remainder instead of by quotient; ratios that are
    no power of two."""
    driver = Driver(backend, kv, heads=2 * share)
    sequences = [driver.add(length) for length in (5, 70)]
    driver.run(*sequences, chunks=(66, 1))
    assert_accurate(driver, *sequences)


@pytest.mark.parametrize("head_dim", (8, 64, 80, 96, 112, 128, 192, 256))
@pytest.mark.parametrize("kv", EACH_FORMAT)
def test_head_dims(backend: str, kv: str, head_dim: int) -> None:
    """Two full groups, so that a coarse page is seen behind a sink."""
    driver = Driver(backend, kv, head_dim=head_dim)
    seq = driver.add(135)
    driver.run(seq, chunks=(130, 1))
    assert_accurate(driver, seq)


@pytest.mark.parametrize("window", (1, 5, 63, 64, 65, 100, 1000))
@pytest.mark.parametrize("kv", FEW_SPECS)
def test_a_window_ends_before_its_length(backend: str, kv: str, window: int) -> None:
    """A query at t sees (t - window, t]. Held down: windows one too long, whole pages dropped
    when their last tokens are still seen, and softmax over a page that is not seen at all."""
    driver = Driver(backend, kv, window=window)
    sequences = [driver.add(length) for length in (64, 193)]
    driver.run(*sequences, chunks=MIXED)
    assert_accurate(driver, *sequences)


@pytest.mark.parametrize(
    ("softcap", "sinks", "window"),
    (
        (1.0, None, None),
        (30.0, None, 50),
        (None, SINKS, None),
        (None, SINKS, 50),
        (30.0, SINKS, 70),
    ),
)
@pytest.mark.parametrize("kv", FEW_SPECS)
def test_softcap_and_sinks(
    backend: str, kv: str, softcap: float | None, sinks: Floats | None, window: int | None
) -> None:
    """Scores are as far apart as the usual cap of 30 can be seen to bend. A sink may be all that
    counts, or nothing. Held down: a cap before the scale or on what a query does not see, sinks
    that are capped too, in the order of KV heads, or added in every page."""
    driver = Driver(backend, kv, softcap=softcap, sinks=sinks, window=window)
    sequences = [driver.add(length) for length in (1, 66, 193)]
    for seq in sequences:
        seq.q *= 5
    driver.run(*sequences, chunks=MIXED)
    assert_accurate(driver, *sequences)


@pytest.mark.parametrize("kv", ("f32", "int8h", "int4h+r64", "k4v4"))
def test_scores_far_apart_neither_overflow_nor_vanish(backend: str, kv: str) -> None:
    """Softmax subtracts the maximum: scores of thousands, of both signs."""
    driver = Driver(backend, kv)
    seq = driver.add(129)
    seq.q *= 1000
    driver.run(seq, chunks=(100, 1))
    assert_accurate(driver, seq)


@pytest.mark.parametrize(
    ("kv", "options"),
    (
        *((kv, {}) for kv in (*FEW_SPECS, "bf16", "int4h", "int4m+s64r64", "k8v8", BY_LAYER)),
        *((kv, {"head_dim": 80, "window": 70}) for kv in (*FEW_SPECS, "int8+r64:f32")),
        *((kv, {"softcap": 5.0, "sinks": (*SINKS, 0.0, 0.0)}) for kv in ("int8+r64:bf16", "k4v4")),
    ),
)
def test_chunks_and_company_leave_no_trace(backend: str, kv: str, options: dict[str, Any]) -> None:
    """Pages and outputs are equal bit by bit whatever was computed in which step and with whom:
    positions alone decide the order of every sum. Held down: prompts whose recent tokens are
    seen in another precision than they would be in a decode, temperature 0 that answers
    differently under load, and prefix hits that change a token."""

    def start() -> Driver:
        return Driver(backend, kv, layers=_layers(kv), heads=6, **options)

    alone = start()
    seq = alone.add(150)
    alone.run(seq)
    assert_accurate(alone, seq)
    for chunks in ((17,), (64, 1, 3)):
        driver = start()
        again = driver.replay(seq)
        driver.run(again, *[driver.add(length) for length in (3, 129)], chunks=chunks)
        np.testing.assert_array_equal(again.out, seq.out)
        np.testing.assert_array_equal(driver.base_bytes(again), alone.base_bytes(seq))
        np.testing.assert_array_equal(driver.recent_vectors(again), alone.recent_vectors(seq))
    hit = driver.replay(seq)
    assert hit.computed == 128
    driver.run(hit, chunks=(1,))
    np.testing.assert_array_equal(hit.out[:, 128:], seq.out[:, 128:])


@pytest.mark.parametrize("kv", SPECS)
def test_pages_are_the_formats_own_bytes(backend: str, kv: str) -> None:
    """Head pages of K then V, layer by layer, in the byte map that :class:`PartView` defines,
    so that pages move between backends: two full groups and an open one. A full group is encoded
    from what its fine page kept. Unwritten slots keep what they had."""
    length = 2 * PAGE_TOKENS + 36
    driver = Driver(backend, kv, layers=_layers(kv))
    seq = driver.add(length)
    driver.run(seq, chunks=(70, 1))
    spec, shape = driver.spec, driver.shape
    formats = LayerFormats.of(spec, shape)
    kept = [_kept(at, k, v) for at, k, v in zip(formats, seq.k, seq.v, strict=True)]
    found = driver.base_bytes(seq)
    assert len(found) == 2 - spec.sink + (spec.recent is None)
    for group, stored_page in enumerate(found, start=spec.sink):
        rows = slice(group * PAGE_TOKENS, min((group + 1) * PAGE_TOKENS, length))
        page = np.full((1, spec.page_bytes(shape)), 0xFF, np.uint8)
        for opened, (k, v) in zip(open_pages(spec, shape, page), kept, strict=True):
            if spec.recent is None:
                slots = np.arange(rows.stop - rows.start)
                opened.write(np.zeros_like(slots), slots, k[rows], v[rows])
            else:
                opened.fill(np.array([0]), k[None, rows], v[None, rows])
        np.testing.assert_array_equal(stored_page, page[0])
    if spec.recent is not None:
        in_fine = np.arange(length) // PAGE_TOKENS == length // PAGE_TOKENS
        in_fine[: PAGE_TOKENS * spec.sink] = True
        expected = []
        for at, *vectors in zip(formats, seq.k, seq.v, strict=True):
            assert at.fine is not None
            pairs = zip(at.fine, vectors, strict=True)
            expected.append([stored(fine, x)[in_fine] for fine, x in pairs])
        np.testing.assert_array_equal(driver.recent_vectors(seq), np.array(expected).swapaxes(0, 1))


def _kept(at: LayerFormats, k: NDArray[Any], v: NDArray[Any]) -> list[NDArray[Any]]:
    """What a full group of keys and values ``[N, Hkv, D]`` is encoded from."""
    if at.fine is None:
        return [k, v]
    return [fine.unrotate(stored(fine, x)) for fine, x in zip(at.fine, (k, v), strict=True)]


@pytest.mark.parametrize("kv", FEW_SPECS)
def test_a_shared_prefix_is_as_good_as_a_computed_one(backend: str, kv: str) -> None:
    """A prefix hit gives the bytes and outputs of a cold start."""
    driver = Driver(backend, kv)
    first = driver.add(200)
    driver.run(first)
    second = driver.add(170, first, 140)
    assert second.computed == 128
    third = driver.add(150)
    driver.run(second, third, chunks=(30, 1))
    assert_accurate(driver, first, second, third)
    cold = Driver(backend, kv)
    again = cold.replay(second)
    cold.run(again)
    np.testing.assert_array_equal(driver.base_bytes(second), cold.base_bytes(again))
    np.testing.assert_array_equal(driver.recent_vectors(second), cold.recent_vectors(again))


@pytest.mark.parametrize("computed", (64, 100))
@pytest.mark.parametrize("kv", FEW_SPECS)
def test_forks_go_on_apart(backend: str, kv: str, computed: int) -> None:
    """Several continuations of one prompt share its pages, the open one until it is written."""
    driver = Driver(backend, kv)
    parent = driver.add(140)
    driver.step([(parent, 64)])
    if computed > 64:
        driver.step([(parent, computed - 64)])
    children = [driver.fork(parent, length) for length in (120, 150)]
    driver.run(parent, *children, chunks=(1, 40))
    assert_accurate(driver, parent, *children)


@pytest.mark.parametrize("kv", SPECS)
def test_what_nobody_wrote_is_never_seen(backend: str, kv: str) -> None:
    """Other pages and slots hold NaNs (0xFF in any format), large or plausible numbers: not a
    bit of an output changes. Held down: 0 * NaN from the unused end of a page, reads of stale
    pages behind a mask."""
    outputs = []
    for poison in (0xFF, 0x3C, 0x7E):
        driver = Driver(backend, kv, poison=poison, layers=_layers(kv, 1))
        sequences = [driver.add(length) for length in (1, 65, 150)]
        driver.run(*sequences, chunks=MIXED)
        outputs.append(np.concatenate([seq.out for seq in sequences], axis=1))
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize("side", ("k", "v"))
@pytest.mark.parametrize(("window", "poison"), ((None, np.nan), (50, np.nan), (50, np.inf)))
@pytest.mark.parametrize(
    ("kv", "token"),
    (
        *((kv, 70) for kv in ("f32", "f16", "int8", "int4h", "int4h+r64", "k8v8", "k3v3")),
        *((kv, 10) for kv in ("int4h+s64r64", "k8v8", "k3v3", "int4c+r64")),
    ),
)
def test_a_broken_token_reaches_only_those_who_see_it(
    backend: str, kv: str, token: int, poison: float, window: int | None, side: str
) -> None:
    """One element of one KV head of a token is broken. Queries before it, behind the window or
    of other heads are as good as ever; with a NaN all others are NaN, which is loud.

    A format by page shares a channel's scale between 64 tokens: the whole page is NaN for those
    who see any of it in that form. It is never the own group of a query, nor a sink."""
    driver = Driver(backend, kv, window=window)
    seq, other = driver.add(193), driver.add(80)
    clean = Sequence(seq.tokens, seq.q, seq.k.copy(), seq.v.copy(), seq.out)
    getattr(seq, side)[0, token, 1, 5] = poison
    driver.run(seq, other, chunks=(120, 1, 64))
    assert_accurate(driver, other)
    sees = np.zeros((1, 193, driver.heads), bool)
    reach = 193 if window is None else window
    sees[:, token : token + reach, 2:] = True
    end = (token // PAGE_TOKENS + 1) * PAGE_TOKENS
    if getattr(driver.spec, side).by_page and not (driver.spec.sink and token < PAGE_TOKENS):
        sees[:, end : end - 1 + reach, 2:] = True
    assert_accurate(driver, clean, but=sees)  # shares its outputs with the broken sequence
    if np.isnan(poison):
        assert np.isnan(seq.out[sees]).any(axis=-1).all()


@pytest.mark.parametrize("side", ("q", "k"))
@pytest.mark.parametrize("kv", FEW_SPECS)
def test_a_broken_score_is_loud_under_a_soft_cap(backend: str, kv: str, side: str) -> None:
    """Held down: a minimum that takes NaN for the cap."""
    driver = Driver(backend, kv, softcap=30.0)
    seq = driver.add(80)
    getattr(seq, side)[0, 70, 1, 5] = np.nan
    driver.run(seq)
    heads = slice(1, 2) if side == "q" else slice(2, 4)
    last = seq.out[0, 70 if side == "q" else slice(70, 80), heads]
    assert np.isnan(last).any(axis=-1).all()


@pytest.mark.parametrize("seed", range(10))
def test_anything(backend: str, seed: int) -> None:
    """All at once, drawn by lot: formats, sizes, options, prefixes, forks and chunks."""
    rng = np.random.default_rng(seed)

    def pick(options: Any) -> Any:
        return options[rng.integers(len(options))]

    def length() -> int:
        return PAGE_TOKENS * int(rng.integers(1, 4)) + int(rng.integers(-1, 2))

    kv, kv_heads = pick(SPECS), pick((1, 2, 3))
    heads = kv_heads * int(rng.integers(1, 17))
    driver = Driver(
        backend,
        kv,
        layers=_layers(kv, 1),
        head_dim=pick((64, 80, 96, 112, 128, 192, 256)),
        kv_heads=kv_heads,
        heads=heads,
        window=pick((None, None, length(), int(rng.integers(1, 64)))),
        softcap=pick((None, None, 5.0)),
        sinks=pick((None, rng.standard_normal(heads))),
    )
    parent = driver.add(length())
    driver.step([(parent, int(rng.integers(1, 130)))])
    child = driver.fork(parent, parent.computed + int(rng.integers(1, 66)))
    stranger = driver.add(length())
    driver.run(parent, child, stranger, chunks=rng.integers(1, 100, 3).tolist())
    shared = int(rng.integers(1, min(len(parent.tokens), 150)))
    heir = driver.add(shared + int(rng.integers(1, 66)), parent, shared)
    driver.run(heir, driver.add(length()), chunks=pick(((1,), (17, 64), (200,))))
    assert_accurate(driver, parent, child, stranger, heir)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_torch_tensors_come_back_as_they_came(backend: str, dtype: str) -> None:
    import torch

    driver = Driver(backend, "int8")
    seq = driver.add(70)
    batch = driver.begin([(seq, 70)]).batch
    q, k, v = (torch.from_numpy(x[0]).to(getattr(torch, dtype)) for x in (seq.q, seq.k, seq.v))
    driver.backend.write(0, k, v, batch)
    out = driver.backend.attend(0, q, batch, scale=0.125)
    assert isinstance(out, torch.Tensor)
    assert (out.dtype, out.shape) == (q.dtype, q.shape)
    driver.backend.write(0, k.float().numpy(), v.float().numpy(), batch)
    same = driver.backend.attend(0, q.float().numpy(), batch, scale=0.125)
    torch.testing.assert_close(out, torch.from_numpy(same).to(q.dtype), rtol=0, atol=0)


def _memory() -> KVMemory:
    shape = KVShape(num_layers=2, num_kv_heads=2, head_dim=64)
    return KVMemory.allocate(KVSpec.parse("int8"), shape, 4, 0, 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_are_made_by_name(name: str) -> None:
    assert make_backend(name, _memory()).name == name


def test_auto_is_the_fastest_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, name in ((False, "cpu"), (True, "triton")):
        monkeypatch.setattr(kernels, "_has_gpu", lambda found=gpu: found)
        assert make_backend("auto", _memory()).name == name


@pytest.mark.parametrize(("wrong", "nearest"), (("refrence", "reference"), ("nul", "null")))
def test_an_unknown_backend_is_answered_with_the_nearest(wrong: str, nearest: str) -> None:
    """Held down: a misspelt or missing backend that silently becomes a slow one."""
    with pytest.raises(ConfigError, match=f'"{wrong}".*did you mean "{nearest}"'):
        make_backend(wrong, _memory())


def test_null_has_the_right_shapes() -> None:
    driver = Driver("null", "int8")
    seq = driver.add(100)
    before = driver.memory.base.pages.copy()
    driver.run(seq, chunks=(70, 1))
    np.testing.assert_array_equal(seq.out, seq.q)
    np.testing.assert_array_equal(driver.memory.base.pages, before)


def test_memory_for_vectors_that_do_not_fit_is_refused() -> None:
    shape = KVShape(num_layers=1, num_kv_heads=1, head_dim=60)
    with pytest.raises(ConfigError, match="60"):
        KVMemory.allocate(KVSpec.parse("int8"), shape, 1, 0, 0)


def test_memory_for_layers_that_do_not_exist_is_refused() -> None:
    shape = KVShape(num_layers=2, num_kv_heads=1, head_dim=64)
    with pytest.raises(ConfigError, match="layer 2"):
        KVMemory.allocate(KVSpec.parse("k4v4;2=int8h"), shape, 1, 2, 64)


@pytest.mark.parametrize("kv", (*FEW_SPECS, BY_LAYER, "int4h+r64;1=f32"))
def test_memory_is_that_of_the_spec(kv: str) -> None:
    """Scratch pages have room for the largest layer."""
    spec, shape = KVSpec.parse(kv), KVShape(num_layers=3, num_kv_heads=2, head_dim=64)
    memory = KVMemory.allocate(spec, shape, 5, 4, 6 * 64 + 63)
    assert memory.base.nbytes == 5 * spec.page_bytes(shape)
    assert memory.recent.nbytes == 4 * spec.fine.page_bytes(shape)
    largest = max(at.k.part_bytes(64) + at.v.part_bytes(64) for at in spec.fine.layout(shape))
    assert memory.scratch.nbytes == 6 * 2 * largest

"""One spelling of a KV cache everywhere: parse and str are inverse, mistakes are named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvant.cache.paged import Holding, PagedCache
from kvant.errors import ConfigError
from kvant.formats import FORMATS, PAGE_TOKENS, PRESETS, KVFormat, KVShape, KVSpec, resolve_spec
from kvant.kernels import KVMemory

NAMES = list(FORMATS)
BY_TOKEN = [name for name in NAMES if not FORMATS[name].by_page]
DEFAULT_RECENT = FORMATS["f16"], FORMATS["int8h"]

names = st.sampled_from(NAMES)
Layer = tuple[int, KVFormat, KVFormat]


def is_valid(
    k: KVFormat,
    v: KVFormat,
    recent: tuple[KVFormat, KVFormat] | None,
    sink: bool,
    layers: tuple[Layer, ...],
) -> bool:
    """Pages need a recent group. It is kept token by token, has more bits than some format or
    holds what is encoded by page, and no fewer than what is made of it so."""
    every = [(k, v), *(layer[1:] for layer in layers)]
    if recent is None:
        return not sink and not any(fmt.by_page for pair in every for fmt in pair)
    sides = [side for pair in every for side in zip(pair, recent, strict=True)]
    token_by_token = not any(fmt.by_page for fmt in recent)
    useful = any(fmt.by_page or fine.bits > fmt.bits for fmt, fine in sides)
    precise = all(fine.bits >= fmt.bits for fmt, fine in sides if fmt.by_page)
    return token_by_token and useful and precise


def _formats(*, by_page: bool) -> st.SearchStrategy[KVFormat]:
    return st.sampled_from([FORMATS[name] for name in (NAMES if by_page else BY_TOKEN)])


@st.composite
def valid_specs(draw: st.DrawFn, num_layers: int = 4) -> KVSpec:
    recent = draw(st.none() | st.tuples(_formats(by_page=False), _formats(by_page=False)))
    each = _formats(by_page=recent is not None)
    numbers = st.integers(-num_layers, num_layers - 1)
    layers = tuple(draw(st.lists(st.tuples(numbers, each, each), max_size=4)))
    sink = recent is not None and draw(st.booleans())
    arguments = draw(each), draw(each), recent, sink, layers
    assume(is_valid(*arguments))
    return KVSpec(*arguments)


specs = valid_specs()
shapes = st.builds(
    KVShape,
    num_layers=st.just(4),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
)


@given(
    k=names, v=names, recent=st.none() | st.tuples(names, names), sink=st.booleans(),
    layers=st.lists(st.tuples(st.integers(-2, 1), names, names), max_size=2),
)  # fmt: skip
@settings(max_examples=300)
def test_a_spec_is_refused_just_where_the_docstring_says(
    k: str, v: str, recent: tuple[str, str] | None, sink: bool, layers: list[tuple[int, str, str]]
) -> None:
    arguments: Any = (
        FORMATS[k],
        FORMATS[v],
        recent and (FORMATS[recent[0]], FORMATS[recent[1]]),
        sink,
        tuple((n, FORMATS[a], FORMATS[b]) for n, a, b in layers),
    )
    if is_valid(*arguments):
        assert KVSpec(*arguments).recent == arguments[2]
    else:
        with pytest.raises(ConfigError):
            KVSpec(*arguments)


@pytest.mark.parametrize(
    "text",
    [
        "f16+r64:int4",
        "f16+r64:int8h",
        "int4h+r64:int4",
        "bf16+r64:f16",
        "k=f32,v=int8h+r64",  # neither side of the default
        "f16+s64r64;0=f32",
    ],
)
def test_a_recent_group_that_is_not_finer_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not finer"):
        KVSpec.parse(text)


@pytest.mark.parametrize(
    "text", ["int8c+r64:int4", "k=int4c,v=int8c+r64:k=f16,v=int4m", "int4+s64r64:int4m;1=int5c"]
)
def test_pages_are_not_made_of_what_is_coarser(text: str) -> None:
    """Held down: the price of 8 bits for what 4 bits left. Also where only a layer is by page."""
    with pytest.raises(ConfigError, match=r'int\dc is encoded from .*coarser \(int4m?\).*"\+r64:'):
        KVSpec.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "k=f32,v=int4h+r64",
        "k=int4,v=f32+r64",
        "k=int8c,v=bf16+r64",
        "int8c+s64r64:int8h",
        "f16+r64;0=int4",
    ],
)
def test_a_recent_group_that_is_finer_somewhere_is_taken(text: str) -> None:
    assert str(KVSpec.parse(text)) == text


@pytest.mark.parametrize("text", ["int4c", "k=int4c,v=int4m", "k=f16,v=int3c", "int8;-1=int8c"])
def test_a_format_by_page_needs_a_recent_group(text: str) -> None:
    with pytest.raises(ConfigError, match=r'int\dc encodes 64 tokens at once.*"\+s64r64"'):
        KVSpec.parse(text)


@pytest.mark.parametrize("text", ["int4+r64:int8c", "k4v4+s64r64:int8c", "int4+r64:k=f16,v=int8c"])
def test_a_format_by_page_cannot_hold_a_recent_group(text: str) -> None:
    with pytest.raises(ConfigError, match=r'int8c .*cannot hold a recent group.*"\+r64:int8h"'):
        KVSpec.parse(text)


def test_a_sink_needs_a_recent_group() -> None:
    with pytest.raises(ConfigError, match="sink group needs a recent group"):
        KVSpec(FORMATS["int4"], FORMATS["int4"], sink=True)


@given(spec=specs)
def test_parse_inverts_str(spec: KVSpec) -> None:
    """Result files, docs and options can be read back: ``str`` loses nothing, neither the order
    of layers, of which the last holds."""
    assert KVSpec.parse(str(spec)) == spec


@given(spec=specs)
def test_str_is_canonical(spec: KVSpec) -> None:
    """Equal specs are spelled alike, so a spelling is a key."""
    assert str(KVSpec.parse(str(spec))) == str(spec)
    assert hash(KVSpec.parse(str(spec))) == hash(spec)


@given(
    k=names, v=names, fine=st.tuples(names, names), sink=st.sampled_from(("", "s64")),
    layer=st.integers(-9, 9), space=st.sampled_from(("", " ")),
)  # fmt: skip
def test_the_long_spelling_is_always_understood(
    k: str, v: str, fine: tuple[str, str], sink: str, layer: int, space: str
) -> None:
    recent = FORMATS[fine[0]], FORMATS[fine[1]]
    arguments = FORMATS[k], FORMATS[v], recent, bool(sink), ((layer, FORMATS[v], FORMATS[k]),)
    assume(is_valid(*arguments))
    whole = f"{space}v={v},{space}k={k}+{sink}r64:k={fine[0]},{space}v={fine[1]}"
    assert KVSpec.parse(f"{whole};{space}{layer}=k={v},v={k}{space}") == KVSpec(*arguments)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int8", "int8"),
        ("k=int8,v=int8", "int8"),
        ("v=int4,k=int8", "k=int8,v=int4"),
        ("int4h+r64", "int4h+r64"),
        ("int4h+r64:k=f16,v=int8h", "int4h+r64"),
        ("int4h+r64:bf16", "int4h+r64:bf16"),
        ("int4h+r64:k=bf16,v=bf16", "int4h+r64:bf16"),
        ("int4h+S64R64", "int4h+s64r64"),
        ("k8v4", "k=int8c,v=int4m+s64r64"),
        ("K4V4", "k=int4c,v=int4m+s64r64"),
        ("k4v4+s64r64", "k=int4c,v=int4m+s64r64"),
        ("k4v4+r64", "k=int4c,v=int4m+r64"),
        ("k8v8+r64", "k=int8c,v=int8h+r64:f16"),
        ("k4v4+s64r64:f32", "k=int4c,v=int4m+s64r64:f32"),
        ("k4v4;0,-1=int8h", "k=int4c,v=int4m+s64r64;0,-1=int8h"),
        ("k4v4; 0=int8h ;-1=int8h", "k=int4c,v=int4m+s64r64;0,-1=int8h"),
        ("int8;3=k=int8,v=int4", "int8;3=k=int8,v=int4"),
        ("int8;0,2=int4;1=f16;3=int4", "int8;0,2=int4;1=f16;3=int4"),
        ("int8;0=int4;0=f16;0=int4", "int8;0=int4;0=f16;0=int4"),
    ],
)
def test_spellings(text: str, canonical: str) -> None:
    assert str(KVSpec.parse(text)) == canonical


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_short_for_a_spelling(preset: str) -> None:
    spec = KVSpec.parse(preset)
    assert preset not in FORMATS
    assert str(spec) == PRESETS[preset] == str(KVSpec.parse(PRESETS[preset]))
    assert spec.sink and spec.recent is not None and not spec.layers


def test_presets_are_ordered_from_large_to_small() -> None:
    shape = KVShape(num_layers=2, num_kv_heads=2, head_dim=128)
    sizes = [KVSpec.parse(preset).bits_per_element(shape, 4096) for preset in PRESETS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_label_is_the_preset_or_the_spelling(preset: str) -> None:
    assert KVSpec.parse(PRESETS[preset]).label == preset
    assert KVSpec.parse(f"{preset};0,-1=int8h").label == f"{preset};0,-1=int8h"
    for other in (f"{preset}+r64", f"{preset}+s64r64:f32"):
        assert KVSpec.parse(other).label == str(KVSpec.parse(other))


@given(spec=specs)
def test_a_label_is_a_spelling_too(spec: KVSpec) -> None:
    assert KVSpec.parse(spec.label) == spec


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("int44", "int4"),
        ("int8hh", "int8h"),
        ("bf1", "bf16"),
        ("k44v4", "k4v4"),
        ("k=int8,v=imt4", "int4"),
        ("int8+r64:bfl16", "bf16"),
        ("k=inr4c,v=int4m+r64", "int4c"),
        ("int8;0=itn4h", "int4h"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(wrong: str, nearest: str) -> None:
    """Held down: options that are ignored silently when misspelt."""
    with pytest.raises(ConfigError) as raised:
        KVSpec.parse(wrong)
    suggestion = str(raised.value).partition("did you mean")[2].split('"')[1]
    assert suggestion == nearest
    for name in (*FORMATS, *PRESETS):
        assert name in str(raised.value)


HALF_SPELLINGS = """
    + k= k=int8 k=int8,k=int4 k=int8,v=int4,v=int4 k=int8,w=int4 int8,int4
    int8+ int8+r32 int8+64 int8+r64:zz int8+r64+r64 int8:bf16
    int4+r64: int4+s64 int4+s32r64 int4+r64s64 int4+s64:bf16 int4+r64:k=f16 k4v4+
    int8; int8;0 int8;0= int8;=int4 int8;x=int4 int8;0,=int4 int8;1.5=int4 int8;0=k=int4
    int8;0=int4+r64 ;0=int4 int8;0=k4v4 k=k4v4,v=int4
"""


@pytest.mark.parametrize("text", ["", *HALF_SPELLINGS.split()])
def test_half_a_spelling_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        KVSpec.parse(text)


@given(text=st.text("kv=,+:;s64r64int8hbfc-01 ", max_size=16))
@settings(max_examples=300)
def test_parse_raises_config_errors_only(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert KVSpec.parse(str(KVSpec.parse(text))) == KVSpec.parse(text)


@given(spec=specs)
def test_a_policy_file_is_a_spelling(
    tmp_path_factory: pytest.TempPathFactory, spec: KVSpec
) -> None:
    """Whatever else the file holds, as what kvant eval tune measured."""
    path = tmp_path_factory.getbasetemp() / "policy.json"
    path.write_text(json.dumps({"kv": str(spec), "measured": [1, 2]}))
    assert KVSpec.parse(f" {path} ") == spec
    assert resolve_spec(str(path), None) == spec


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"int8"',
        "{}",
        '{"kv": null}',
        '{"kv": 4}',
        '{"kv": ["int8"]}',
        '{"kv": "other.json"}',
        b'{"kv": "int8\xff"}',
    ],
)
def test_a_damaged_policy_file_is_named(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=r"policy\.json.*must be a JSON object.*kvant eval tune"):
        KVSpec.parse(str(path))


@pytest.mark.parametrize("path", ["missing.json", "~nobody-of-this-name/policy.json", ".json"])
def test_a_missing_policy_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f'KV policy file "{path}"'):
        KVSpec.parse(path)


def test_a_wrong_name_in_a_policy_file_is_answered_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"kv": "k4v44"}')
    with pytest.raises(ConfigError, match='"k4v44"; did you mean "k4v4"'):
        KVSpec.parse(str(path))


@pytest.mark.parametrize("name", NAMES)
def test_format_names_are_their_keys(name: str) -> None:
    assert FORMATS[name].name == str(FORMATS[name]) == name


@pytest.mark.parametrize(
    ("dtype", "sixteen_bit"), [("float16", "f16"), ("bfloat16", "bf16"), ("float32", "bf16")]
)
def test_quant_policy_is_the_seed_systems_number(dtype: str, sixteen_bit: str) -> None:
    """0 is the 16-bit cache of the model's own dtype, and so is no option at all; 4 is 4 bits
    that are safe, not the arithmetic of that system."""
    spelled = {p: resolve_spec(None, p, dtype=dtype).label for p in (None, 0, 4, 8, 16)}
    assert spelled == {None: sixteen_bit, 0: sixteen_bit, 4: "k4v4", 8: "int8", 16: "fp8"}


@given(spec=specs)
def test_a_spec_or_its_spelling_is_taken_as_given(spec: KVSpec) -> None:
    assert resolve_spec(spec, None) is spec
    assert resolve_spec(str(spec), None) == spec


@pytest.mark.parametrize("policy", [7, 1, -8, 17, "8", True])
def test_unknown_quant_policy(policy: int) -> None:
    with pytest.raises(ConfigError, match="quant_policy") as raised:
        resolve_spec(None, policy)
    assert repr(policy) in str(raised.value)


@pytest.mark.parametrize("policy", [0, 4, 8, 16])
@pytest.mark.parametrize("kv", ["int8", "k4v4", KVSpec.parse("int4")])
def test_two_options_for_one_thing_are_an_error(kv: str | KVSpec, policy: int) -> None:
    """Also when they agree, and also for 0: neither wins silently."""
    with pytest.raises(ConfigError, match="both"):
        resolve_spec(kv, policy)


def _shape(head_dim: int, num_layers: int = 1) -> KVShape:
    return KVShape(num_layers=num_layers, num_kv_heads=1, head_dim=head_dim)


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "k=bf16,v=int4h",
        "bf16+r64:k=f32,v=int8",
        "int8h+r64:bf16",
        "bf16;0=k=bf16,v=int8",
        "k4v4",
    ],
)
@pytest.mark.parametrize("head_dim", [60, 100])
def test_head_dim_that_no_kernel_can_store_is_named(text: str, head_dim: int) -> None:
    """Also when only V, only the recent group or only a layer needs the multiple."""
    with pytest.raises(ConfigError, match=str(head_dim)):
        KVSpec.parse(text).check(_shape(head_dim))
    KVSpec.parse("bf16").check(_shape(head_dim))


@given(spec=specs, head_dim=st.sampled_from((8, 64, 80, 96, 112, 128, 192, 256)))
def test_common_head_dims_are_taken_by_every_format(spec: KVSpec, head_dim: int) -> None:
    spec.check(_shape(head_dim, 4))


@pytest.mark.parametrize("layer", [3, -4, 100, -100])
def test_a_layer_that_the_model_does_not_have_is_named(layer: int) -> None:
    spec = KVSpec.parse(f"k4v4;0,{layer}=int8h")
    with pytest.raises(ConfigError, match=f"layer {layer}, this model has 3: 0 to 2, or -1"):
        spec.check(_shape(64, 3))
    for valid in (0, 2, -1, -3):
        KVSpec.parse(f"k4v4;{valid}=int8h").check(_shape(64, 3))


def _by_layer(spec: KVSpec, num_layers: int) -> list[tuple[KVFormat, KVFormat]]:
    """The formats of each layer, looked up from the last override back."""
    pairs = []
    for layer in range(num_layers):
        named = [pair for n, *pair in spec.layers if n % num_layers == layer]
        k, v = named[-1] if named else (spec.k, spec.v)
        pairs.append((k, v))
    return pairs


def test_the_last_override_of_a_layer_holds() -> None:
    """A worked example: negative numbers, and one layer named three times."""
    spec = KVSpec.parse("int8;0,1=int4;-1=f16;2=k=f32,v=int8h;-2=f16;1=int4h")
    found = [(str(at.k), str(at.v)) for at in spec.layout(_shape(64, 3))]
    assert found == [("int4", "int4"), ("int4h", "int4h"), ("f32", "int8h")]


@given(spec=specs, shape=shapes)
def test_layers_lie_one_after_another(spec: KVSpec, shape: KVShape) -> None:
    layout = spec.layout(shape)
    assert [(at.k, at.v) for at in layout] == _by_layer(spec, shape.num_layers)
    offset = 0
    for at in layout:
        parts = at.k.part_bytes(shape.head_dim) + at.v.part_bytes(shape.head_dim)
        assert (at.offset, at.nbytes) == (offset, shape.num_kv_heads * parts)
        assert at.offset % 64 == 0
        offset += at.nbytes
    assert spec.page_bytes(shape) == offset


@given(spec=specs, shape=shapes)
def test_sizes_follow_from_the_page(spec: KVSpec, shape: KVShape) -> None:
    """A page is all layers and heads of 64 tokens; a recent part costs nothing per token."""
    assert spec.bytes_per_token(shape) * 64 == spec.page_bytes(shape)
    pages, rest = divmod(spec.tokens_per_gib(shape), 64)
    assert (pages, rest) == (2**30 // spec.page_bytes(shape), 0)
    elements = 2 * 64 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    assert spec.bits_per_element(shape) == 8 * spec.page_bytes(shape) / elements


@given(spec=specs, shape=shapes, short=st.integers(0, 63))
def test_bits_of_a_sequence_are_all_the_bytes_it_holds(
    spec: KVSpec, shape: KVShape, short: int
) -> None:
    """Counted in the pools that the cache takes pages from, one token before the last group is
    full. Held down: a finer part that is left out of the figures."""
    memory = KVMemory.allocate(spec, shape, 9, 2 if spec.recent else 0, 0)
    for groups in (1, 2, 3, 9):
        cache = PagedCache(9, memory.recent.num_pages, sink=spec.sink, prefix_caching=False)
        assert cache.reserve(Holding(), 0, PAGE_TOKENS * groups - 1) is not None
        nbytes = sum(
            (pool.num_pages - pages.num_available) * pool.pages.shape[1]
            for pool, pages in ((memory.base, cache.base), (memory.recent, cache.recent))
        )
        elements = 2 * PAGE_TOKENS * shape.num_layers * shape.num_kv_heads * shape.head_dim
        found = spec.bits_per_element(shape, PAGE_TOKENS * groups - short)
        assert found == pytest.approx(8 * nbytes / (groups * elements), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "head_dim", "nbytes"),
    [
        ("int8", 128, 16_896),
        ("k=int8h,v=int4h", 128, 12_800),
        ("int4", 128, 8_704),
        ("bf16", 128, 32_768),
        ("k8v4", 128, 8_704 + 4_224),
        ("k4v4", 128, 4_608 + 4_224),
        ("k3v3", 64, 1_792 + 1_664),
    ],
)
def test_page_bytes_are_those_of_the_design(text: str, head_dim: int, nbytes: int) -> None:
    assert KVSpec.parse(text).page_bytes(_shape(head_dim)) == nbytes


@given(spec=specs, shape=shapes)
def test_fine_is_a_spec_without_a_recent_part(spec: KVSpec, shape: KVShape) -> None:
    """Each side of each layer in the finer of its own format and that of the recent group, by
    token in any case."""
    fine = spec.fine
    assert fine.recent is None and not fine.sink
    assert fine.fine is fine
    if spec.recent is None:
        assert fine is spec
        return
    found = [(at.k, at.v) for at in fine.layout(shape)]
    for pair, coarse in zip(found, _by_layer(spec, shape.num_layers), strict=True):
        for got, own, recent in zip(pair, coarse, spec.recent, strict=True):
            assert not got.by_page
            keep = not own.by_page and own.bits > recent.bits
            assert got == (own if keep else recent)


def test_fine_pages_of_a_worked_example() -> None:
    spec = KVSpec.parse("k4v4;0=int8h;-1=f32")
    found = [(str(at.k), str(at.v)) for at in spec.fine.layout(_shape(64, 3))]
    assert found == [("f16", "int8h"), ("f16", "int8h"), ("f32", "f32")]
    spec = KVSpec.parse("k=int6c,v=bf16+s64r64:int8;0=int4")
    assert str(spec.fine) == "k=int8,v=bf16;0=int8"

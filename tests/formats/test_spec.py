"""One spelling of a KV cache everywhere: parse and str are inverse, mistakes are named."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvant.errors import ConfigError
from kvant.formats import FORMATS, PRESETS, KVShape, KVSpec, resolve_spec

NAMES = list(FORMATS)

names = st.sampled_from(NAMES)


def is_finer(spec: KVSpec) -> bool:
    """A recent group that is not finer than the rest is refused."""
    bits = [fmt.bits_per_element(128) for fmt in (spec.k, spec.v)]
    return spec.recent is None or spec.recent.bits_per_element(128) > min(bits)


specs = st.builds(
    KVSpec,
    names.map(FORMATS.__getitem__),
    names.map(FORMATS.__getitem__),
    st.none() | names.map(FORMATS.__getitem__),
).filter(is_finer)


@pytest.mark.parametrize("text", ["f16+r64:int4", "int8h+r64", "int4h+r64:int4", "bf16+r64:f16"])
def test_a_recent_group_that_is_not_finer_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not finer"):
        KVSpec.parse(text)


@given(spec=specs)
def test_parse_inverts_str(spec: KVSpec) -> None:
    """Result files, docs and options can be read back: ``str`` loses nothing."""
    assert KVSpec.parse(str(spec)) == spec


@given(spec=specs)
def test_str_is_canonical(spec: KVSpec) -> None:
    """Equal specs are spelled alike, so a spelling is a key."""
    assert str(KVSpec.parse(str(spec))) == str(spec)
    assert hash(KVSpec.parse(str(spec))) == hash(spec)


@given(k=names, v=names, fine=names, space=st.sampled_from(("", " ")))
def test_the_long_spelling_is_always_understood(k: str, v: str, fine: str, space: str) -> None:
    spec = KVSpec(FORMATS[k], FORMATS[v], FORMATS[fine])
    assume(is_finer(spec))
    assert KVSpec.parse(f"{space}v={v},{space}k={k}+r64:{fine}{space}") == spec


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int8", "int8"),
        ("k=int8,v=int8", "int8"),
        ("v=int4,k=int8", "k=int8,v=int4"),
        ("k8v4", "k=int8,v=int4"),
        ("k8v4h", "k=int8h,v=int4h"),
        ("k8v4h+r64", "k=int8h,v=int4h+r64"),
        ("int4h+r64", "int4h+r64"),
        ("int4h+r64:int8h", "int4h+r64"),
        ("int4h+r64:bf16", "int4h+r64:bf16"),
    ],
)
def test_spellings(text: str, canonical: str) -> None:
    assert str(KVSpec.parse(text)) == canonical


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_pairs_and_no_format_name(preset: str) -> None:
    spec = KVSpec.parse(preset)
    assert preset not in FORMATS
    assert spec.k != spec.v
    assert str(spec) == PRESETS[preset]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("int44", "int4"),
        ("int8hh", "int8h"),
        ("bf1", "bf16"),
        ("k8v4hh", "k8v4h"),
        ("k=int8,v=imt4", "int4"),
        ("int8+r64:bfl16", "bf16"),
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
"""


@pytest.mark.parametrize("text", ["", *HALF_SPELLINGS.split()])
def test_half_a_spelling_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        KVSpec.parse(text)


@given(text=st.text("kv=,+:r64int8hbf ", max_size=16))
def test_parse_raises_config_errors_only(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert KVSpec.parse(str(KVSpec.parse(text))) == KVSpec.parse(text)


@pytest.mark.parametrize("name", NAMES)
def test_format_names_are_their_keys(name: str) -> None:
    assert FORMATS[name].name == str(FORMATS[name]) == name


@pytest.mark.parametrize(
    ("dtype", "sixteen_bit"), [("float16", "f16"), ("bfloat16", "bf16"), ("float32", "bf16")]
)
def test_quant_policy_is_the_seed_systems_number(dtype: str, sixteen_bit: str) -> None:
    """0 is the 16-bit cache of the model's own dtype, and so is no option at all."""
    spelled = {p: str(resolve_spec(None, p, dtype=dtype)) for p in (None, 0, 4, 8)}
    assert spelled == {None: sixteen_bit, 0: sixteen_bit, 4: "int4", 8: "int8"}


@given(spec=specs)
def test_a_spec_or_its_spelling_is_taken_as_given(spec: KVSpec) -> None:
    assert resolve_spec(spec, None) is spec
    assert resolve_spec(str(spec), None) == spec


@pytest.mark.parametrize("policy", [7, 1, -8, 16, "8", True])
def test_unknown_quant_policy(policy: int) -> None:
    with pytest.raises(ConfigError, match="quant_policy") as raised:
        resolve_spec(None, policy)
    assert repr(policy) in str(raised.value)


@pytest.mark.parametrize("policy", [0, 4, 8])
@pytest.mark.parametrize("kv", ["int8", KVSpec.parse("int4")])
def test_two_options_for_one_thing_are_an_error(kv: str | KVSpec, policy: int) -> None:
    """Also when they agree, and also for 0: neither wins silently."""
    with pytest.raises(ConfigError, match="both"):
        resolve_spec(kv, policy)


@pytest.mark.parametrize(
    "text", ["int8", "k=bf16,v=int4h", "k=bf16,v=int4+r64:int8", "int8h+r64:bf16"]
)
@pytest.mark.parametrize("head_dim", [60, 100])
def test_head_dim_that_no_kernel_can_store_is_named(text: str, head_dim: int) -> None:
    """Also when only V or only the recent group needs the multiple."""
    with pytest.raises(ConfigError, match=str(head_dim)):
        KVSpec.parse(text).check_head_dim(head_dim)


@given(spec=specs, head_dim=st.sampled_from((8, 64, 80, 96, 112, 128, 192, 256)))
def test_common_head_dims_are_taken_by_every_format(spec: KVSpec, head_dim: int) -> None:
    spec.check_head_dim(head_dim)


@given(spec=specs, layers=st.integers(1, 4), heads=st.integers(1, 4), eighths=st.integers(1, 32))
def test_sizes_follow_from_the_parts(spec: KVSpec, layers: int, heads: int, eighths: int) -> None:
    """A page is all layers and heads of 64 tokens; a recent part costs nothing per token."""
    shape = KVShape(num_layers=layers, num_kv_heads=heads, head_dim=8 * eighths)
    parts = spec.k.part_bytes(shape.head_dim) + spec.v.part_bytes(shape.head_dim)
    assert spec.page_bytes(shape) == layers * heads * parts
    assert spec.page_bytes(shape) % 64 == 0
    assert spec.bytes_per_token(shape) * 64 == spec.page_bytes(shape)
    pages, rest = divmod(spec.tokens_per_gib(shape), 64)
    assert (pages, rest) == (2**30 // spec.page_bytes(shape), 0)
    elements = 64 * 2 * shape.head_dim
    assert spec.bits_per_element(shape.head_dim) == 8 * parts / elements


@pytest.mark.parametrize(
    ("text", "head_dim", "nbytes"),
    [("int8", 128, 16_896), ("k8v4h", 128, 12_800), ("int4", 128, 8_704), ("bf16", 128, 32_768)],
)
def test_head_page_bytes_are_those_of_the_design(text: str, head_dim: int, nbytes: int) -> None:
    assert KVSpec.parse(text).head_page_bytes(head_dim) == nbytes


@given(spec=specs)
def test_fine_is_a_spec_without_a_recent_part(spec: KVSpec) -> None:
    fine = spec.fine
    assert fine.recent is None
    assert fine.fine is fine
    assert (fine is spec) if spec.recent is None else (fine.k == fine.v == spec.recent)

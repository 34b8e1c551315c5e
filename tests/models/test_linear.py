"""Native linear layers: as exact as their arithmetic allows, and a row the same in any batch.

Float weights are compared with the same product in float64. For codes all is known but float32
roundings of factors: rows are rounded to 8 bits here just as the kernels do it, integers are exact,
so bounds are some units in the last place of the terms of a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kvant.formats.hadamard import signs
from kvant.kernels.cpu import available_isas
from kvant.memory import Arena
from kvant.models.codes import Codes, quantize_int4, quantize_int8
from kvant.models.cpu import CPULinear
from kvant.models.ops import Linear, Norm, TorchLinear

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES = tuple(FLOATS.values())
ROWS = (*range(1, 31), 47, 48, 49, 100, 200, 600)
F64 = NDArray[np.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(
    outputs: int, inputs: int, *, bits: int, group: int | None, offsets: bool = False, seed: int = 0
) -> Codes:
    """Any codes with scales of both signs that float16 has exactly, as checkpoints store them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    group = group or inputs
    groups = -(-inputs // group)
    scale = 0.01 * torch.randn(outputs, groups, generator=generator).sign()
    scale = (scale * (1 + torch.rand(outputs, groups, generator=generator))).half().float()
    zeros = torch.randint(-8, 8, scale.shape, generator=generator)
    return Codes(codes, scale, (scale * zeros).half().float() if offsets else None, bits, group)


Weight = Tensor | Codes
KINDS: dict[str, Callable[[int, int], Weight]] = {
    **{
        name: lambda out, inputs, dtype=dtype: (normal(out, inputs) / inputs**0.5).to(dtype)
        for name, dtype in FLOATS.items()
    },
    "int8": lambda out, inputs: quantize_int8(normal(out, inputs)),
    "int8-32": functools.partial(random_codes, bits=8, group=32),
    "int8-40": functools.partial(random_codes, bits=8, group=40, offsets=True),
    "int8-128": functools.partial(random_codes, bits=8, group=128),
    "int8-whole": functools.partial(random_codes, bits=8, group=None),
    "int8-whole-offsets": functools.partial(random_codes, bits=8, group=None, offsets=True),
    "int4": lambda out, inputs: quantize_int4(normal(out, inputs)),
    "int4-8": functools.partial(random_codes, bits=4, group=8, offsets=True),
    "int4-32": functools.partial(random_codes, bits=4, group=32),
    "int4-40": functools.partial(random_codes, bits=4, group=40, offsets=True),
    "int4-128": functools.partial(random_codes, bits=4, group=128, offsets=True),
    "int4-whole": functools.partial(random_codes, bits=4, group=None),
}
CODES = [name for name in KINDS if name not in FLOATS]
SOME = [*FLOATS, "int8", "int8-40", "int4", "int4-whole"]


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVANT_ISA", str(request.param))
    return str(request.param)


def native(
    weight: Weight, bias: Tensor | None = None, *, gated: bool = False, threads: int = 2
) -> CPULinear:
    return CPULinear(weight, bias, gated=gated, threads=threads, arena=Arena())


# ------------------------------------------------------------------------------------------- errors


def rotated(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """As formats/hadamard.py, but in blocks that may be smaller than they could be."""
    x = (x * signs(x.shape[1])).reshape(-1, block)
    stride = 1
    while stride < block:
        pairs = x.reshape(-1, block // (2 * stride), 2, stride)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack((low + high, low - high), axis=2).reshape(-1, block)
        stride *= 2
    return x * np.float32(1 / np.sqrt(block))


def emulated(x: Tensor, weight: Codes) -> tuple[F64, F64]:
    """The product with rows rounded as the kernels round them, and the sum of its terms' sizes;
    from there on in float64."""
    weight = weight.regrouped(256)
    rows, (outputs, inputs) = x.float().numpy(), weight.shape
    if weight.rotation:
        rows = rotated(rows, weight.rotation).reshape(rows.shape)
    groups = weight.scale.shape[1]
    spare = groups * weight.group - inputs
    rows = np.pad(rows, ((0, 0), (0, spare))).reshape(len(rows), groups, weight.group)
    limit = np.abs(rows).max(2)
    with np.errstate(divide="ignore"):
        factor = np.where(limit > 0, np.float32(127) / limit, np.float32(0))
    rounded = np.rint(rows * factor[..., None]).astype(np.float64)
    scale = (limit / np.float32(127)).astype(np.float64)
    codes = functional.pad(weight.codes, (0, spare)).numpy().astype(np.float64)
    codes = (codes - 2.0 ** (weight.bits - 1)).reshape(outputs, groups, -1)
    by_group = weight.scale.double().numpy()
    terms = np.einsum("tgi,ogi,og,tg->tog", rounded, codes, by_group, scale, optimize=True)
    found, sizes = terms.sum(2), np.abs(terms).sum(2)
    if weight.offset is not None:
        offsets = weight.offset.double().numpy()
        terms = np.einsum("tgi,og,tg->tog", rounded, offsets, scale, optimize=True)
        found, sizes = found + terms.sum(2), sizes + np.abs(terms).sum(2)
    return found, sizes


SHAPES = [(1, 8), (7, 5), (16, 12), (33, 20), (50, 36), (64, 64), (31, 100), (100, 72), (40, 250)]


@pytest.mark.parametrize("shape", [*SHAPES, (96, 576)])
@pytest.mark.parametrize("kind", CODES)
def test_only_factors_of_codes_are_rounded(isa: str, kind: str, shape: tuple[int, int]) -> None:
    weight = KINDS[kind](*shape)
    assert isinstance(weight, Codes)
    x = normal(5, shape[1], seed=1)
    found = native(weight)(x).double().numpy()
    expected, sizes = emulated(x, weight)
    groups = weight.regrouped(256).scale.shape[1]
    step = (2 * groups + 6) * 2.0**-24
    if kind in ("int8", "int4"):  # of several scales of an output float16 keeps 11 bits
        step += 2.0**-11 if groups > 1 or weight.offset is not None else 0
    assert (np.abs(found - expected) <= step * sizes + 1e-30).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_fit(isa: str, bits: int) -> None:
    """8192 products of the largest codes and rows, in one group."""
    ones = torch.ones(17, 1)
    weight = Codes(torch.full((17, 8192), 2**bits - 1, dtype=torch.uint8), ones, None, bits, 8192)
    for sign in (1, -1):
        found = native(weight)(torch.full((3, 8192), float(sign)))
        torch.testing.assert_close(
            found, torch.full((3, 17), sign * 8192.0 * (2 ** (bits - 1) - 1)), rtol=1e-6, atol=0
        )


def in_order(x: Tensor, weight: Tensor) -> Tensor:
    """Products summed one after the other in float32."""
    products = x.float().numpy()[:, None] * weight.float().numpy()
    return torch.from_numpy(products.cumsum(axis=2, dtype=np.float32)[..., -1])


@pytest.mark.parametrize("shape", [*SHAPES, (96, 576), (33, 3000)])
@pytest.mark.parametrize("kind", FLOATS)
def test_float_weights_are_as_exact_as_a_plain_sum(
    isa: str, kind: str, shape: tuple[int, int]
) -> None:
    """At most twice its error. Up to 1000 inputs so is torch's."""
    weight, x = KINDS[kind](*shape), normal(40, shape[1], seed=1)
    assert isinstance(weight, Tensor)
    if kind == "bf16" and isa.endswith("bf16"):  # which multiplies pairs of them
        x = x.bfloat16().float()
    exact = functional.linear(x.double(), weight.double())

    def error(found: Tensor) -> float:
        return float((found.double() - exact).square().mean().sqrt())

    found = error(native(weight)(x))
    floor = 2.0**-24 * float(exact.square().mean().sqrt())  # of products that others have exactly
    assert found <= 2 * error(in_order(x, weight)) + floor
    if shape[1] < 1000:
        assert found <= 2 * error(functional.linear(x, weight.float())) + floor


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_are_near_the_exact_ones(isa: str, kind: str) -> None:
    weight, x = normal(100, 576), normal(40, 576, seed=1)
    exact = functional.linear(x.double(), weight.double())
    codes = {"int8": quantize_int8, "int4": quantize_int4}[kind](weight)
    error = native(codes)(x).double() - exact
    assert error.norm() / exact.norm() < {"int8": 0.013, "int4": 0.1}[kind]


# ------------------------------------------------------------------- what stands before and after


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float = 0.0) -> None:
    """One rounding to the type, and those before it."""
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    step = torch.finfo(dtype).eps / 2 + tolerance
    size = expected.abs().clamp_min(expected.square().mean().sqrt())
    assert ((found.double() - expected).abs() <= step * size).all()


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOME)
def test_rows_of_any_type_and_stride(
    isa: str, kind: str, dtype: torch.dtype, out: torch.dtype
) -> None:
    """The result in float32 is that of the rows in float32; others are it, rounded."""
    layer = native(KINDS[kind](33, 72))
    wide = normal(6, 100).to(dtype)
    x = wide[:, 9:81]
    whole = layer(x.float())
    assert torch.equal(layer(x, dtype=out), whole.to(out))
    assert torch.equal(layer(wide[::2, 9:81], dtype=out), whole[::2].to(out))
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 32, 33, 50])
@pytest.mark.parametrize("kind", SOME)
def test_bias_and_addition(isa: str, kind: str, outputs: int) -> None:
    weight, x, bias = KINDS[kind](outputs, 72), normal(14, 72, seed=2), normal(outputs, seed=3)
    plain = native(weight)(x)
    with_bias = native(weight, bias)(x)
    assert torch.equal(with_bias, plain + bias)
    for dtype in DTYPES:
        wide = normal(14, outputs + 5, seed=4).to(dtype)
        before = wide.clone()
        there = wide[:, 2 : 2 + outputs]
        assert native(weight, bias.to(dtype))(x, add=there) is there
        expected = before[:, 2 : 2 + outputs].float() + (plain + bias.to(dtype).float())
        assert torch.equal(there, expected.to(dtype))
        wide[:, 2 : 2 + outputs] = before[:, 2 : 2 + outputs]
        assert torch.equal(wide, before)  # nothing beside it is touched


@pytest.mark.parametrize("half", [1, 5, 16, 24, 33])
@pytest.mark.parametrize("kind", SOME)
def test_gate(isa: str, kind: str, half: int) -> None:
    """``silu(gate) * up`` of what the same layer gives without."""
    weight, x, bias = KINDS[kind](2 * half, 72), 3 * normal(14, 72), normal(2 * half, seed=3)
    gate, up = native(weight, bias)(x.float()).double().chunk(2, dim=1)
    layer = native(weight, bias, gated=True)
    expected = functional.silu(gate) * up
    close(layer(x), expected, torch.float32, 1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(layer(x, dtype=dtype), layer(x).to(dtype))
    there = normal(14, half, seed=5)
    both = there + layer(x)
    assert torch.equal(layer(x, add=there), both)


def test_gates_of_any_size(isa: str) -> None:
    gates = torch.tensor([-1e30, -1e4, -90.0, -80.0, -1e-3, 0.0, 1e-30, 1.0, 90.0, 1e4, 1e30])
    layer = native(torch.eye(2), gated=True)
    found = layer(torch.stack((gates, torch.full_like(gates, 2.0)), dim=1))[:, 0]
    expected = functional.silu(gates.double()) * 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [5, 72, 576])
def test_norm(isa: str, inputs: int, dtype: torch.dtype, eps: float) -> None:
    x = (0.3 * normal(14, inputs)).to(dtype)
    norm = Norm(1 + normal(inputs, seed=1) / 4, eps)
    exact = functional.rms_norm(x.double(), (inputs,), norm.weight.double(), eps)
    layer = native(torch.eye(inputs))  # which shows the norm alone
    close(layer(x, norm=norm, dtype=torch.float32), exact, torch.float32, 8 * 2.0**-24)
    assert torch.equal(layer(x, norm=norm), layer(x.float(), norm=norm).to(dtype))


@pytest.mark.parametrize("kind", SOME)
def test_norm_comes_before_all_else(isa: str, kind: str) -> None:
    """But for last bits, by which other codes may be the nearest."""
    layer, x = native(KINDS[kind](100, 576), normal(100), gated=True), normal(14, 576)
    norm = Norm(1 + normal(576, seed=1) / 4, 1e-5)
    expected = layer(functional.rms_norm(x, (576,), norm.weight, norm.eps)).double()
    error = layer(x, norm=norm).double() - expected
    assert error.norm() / expected.norm() < (1e-6 if kind in ("f32", "f16") else 2e-3)


@pytest.mark.parametrize("kind", SOME)
def test_no_rows(isa: str, kind: str) -> None:
    layer = native(KINDS[kind](20, 72), gated=True)
    found = layer(torch.empty(0, 72).bfloat16(), norm=Norm(torch.ones(72), 1e-5))
    assert (tuple(found.shape), found.dtype) == ((0, 10), torch.bfloat16)
    there = torch.empty(0, 10)
    assert layer(torch.empty(0, 72), add=there) is there


# ------------------------------------------------------------------------- rows and their company


@pytest.mark.parametrize("kind", SOME)
def test_a_row_has_the_same_bits_in_any_company(isa: str, kind: str) -> None:
    """Any number of rows, one or two threads, any place among them, once cost is high enough for
    threads to share rows too."""
    weight, bias, norm = KINDS[kind](160, 128), normal(160), Norm(torch.ones(128), 1e-5)
    one, two = (native(weight, bias, gated=True, threads=n) for n in (1, 2))
    x = normal(max(ROWS), 128, seed=1).bfloat16()
    whole = two(x, norm=norm, dtype=torch.float32)
    for rows in ROWS:
        for layer in (one, two):
            for part in (slice(0, rows), slice(len(x) - rows, len(x))):
                assert torch.equal(layer(x[part], norm=norm, dtype=torch.float32), whole[part])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.equal(two(x[order], norm=norm, dtype=torch.float32), whole[order])


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "int4"])
def test_large_weights_are_shared_by_threads(isa: str, kind: str) -> None:
    """With few rows each thread takes some of the outputs."""
    weight = KINDS[kind](1632, 576)
    one, two = (native(weight, threads=n) for n in (1, 2))
    x = normal(100, 576, seed=1)
    whole = one(x)
    for rows in (1, 2, 13, 49, 100):
        assert torch.equal(two(x[:rows]), whole[:rows])
    assert torch.equal(native(weight, threads=3)(x), whole)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOME)
def test_what_is_not_finite_stays_in_its_row(
    isa: str, kind: str, dtype: torch.dtype, poison: float
) -> None:
    weight, norm = KINDS[kind](33, 72), Norm(torch.ones(72), 1e-5)
    for layer, options in ((native(weight), {}), (native(weight), {"norm": norm})):
        x = normal(40, 72).to(dtype)
        clean = layer(x, **options)
        x[7, 3] = poison
        found = layer(x, **options)
        others = torch.arange(40) != 7
        assert torch.equal(found[others], clean[others])
        assert not found[7].isfinite().any()


@pytest.mark.parametrize("kind", SOME)
def test_a_row_of_zeros_gives_the_bias(isa: str, kind: str) -> None:
    weight, bias = KINDS[kind](33, 72), normal(33)
    x = normal(5, 72)
    x[[1, 3]] = 0
    found = native(weight, bias)(x)
    assert torch.equal(found[1], bias) and torch.equal(found[3], bias)
    assert torch.equal(native(weight)(x)[1], torch.zeros(33))
    found = native(weight, bias)(x, norm=Norm(torch.ones(72), 1e-5))
    assert torch.equal(found[1], bias)


@pytest.mark.parametrize("size", [2.0**100, 2.0**-100])
@pytest.mark.parametrize("kind", SOME)
def test_large_and_tiny_rows(isa: str, kind: str, size: float) -> None:
    """A row's size, a power of two, changes nothing else: 1e30 beside 1e-30."""
    layer = native(KINDS[kind](33, 72))
    x = normal(6, 72)
    expected = layer(x)
    sizes = torch.tensor([1.0, size, 1.0, 1 / size, size, 1.0]).unsqueeze(1)
    assert torch.equal(layer(x * sizes), expected * sizes)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("size", [2.0**60, 2.0**-60])
def test_large_and_tiny_scales(isa: str, kind: str, size: float) -> None:
    weight = KINDS[kind](33, 72)
    assert isinstance(weight, Codes)
    x = normal(6, 72)
    expected = native(weight)(x)
    offset = None if weight.offset is None else weight.offset * size
    scaled = Codes(
        weight.codes, weight.scale * size, offset, weight.bits, weight.group, weight.rotation
    )
    assert torch.equal(native(scaled)(x), expected * size)


@pytest.mark.parametrize("kind", CODES)
def test_outputs_of_zeros(isa: str, kind: str) -> None:
    """Scales, and offsets, of zero: beside others they stay zero."""
    weight = KINDS[kind](33, 72)
    assert isinstance(weight, Codes)
    x = normal(6, 72)
    expected = native(weight)(x)
    weight.scale[4] = 0
    if weight.offset is not None:
        weight.offset[4] = 0
    found = native(weight)(x)
    assert not found[:, 4].any()
    others = torch.arange(33) != 4
    assert torch.equal(found[:, others], expected[:, others])


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("kind", SOME)
def test_weights_are_copied(isa: str, kind: str) -> None:
    """What a layer was made of may change or go, and layers of an arena keep apart."""
    arena, x = Arena(), normal(6, 72)
    weights = [KINDS[kind](outputs, 72) for outputs in (33, 1, 64)]
    expected = [native(weight)(x) for weight in weights]
    layers: list[CPULinear] = []
    for weight in weights:
        layers.append(CPULinear(weight, gated=False, threads=1, arena=arena))
        for part in (weight.codes, weight.scale) if isinstance(weight, Codes) else (weight,):
            part.zero_()
    for layer, found in zip(layers, expected, strict=True):
        assert torch.equal(layer(x), found)


def test_arenas_give_lines_away_once() -> None:
    arena = Arena()
    parts = [arena.take(size) for size in (1, 64, 100, 5000, 0, 3 << 20, 40 << 20, 1)]
    for number, part in enumerate(parts, 1):
        assert part.ctypes.data % 64 == 0 and not part.any()
        part[:] = number
    for number, part in enumerate(parts, 1):
        assert (part == number).all()


# ------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_torch_layers_do_the_same(dtype: torch.dtype, gated: bool) -> None:
    """What the native ones are a faster form of: norm, product, bias, gate, addition."""
    weight, bias = normal(20, 72).to(dtype) / 8, normal(20, seed=1).to(dtype)
    x, there = normal(14, 72, seed=2).to(dtype), normal(14, 10 if gated else 20, seed=3).to(dtype)
    norm = Norm(1 + normal(72, seed=4) / 4, 1e-5)
    layers: tuple[Linear, ...] = (
        TorchLinear(weight, bias, gated=gated),
        native(weight, bias, gated=gated),
    )
    results = [layer(x, norm=norm, add=there.clone()).float() for layer in layers]
    torch.testing.assert_close(*results, rtol=0, atol=40 * torch.finfo(dtype).eps)
    results = [layer(x, norm=norm, dtype=torch.float32) for layer in layers]
    torch.testing.assert_close(*results, rtol=0, atol=40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_layers_pad_rows(dtype: torch.dtype) -> None:
    """From some number of rows on torch's libraries sum in one order (benchmarks/row_invariance.py
    has measured which)."""
    layer: Any = TorchLinear(normal(960, 576).to(dtype), None)
    x = normal(70, 576, seed=1).to(dtype)
    whole = layer(x)
    for rows in (1, 2, 3, 5, 11, 12, 13, 50):
        assert torch.equal(layer(x[:rows]), whole[:rows])

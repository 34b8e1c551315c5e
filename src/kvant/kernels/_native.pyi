"""Kernels in C++ (src/native/module.cpp). Addresses are (address, type, row and head stride)."""

import numpy as np
from numpy.typing import NDArray

Address = tuple[int, int, int, int]

def available_isas() -> list[str]: ...

class Pool:
    def __init__(self, pages: NDArray[np.uint8]) -> None: ...

class Part:
    def __init__(
        self,
        *,
        family: int,
        dtype: int,
        bits: int,
        rotated: bool,
        by_page: bool,
        nbytes: int,
        scale: int,
        zero: int,
        codes: tuple[int, ...],
        widths: tuple[int, ...],
    ) -> None: ...

class Layer:
    def __init__(self, offset: int, k: Part, v: Part) -> None: ...

class Plan:
    def add(
        self,
        row: int,
        start: int,
        end: int,
        pages: NDArray[np.int64],
        fine_pages: NDArray[np.int64],
    ) -> None: ...

class Rotary:
    def __init__(self, isa: str, threads: int) -> None: ...
    def forward(
        self,
        x: Address,
        cos: Address,
        sin: Address,
        out: Address,
        rows: int,
        heads: int,
        head_dim: int,
    ) -> None: ...

class Linear:
    def __init__(
        self,
        *,
        isa: str,
        kind: int,
        gated: bool,
        offsets: bool,
        inputs: int,
        outputs: int,
        groups: int,
        group_words: int,
        rotation: int,
        signs: NDArray[np.float32] | None,
        lines: NDArray[np.uint8],
        factors: NDArray[np.float32] | None,
        bias: NDArray[np.float32] | None,
        threads: int,
    ) -> None: ...
    def forward(
        self, x: Address, out: Address, rows: int, norm: int, eps: float, add: bool
    ) -> None: ...

class Backend:
    def __init__(
        self,
        *,
        isa: str,
        base: Pool,
        recent: Pool,
        scratch: Pool,
        num_recent: int,
        has_recent: bool,
        num_sink: int,
        kv_heads: int,
        head_dim: int,
        signs: list[float],
        layers: list[tuple[Layer, ...]],
        threads: int,
    ) -> None: ...
    def write(self, plan: Plan, layer: int, k: Address, v: Address) -> None: ...
    def attend(
        self,
        plan: Plan,
        layer: int,
        q: Address,
        out: Address,
        heads: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: NDArray[np.float32] | None,
    ) -> None: ...

class Block:
    def __init__(
        self,
        *,
        qkv: Linear,
        output: Linear,
        gate_up: Linear,
        down: Linear,
        attention_norm: int,
        mlp_norm: int,
        eps: float,
        window: int,
    ) -> None: ...

class Decoder:
    def __init__(
        self,
        rotary: Rotary,
        blocks: list[Block],
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        threads: int,
    ) -> None: ...
    def forward(
        self,
        backend: Backend,
        plan: Plan,
        x: Address,
        cos: Address,
        sin: Address,
        rows: int,
        chosen: NDArray[np.int64],
        out: Address,
    ) -> None: ...

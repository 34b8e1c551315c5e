"""Write tests/formats/golden: run ``PYTHONPATH=src python tests/formats/make_golden.py`` after
a deliberate change of what formats store, which makes every stored page unreadable.

The input comes from integers alone, so it does not change with a library. ``digests.json`` has
the blake2b digest of one page per format, side and head_dim, and of rotated vectors;
``parts.txt`` has all non-zero bytes of three tokens, and of a whole page of a format by page, for
eyes and for other languages. In formats by page it is the channels that are constant, zero and
so on, not the tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kvant.formats import FORMATS, PAGE_TOKENS, PartView
from kvant.formats.base import Side
from kvant.formats.hadamard import rotate, unrotate

FOLDER = Path(__file__).parent / "golden"
SIDES: tuple[Side, ...] = get_args(Side)
HEAD_DIMS = (64, 80, 128)
DUMPED_TOKENS = (0, 9, 40)
DUMPED_CHANNELS = range(14, 22)


def _random(count: int) -> list[int]:
    """The first outputs of splitmix64 with seed 1."""
    out = []
    state, mask = 1, 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def vectors(count: int, length: int) -> NDArray[np.float32]:
    """Float32 ``[count, length]``, at least 64: 24-bit integers over powers of two, then rows that
    are constant, zero, with an outlier, of tiny range on an offset, denormal, of ties to break (at
    8 and at 4 bits) and not finite."""
    x = [((z >> 40) - 2**23) / 2 ** (20 + z % 8) for z in _random(count * length)]
    rows = np.array(x, np.float32).reshape(count, length)
    rows[16] = 0.7
    rows[17] = 0
    rows[18] = -0.0
    rows[19, 3] = 1e4
    rows[20] = 100 + rows[20] / 128
    rows[21] *= 2.0**-24
    rows[22] *= 2.0**-140
    rows[23] *= 2.0**20
    for row, levels in ((24, 255), (25, 15)):
        rows[row] = (np.arange(length) * 7 % levels + 0.5) * float(np.float16(0.3))
        rows[row, :2] = 0, levels * float(np.float16(0.3))
    rows[62, 5] = np.nan
    rows[63, 6] = np.inf
    return rows


def page(name: str, head_dim: int) -> NDArray[np.float32]:
    """Vectors ``[64, head_dim]`` that a format is tried on."""
    if FORMATS[name].by_page:
        return vectors(head_dim, PAGE_TOKENS).T
    return vectors(PAGE_TOKENS, head_dim)


def part(name: str, side: Side, x: NDArray[np.float32]) -> bytes:
    """The bytes of a part that holds ``x [64, D]``."""
    fmt, head_dim = FORMATS[name], x.shape[-1]
    raw = np.zeros((1, 1, fmt.part_bytes(head_dim)), np.uint8)
    PartView(fmt, side, head_dim, raw).fill(np.array([0]), x[None, :, None])
    return raw.tobytes()


def part_of_tokens(name: str, side: Side, x: NDArray[np.float32], tokens: NDArray[Any]) -> bytes:
    """The bytes of a part, zero but for ``tokens``."""
    fmt, head_dim = FORMATS[name], x.shape[-1]
    raw = np.zeros((1, 1, fmt.part_bytes(head_dim)), np.uint8)
    PartView(fmt, side, head_dim, raw).write(np.zeros_like(tokens), tokens, x[tokens, None])
    return raw.tobytes()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digests() -> str:
    """JSON of one line per page and per direction of rotation."""
    out = {}
    for head_dim in HEAD_DIMS:
        for name in FORMATS:
            for side in SIDES:
                data = part(name, side, page(name, head_dim))
                out[f"{name} {side} {head_dim}"] = _digest(data)
        x = vectors(PAGE_TOKENS, head_dim)
        out[f"rotate {head_dim}"] = _digest(rotate(x[:62]).tobytes())
        out[f"unrotate {head_dim}"] = _digest(unrotate(x[:62]).tobytes())
    return json.dumps(out, indent=1) + "\n"


def parts() -> str:
    """Rows of 16 bytes, as ``offset  bytes``; rows of zeros are left out."""
    lines = [f"head_dim 64, tokens {DUMPED_TOKENS}"]
    x = page("int8", 64)
    for name in ("int8", "int4", "int3m"):
        for side in SIDES:
            lines += _dump(name, side, part_of_tokens(name, side, x, np.array(DUMPED_TOKENS)))
    lines.append(f"\nhead_dim 8, a page of channels {DUMPED_CHANNELS[0]} to {DUMPED_CHANNELS[-1]}")
    for side in SIDES:
        channels = np.ascontiguousarray(page("int5c", 64)[:, DUMPED_CHANNELS])
        lines += _dump("int5c", side, part("int5c", side, channels))
    return "\n".join(lines) + "\n"


def _dump(name: str, side: Side, data: bytes) -> list[str]:
    lines = [f"\n{name} {side}, {len(data)} bytes"]
    for offset in range(0, len(data), 16):
        row = data[offset : offset + 16]
        if any(row):
            lines.append(f"{offset:04x}  {row.hex(' ', 4)}")
    return lines


FILES = {"digests.json": digests, "parts.txt": parts}


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in FILES.items():
        (FOLDER / name).write_text(make())


if __name__ == "__main__":
    main()

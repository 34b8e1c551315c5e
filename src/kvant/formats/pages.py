"""Pages of a pool, opened by layer: what turns vectors into bytes and back."""

from __future__ import annotations

from kvant.formats.base import PAGE_TOKENS, Array, PartView
from kvant.formats.spec import KVShape, KVSpec, LayerLayout

__all__ = ["LayerPages", "open_pages"]


class LayerPages:
    """The K and V parts of one layer. ``raw`` is ``uint8 [pages, KV heads, bytes]``, a view into
    the pool; writes go through to it."""

    def __init__(self, layer: LayerLayout, head_dim: int, raw: Array) -> None:
        k_bytes = layer.k.part_bytes(head_dim)
        self.k = PartView(layer.k, "k", head_dim, raw[..., :k_bytes])
        self.v = PartView(layer.v, "v", head_dim, raw[..., k_bytes:])

    def write(self, pages: Array, slots: Array, k: Array, v: Array) -> None:
        """Encode ``k, v [N, H, D]`` into positions ``slots [N]`` of ``pages [N]``."""
        self.k.write(pages, slots, k)
        self.v.write(pages, slots, v)

    def fill(self, pages: Array, k: Array, v: Array) -> None:
        """Encode ``k, v [n, 64, H, D]`` into all positions of ``pages [n]``."""
        self.k.fill(pages, k)
        self.v.fill(pages, v)

    def decode(self, pages: Array) -> tuple[Array, Array]:
        """What whole ``pages [n]`` hold, not rotated: K and V, float32 ``[n, 64, H, D]``."""
        both = []
        for part in (self.k, self.v):
            vectors = part.fmt.unrotate(part.read(pages))
            split = len(vectors), len(pages), PAGE_TOKENS, vectors.shape[-1]
            both.append(vectors.reshape(split))
        k, v = (vectors.transpose(1, 2, 0, 3) for vectors in both)
        return k, v


def open_pages(
    spec: KVSpec, shape: KVShape, pages: Array, *, one_layer: bool = False
) -> list[LayerPages]:
    """The layers of ``pages``, ``uint8 [pages, page bytes]``. With ``one_layer`` a page has room
    for a single layer, and all layers share it, one after another in time."""
    out = []
    for layer in spec.layout(shape):
        offset = 0 if one_layer else layer.offset
        raw = pages[:, offset : offset + layer.nbytes]
        by_head = raw.reshape(len(pages), shape.num_kv_heads, layer.nbytes // shape.num_kv_heads)
        out.append(LayerPages(layer, shape.head_dim, by_head))
    return out

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvant.errors import ConfigError
from kvant.eval.fidelity import FidelityRow
from kvant.eval.plot import plot
from kvant.figure import check_plot

KLD = {
    "f32": (32, 0.0), "bf16": (16, 2.2e-5), "int8": (8.5, 3.35e-4), "int8h": (8.5, 1.5e-4),
    "k=int8h,v=int4h": (6.5, 6.4e-3),
    "k=int8h,v=int4h+r64": (6.5, 2.1e-3), "int4h+r64": (4.5, 1.01e-2),
    "int4h+r64:bf16": (4.5, 9.99e-3), "int4h": (4.5, 4.8e-2), "int4": (4.5, 0.104),
}  # fmt: skip


def a_row(spec: str, ctx: int, bits: float, kld: float | None) -> FidelityRow:
    return FidelityRow(
        kv_spec=spec, ctx=ctx, windows=1, positions=ctx, bits_per_element=bits, bytes_per_token=1,
        ppl=None, dppl_percent=None, kld=kld, kld_stderr=None, kld_p99=None, kld_p999=None,
        top1_percent=None, greedy=None, k_sqnr_db=[], v_sqnr_db=[], worst_layers=[],
    )  # fmt: skip


def some_rows(*contexts: int) -> list[FidelityRow]:
    return [
        a_row(spec, ctx, bits, kld * ctx / 2048)
        for ctx in contexts
        for spec, (bits, kld) in KLD.items()
    ]


@pytest.mark.parametrize("contexts", ((2048,), (2048, 8192), (512, 2048, 4096)))
def test_labels_are_legible(
    contexts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each format but the baseline, on the picture and on no other."""
    axes: list[Axes] = []
    save = Figure.savefig

    def kept(self: Figure, *arguments: object, **options: object) -> None:
        axes.extend(self.axes)
        save(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", kept)
    plot(some_rows(*contexts), tmp_path / "a.png", model="a model")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    labels = axes[0].texts
    assert {label.get_text() for label in labels} == set(KLD) - {"f32"}
    frame = axes[0].get_window_extent()
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_other_kinds_of_picture_and_nothing_to_show(tmp_path: Path) -> None:
    plot([a_row("f32", 64, 32, 0.0), a_row("f16", 64, 16, None)], tmp_path / "a.svg", model="m")
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_what_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plot(Path("a.PNG"))
    with pytest.raises(ConfigError, match=r"plot='a.txt' must end in .png"):
        check_plot(Path("a.txt"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install .kvant"):
        check_plot(Path("a.png"))

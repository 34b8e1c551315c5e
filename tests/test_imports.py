"""Who may know whom. The tree is the architecture; these tests keep it one.

Arrows point down, also those of imports inside functions; only names for type checkers
(``if TYPE_CHECKING``) are exempt, as they are not there when the code runs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import kvant
from kvant.formats import FORMATS, PRESETS

ROOT = Path(kvant.__file__).parent

# Lowest first. A unit (a folder or module of kvant) imports itself and units of lower rows.
ROWS = (
    ("errors", "machine", "memory"),
    ("figure", "client"),
    ("formats",),
    ("cache",),
    ("kernels",),
    ("models",),
    ("loading",),
    ("config",),
    ("request",),
    ("engine",),
    ("api", "pipeline"),
    ("",),  # the public face: kvant/__init__.py
    ("bench", "eval", "server"),
    ("report",),
    ("cli",),
    ("__main__",),
)

# What the cache, which only moves bytes, may know of formats: a number and sizes.
SIZES = {"PAGE_TOKENS", "KVShape", "KVSpec"}

# The only places that tell one format from another.
NAMING_UNITS = {"formats", "kernels", "cli"}
# Where int8 and int4 are precisions of weights.
NAMING_WEIGHTS = {"config.py", "loading/checkpoint.py", "models/codes.py"}


class Import(NamedTuple):
    """One imported name; ``module`` is absolute."""

    module: str
    name: str
    line: int


def _files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def _unit_of(path: Path) -> str:
    """``kvant/cache/paged.py`` is of ``cache``, ``kvant/__init__.py`` of ``""``."""
    unit = path.relative_to(ROOT).with_suffix("").parts[0]
    return "" if unit == "__init__" else unit


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree outside of ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _at_run_time(other)
        else:
            yield from _at_run_time(child)


def _imports(path: Path) -> Iterator[Import]:
    package = ("kvant", *path.relative_to(ROOT).parent.parts)
    for node in _at_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)


def _units_imported(path: Path) -> Iterator[tuple[str, Import]]:
    for found in _imports(path):
        top, _, rest = found.module.partition(".")
        if top == "kvant":  # ``from kvant import cache`` is an import of cache
            is_unit = not rest and any(found.name in row for row in ROWS)
            yield (found.name if is_unit else rest.partition(".")[0]), found


def _row(unit: str) -> int:
    rows = [number for number, row in enumerate(ROWS) if unit in row]
    assert rows, f'"{unit}" has no place in the order of units: give it one in ROWS'
    return rows[0]


def _where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT.parent)}:{line}"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{_where(path, found.line)}: {_unit_of(path) or 'kvant'} imports {unit or 'kvant'}"
        for path in _files()
        for unit, found in _units_imported(path)
        if unit != _unit_of(path) and _row(unit) >= _row(_unit_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_formats_know_nothing_but_errors() -> None:
    """Mathematics and byte maps can be lifted out of kvant as they are."""
    known = {unit for path in (ROOT / "formats").glob("*.py") for unit, _ in _units_imported(path)}
    assert known <= {"formats", "errors"}


def test_the_cache_knows_sizes_but_no_format() -> None:
    """Held down: a cache class for each format, and features that exist for some of them."""
    names = {
        found.name
        for path in (ROOT / "cache").glob("*.py")
        for unit, found in _units_imported(path)
        if unit == "formats"
    }
    assert names <= SIZES


@pytest.mark.parametrize("module", ("cache/pages.py", "cache/paged.py", "engine/scheduler.py"))
def test_page_accounting_is_plain_python(module: str) -> None:
    """Pages are numbers there: no array library, so it is testable in microseconds."""
    roots = {found.module.partition(".")[0] for found in _imports(ROOT / module)}
    assert not roots & {"numpy", "torch"}


def test_formats_cache_and_kernels_load_without_torch() -> None:
    """Held down: seconds of start-up, and a numpy-only user who needs 200 MB of wheels."""
    code = (
        "import sys, kvant.formats, kvant.cache.paged, kvant.kernels;"
        "print(*{'torch', 'transformers'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def _docstrings(tree: ast.Module) -> set[ast.expr]:
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, scopes) and node.body]
    return {body[0].value for body in bodies if isinstance(body[0], ast.Expr)}


def test_formats_are_named_where_they_are_made_and_nowhere_else() -> None:
    """A format is a value. Held down: ``if policy == "int4"`` in the engine, model by model."""
    wrong = []
    for path in _files():
        weights = {"int8", "int4"} if str(path.relative_to(ROOT)) in NAMING_WEIGHTS else set()
        if _unit_of(path) in NAMING_UNITS:
            continue
        tree = ast.parse(path.read_text())
        exempt = _docstrings(tree)
        wrong += [
            f'{_where(path, node.lineno)}: "{node.value}"'
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node not in exempt
            if isinstance(node.value, str) and node.value in {*FORMATS, *PRESETS} - weights
        ]
    assert not wrong, "\n".join(wrong)

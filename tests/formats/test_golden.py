"""Pages written by any version, on any machine and in any language have these bytes.

A failure means that stored pages and other backends disagree with this version. If that is
wanted, run make_golden.py and say so in the change log.
"""

from __future__ import annotations

import pytest

from tests.formats import make_golden


@pytest.mark.parametrize("name", make_golden.FILES)
def test_bytes_are_those_on_file(name: str) -> None:
    assert make_golden.FILES[name]() == (make_golden.FOLDER / name).read_text()

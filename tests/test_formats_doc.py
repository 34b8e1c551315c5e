"""docs/formats.md is what the code and the stored results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_on_formats_is_up_to_date() -> None:
    script = ROOT / "scripts" / "make_formats_doc.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

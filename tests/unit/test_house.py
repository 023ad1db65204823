"""The rules of the house that ruff and mypy do not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fastworker

ROOT = Path(fastworker.__file__).parent


def test_imports_go_downward() -> None:
    """The contracts at the end of pyproject.toml: which folder may import which, and who talks to a server."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, check=False, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

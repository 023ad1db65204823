"""The mutation check (tests/rig/mutants.py): its marks are in the source, and what it makes of them can run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.mutants import MUTANTS, PAGE, ROOT, marks, mutated


def test_every_mark_belongs_to_one_mutant() -> None:
    wanted = sorted(
        (mutant.file, mutant.name if number == 1 else f"{mutant.name} ({number})")
        for mutant in MUTANTS
        if "/migrations/" not in mutant.file
        for number in range(1, len(mutant.edits) + 1)
    )
    assert sorted((file, name) for file, names in marks().items() for name in names) == wanted
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_mutant_can_run(tmp_path: Path) -> None:
    """It compiles and knows its names; else it would be killed for the wrong reason."""
    for number, mutant in enumerate(MUTANTS):
        text = mutated(mutant)
        assert text != (ROOT / mutant.file).read_text("utf-8"), mutant.name
        if mutant.file.endswith(".py"):
            compile(text, mutant.name, "exec")
            (tmp_path / f"mutant_{number}.py").write_text(text, "utf-8")
        assert all((ROOT / one.partition("::")[0]).exists() for one in mutant.tests.split()), mutant.name
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--select",
        "F821,F823",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_the_page_lists_it(name: str) -> None:
    assert f"| {name} |" in PAGE.read_text("utf-8")

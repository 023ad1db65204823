"""docs/faults.md, what operators are told: each line names a test, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PAGE = (TESTS.parent / "docs" / "faults.md").read_text("utf-8")
LINES = re.findall(r"^\| (?!what happens)(.+) \|$", PAGE.split("## For operators")[1].split("\n## ")[0], re.MULTILINE)


def test_each_line_names_a_test_that_is_there() -> None:
    there = {
        name for file in TESTS.rglob("test_*.py") for name in re.findall(r"def test_(\w+)\(", file.read_text("utf-8"))
    }
    assert len(LINES) > 20
    for line in LINES:
        named = re.fullmatch(r"`(\w+)`", line.split(" | ")[-1])
        assert named, line
        assert named[1] in there, named[1]

"""docs/bugs.md: every id has its line, every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROWS = re.findall(r"^\| ([A-Z]\d+) \| (.+?) \| (.+) \|$", (TESTS.parent / "docs" / "bugs.md").read_text(), re.MULTILINE)
LAST = {"R": 19, "F": 7, "T": 54, "W": 40, "U": 21, "D": 8}


def test_every_bug_has_its_line() -> None:
    ids = [row[0] for row in ROWS]
    assert ids == [f"{letter}{n}" for letter, last in LAST.items() for n in range(1, last + 1)]


def test_every_named_test_exists() -> None:
    functions: dict[str, set[str]] = {}
    for bug, _, shown in ROWS:
        named = re.findall(r"`([^`]+)::([^`]+)`", shown)
        assert named or shown.startswith("cannot be: "), bug
        for file, function in named:
            if file not in functions:
                tree = ast.parse((TESTS / file).read_text())
                functions[file] = {
                    node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                }
            assert function in functions[file], f"{bug}: {file}::{function}"

"""The rules of the house that no linter knows: what imports what, how big a unit may be, that rows have names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import fastworker

ROOT = Path(fastworker.__file__).parent
CLASS_MAX, FUNCTION_MAX = 300, 60  # lines

# What is larger, and why it is one thing all the same. Nothing is added here to save the work of a cut.
LARGER = {
    "config.py Config": "one setting after the other, each with its meaning; docs/configuration.md is made of it",
    "simulator/adversary.py Adversary": "a list of moves, one short method each",
}


@cache
def product() -> list[tuple[Path, list[ast.AST]]]:
    """Each module and all that is in it."""
    return [(path, list(ast.walk(ast.parse(path.read_text())))) for path in sorted(ROOT.rglob("*.py"))]


def units() -> Iterator[tuple[str, int, int]]:
    """(name, lines, allowed)"""
    for path, nodes in product():
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                allowed = CLASS_MAX if isinstance(node, ast.ClassDef) else FUNCTION_MAX
                assert node.end_lineno is not None
                yield f"{path.relative_to(ROOT)} {node.name}", node.end_lineno - node.lineno + 1, allowed


def test_imports_go_downward() -> None:
    """The contracts at the end of pyproject.toml: which folder may import which, and who talks to a server."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, check=False, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_imports_no_client() -> None:
    """Each command imports what it runs: what needs no server starts without 0.2 s of imports.

    With what `health` runs, every ten seconds in each container.
    """
    code = "import sys, fastworker.cli, fastworker.monitor.health; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"aiohttp", "asyncio", "asyncpg", "redis", "rich", "uvloop"} & set(done.stdout.split())


def test_each_migration_has_a_number_of_its_own() -> None:
    """Two branches may take the same next one: each passes alone, and no database can be migrated with both."""
    numbers = sorted(int(path.name.partition("_")[0]) for path in (ROOT / "store" / "migrations").glob("*.sql"))
    assert numbers == list(range(1, len(numbers) + 1))


def test_each_test_module_has_a_name_of_its_own() -> None:
    """Folders of tests are no packages: of two with one name, pytest collects whichever it meets first."""
    names = Counter(path.name for path in Path(__file__).resolve().parents[1].rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_unit_outgrows_its_room() -> None:
    large = {name: lines for name, lines, allowed in units() if lines > allowed}
    assert large.keys() <= LARGER.keys(), {name: lines for name, lines in large.items() if name not in LARGER}
    assert LARGER.keys() <= large.keys(), "no longer larger: take it out of the list"


def test_rows_have_names() -> None:
    """A number as a position in a row of ours is only in table/rows.py and where rows are keyed by their first column."""
    for path in sorted(ROOT.rglob("*.py")):
        if path.parts[-2] not in {"table", "store", "worker"} or path.name == "rows.py":
            continue
        found = re.findall(r"\brow\[[1-9]\d*\]", path.read_text())
        allowed = {"schema_admin.py", "audit.py", "upkeep.py"}  # rows of statements of their own
        assert not found or path.name in allowed, f"{path.relative_to(ROOT)}: {found}"


def shortened() -> Iterator[tuple[str, str]]:
    """(module, constant) of each constant that a test sets."""
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        text = path.read_text()
        if "setattr(" not in text:
            continue
        tree = ast.parse(text)
        modules = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for node in ast.walk(tree):
            match node:
                case ast.Call(ast.Attribute(attr="setattr"), [ast.Constant(str(dotted)), *_]):
                    module, _, name = dotted.rpartition(".")
                    yield module, name
                case ast.Call(ast.Attribute(attr="setattr"), [ast.Name(alias), ast.Constant(str(name)), *_]):
                    yield modules.get(alias, ""), name


def test_what_tests_shorten_is_read_when_it_is_used() -> None:
    """A constant as the default of an argument was read when the function was made: a test that sets it waits on."""
    constants = set(shortened())
    assert ("fastworker.edge.embedded", "LOCK_SECONDS_MAX") in constants
    found = [
        f"{path.relative_to(ROOT)}:{default.lineno} {default.id}"
        for path, nodes in product()
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for default in (*node.args.defaults, *node.args.kw_defaults)
        if isinstance(default, ast.Name)
        and (".".join(path.relative_to(ROOT.parent).with_suffix("").parts), default.id) in constants
    ]
    assert found == []


def test_nothing_cites_a_document_that_is_not_here() -> None:
    """Contracts and surveys that a reader cannot open explain nothing."""
    wrong = re.compile(
        r"\b(contract \d|field[- ]survey|predecessor contract, section|design,? section|decisions taken)", re.IGNORECASE
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted([*ROOT.rglob("*.py"), *ROOT.rglob("*.sql")])
        if "migrations" not in path.parts
        for line in path.read_text().splitlines()
        if wrong.search(line)
    ]
    assert found == []


def test_everybody_writes_by_the_operators_rules() -> None:
    """A store opened by defaults would write other rows than the worker does. The demo has no operator, and the resolver
    writes handles alone."""
    defaults = {"commands/demo.py", "sync/resolver.py"}
    for path, nodes in product():
        for call in nodes:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Store.connect":
                rules = {word.arg: ast.unparse(word.value) for word in call.keywords}.get("rules", "")
                place = str(path.relative_to(ROOT))
                assert place in defaults or rules in ("settings.rules", "config.rules", "rules"), place

"""SQL routines of the flush (store/sql): the one statement of what a look, a write and a look back are.

Both forms of a flush use them: step by step (store/flush.py) and as one call (store/whole.py). `fastworker migrate`
installs them each time, so they are not frozen inside a migration. Their names carry a version: a routine whose
arguments or meaning change gets a new one, and the release before it goes on with the old one beside it.

Columns are not listed in the files: `{{columns likes}}` and the like are made from the schema.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from importlib import resources

import msgspec

from fastworker.store import statements
from fastworker.store.schema_admin import KNOWS_FLOORS
from fastworker.table.schema import DERIVED, TABLES, Table

# mutant: a routine is not listed
ORDER = (
    "look",
    "look_back",
    "recount",
    "pay_apart",
    "pay_bucket",
    "put",
    "recompute",
    "pay",
    "put_whole",
)  # a routine comes after those that it uses
_HOT = tuple(table for table in TABLES if table.hot)
_DERIVED = {table.name: table for table in DERIVED}


class Routine(msgspec.Struct, frozen=True):
    """One routine: the name under which it is found, and the SQL that makes it or replaces it."""

    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the SQL in hex; kept as the routine's comment."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def install(self) -> str:
        kind = "PROCEDURE" if "PROCEDURE" in self.sql else "FUNCTION"
        return f"{self.sql}\nCOMMENT ON {kind} fastworker.{self.name} IS 'sha256:{self.checksum}';"


def missing(installed: dict[str, str | None]) -> list[Routine]:
    """Those that are not there, or are not this release's. `installed`: name to comment."""
    # mutant: an installed routine is never replaced
    return [one for one in packaged() if installed.get(one.name) != f"sha256:{one.checksum}"]


@cache
def packaged() -> tuple[Routine, ...]:
    """The routines that this release calls, in the order in which they can be made."""
    folder = resources.files("fastworker.store").joinpath("sql")
    return tuple(_routine(folder.joinpath(f"{name}.sql").read_text("utf-8")) for name in ORDER)


def _routine(template: str) -> Routine:
    sql = re.sub(r"\{\{(\w+)(?: (\w+))?\}\}", _fill, template)
    name = re.search(r"CREATE OR REPLACE (?:FUNCTION|PROCEDURE) fastworker\.(\w+)", sql)
    assert name is not None
    return Routine(name[1], sql)


def _fill(found: re.Match[str]) -> str:
    word, table = found[1], found[2]
    return _OF_TABLE[word](_DERIVED[table]) if table else _WORDS[word]()


def _excluded(table: Table) -> list[str]:
    return [column for column in table.columns if column not in table.key.split(", ")]


def _insert_new(table: Table) -> str:
    """A pair that is taken is not tried: where another flush is removing its row, the insert would wait for it."""
    short = table.name
    same = " AND ".join(f"t.{column} = n.{column}" for column in table.pair)
    free = f" WHERE NOT EXISTS (SELECT FROM public.{short} AS t WHERE {same})" if table.pair else ""
    return f"""
    IF new_{short} IS NOT NULL THEN
        WITH new AS (
            INSERT INTO public.{short} ({", ".join(table.columns)})
            SELECT n.* FROM unnest(new_{short}) AS n{free} ON CONFLICT DO NOTHING RETURNING uri
        ) SELECT array_agg(uri) INTO got FROM new;
        placed := placed || got;
        wanted := wanted + cardinality(new_{short});
    END IF;"""


_OF_TABLE: dict[str, Callable[[Table], str]] = {
    "columns": lambda table: ", ".join(table.columns),
    "set": lambda table: ", ".join(f"{c} = excluded.{c}" for c in _excluded(table)),
    "add": lambda table: ", ".join(f"{c} = greatest(0, t.{c} + excluded.{c})" for c in _excluded(table)),
    "moves": lambda table: " OR ".join(f"excluded.{c} <> 0" for c in _excluded(table)),
}
_WORDS: dict[str, Callable[[], str]] = {
    "beats": lambda: statements.BEATS,
    "counters": lambda: str(statements.COUNTERS),
    "joined": lambda: str(statements.JOINED_PARTS),
    "refused": lambda: statements.REFUSED_ROW,
    "insert_new_rows": lambda: "".join(map(_insert_new, _HOT)).removeprefix("\n"),
    "new_rows_arguments": lambda: "\n    ".join(f"new_{table.name} {table.row_type}[]," for table in _HOT),
    "ours": lambda: str(KNOWS_FLOORS),
    "new_rows_passed": lambda: ", ".join(f"new_{table.name} => new_{table.name}" for table in _HOT),
}

"""Tables against the model: what is read, and how a difference is told.

Columns that depend on when a row was written are left out (`indexed_at` except the posts', `updated_at`,
serial ids, `is_read`, the creation times of aggregates, viewer states, thread contexts and users).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from fastworker.law.model import COLUMNS

Row = dict[str, Any]
Tables = dict[str, list[Row]]

KEYS: dict[str, tuple[str, ...]] = {
    "post_viewer_states": ("post_uri", "viewer_did"),
    "label_events": ("label_uri", "action"),
}
"""Columns that tell rows apart, where it is not the first one."""

WHOLE_ROW = "(row)"
ABSENT = "(absent)"


@dataclass(frozen=True, slots=True)
class Difference:
    """One column that differs, or (`column` is WHOLE_ROW) a row that is on one side only or there twice."""

    table: str
    key: tuple[Any, ...]
    column: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        key = " ".join(str(part) for part in self.key)
        return f"{self.table} {key} {self.column}: expected {_short(self.expected)}, found {_short(self.found)}"


async def dump(conn: asyncpg.Connection[Any] | PoolConnectionProxy[Any], tables: Iterable[str] = COLUMNS) -> Tables:
    """The compared columns of the tables, all of one moment; JSON columns parsed."""
    found: Tables = {}
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        for table in tables:
            statement = await conn.prepare(f"SELECT {', '.join(COLUMNS[table].split())} FROM {table}")
            json_columns = [a.name for a in statement.get_attributes() if a.type.name in {"json", "jsonb"}]
            rows = [dict(record) for record in await statement.fetch()]
            for column in json_columns:
                for row in rows:
                    if isinstance(row[column], str):  # unless the connection has a codec of its own
                        row[column] = json.loads(row[column])
            found[table] = rows
    return found


def diff(expected: Tables, found: Tables) -> list[Difference]:
    """What is not the same, ordered by table and key. Tables and columns that are not expected are not compared."""
    return [difference for table in COLUMNS if table in expected for difference in _diff(table, expected, found)]


def report(differences: list[Difference], limit: int = 20) -> str:
    """For a person: counts by table and column, then examples of as many of those as `limit` lines have room for."""
    if not differences:
        return "no difference"
    kinds = Counter((d.table, d.column) for d in differences)
    lines = [f"{len(differences)} differences"]
    lines += [f"  {count:>8} {table} {column}" for (table, column), count in kinds.most_common()]
    examples = []
    shown: Counter[tuple[str, str]] = Counter()
    for difference in differences:
        kind = (difference.table, difference.column)
        shown[kind] += 1
        if shown[kind] <= max(1, limit // len(kinds)):
            examples.append(str(difference))
    return "\n".join(lines + examples[:limit])


def _diff(table: str, expected: Tables, found: Tables) -> Iterator[Difference]:
    wanted, there = _by_key(table, expected[table]), _by_key(table, found.get(table, []))
    for key in sorted(wanted.keys() | there.keys(), key=repr):
        left, right = wanted.get(key, []), there.get(key, [])
        if len(left) == len(right) == 1:
            row = right[0]
            for column, value in left[0].items():
                other = row[column]
                if value is not other and not same(value, other):
                    yield Difference(table, key, column, value, other)
        elif len(left) != len(right):
            yield Difference(table, key, WHOLE_ROW, _all(left), _all(right))


def _by_key(table: str, rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    columns = KEYS.get(table) or (COLUMNS[table].split()[0],)
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def same(a: Any, b: Any) -> bool:
    """Equality of column values as PostgreSQL's jsonb sees it: 1 is 1.0, but never true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) and isinstance(b, int):  # 1e300 comes back with all its digits
        return Decimal(repr(a)) == b
    return bool(a == b)


def _all(rows: list[Row]) -> Any:
    if not rows:
        return ABSENT
    return rows[0] if len(rows) == 1 else rows


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else text[:300] + "..."

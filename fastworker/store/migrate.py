"""`fastworker migrate`: numbered SQL files, each applied once, all pending ones in one transaction.

A database that the AppView made itself is adopted: 0001 is recorded and nothing in public is touched, provided that
every table, column and unique index that 0001 would have made is there. The SQL files are the only list of those.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

import msgspec

from fastworker.crashpoint import Step, crashpoint
from fastworker.store import routines
from fastworker.store.odd import cures
from fastworker.store.schema_admin import Applied, NotAllowed, Schema, SchemaRefused, open_schema

__all__ = ["Migration", "SchemaRefused", "check", "encoding_problem", "migrate", "packaged"]

CONTRACT = 1  # the migration that is adopted where its tables exist


class Migration(msgspec.Struct, frozen=True):
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


class Expected(msgspec.Struct, frozen=True):
    """What one migration makes of one table: all of it, or columns that it adds."""

    name: str
    columns: dict[str, str]
    uniques: set[frozenset[str]]


@cache
def packaged() -> tuple[Migration, ...]:
    """The migrations that this release knows, in order."""
    files = (
        file for file in resources.files("fastworker.store").joinpath("migrations").iterdir() if file.name[:4].isdigit()
    )
    return tuple(
        Migration(number=int(file.name[:4]), name=file.name.removesuffix(".sql"), sql=file.read_text("utf-8"))
        for file in sorted(files, key=lambda file: file.name)
    )


async def migrate(database_url: str, migrations: Sequence[Migration] | None = None) -> list[str]:
    """Apply what is pending; returns its names. Raises SchemaRefused, and then nothing was changed."""
    known = packaged() if migrations is None else migrations
    async with open_schema(database_url) as admin:
        schema = await admin.read()
        if problem := encoding_problem(schema.encoding):
            raise SchemaRefused(problem)
        if not _pending(known, schema) and not _stale(known, schema):  # also for a role that may not create anything
            _refuse_if_missing(known, schema)
            return []
        async with admin.exclusive():
            schema = await admin.read()  # another process may have been faster
            done = []
            for migration in _pending(known, schema):
                adopted = migration.number == CONTRACT and _is_there(migration, schema)
                if adopted and (missing := _missing(migration, schema)):
                    raise SchemaRefused(_refusal(missing))
                entry = Applied(
                    number=migration.number, name=migration.name, checksum=migration.checksum, adopted=adopted
                )
                await admin.apply(entry, migration.sql)
                crashpoint(Step.IN_MIGRATION)
                done.append(f"{migration.name} (adopted)" if adopted else migration.name)
            for routine in _stale(known, schema):
                await admin.install(routine.install)
                done.append(f"routine {routine.name}")
            _refuse_if_missing(known, await admin.read())
            return done


def _refuse_if_missing(known: Sequence[Migration], schema: Schema) -> None:
    """What no migration makes again, a worker would refuse."""
    if missing := [problem for migration in known for problem in _missing(migration, schema)]:
        raise SchemaRefused(f"All migrations are applied, and yet: {' '.join(missing)}")


def encoding_problem(encoding: str) -> str | None:
    if encoding == "UTF8":
        return None
    return f"The database's encoding is {encoding}: create it with ENCODING 'UTF8'."


async def check(database_url: str, migrations: Sequence[Migration] | None = None) -> list[str]:
    """Every reason why a worker cannot use this database yet, as sentences; changes nothing.

    Raises ConfigError, Unreachable and NotAllowed.
    """
    known = packaged() if migrations is None else migrations
    try:
        async with open_schema(database_url) as admin:
            schema = await admin.read()
        pending = _pending(known, schema)
    except NotAllowed:
        raise
    except SchemaRefused as refusal:
        return [str(refusal)]
    problem = encoding_problem(schema.encoding)
    found = [problem] if problem else []
    found += [f"{migration.name} is not applied: run `fastworker migrate`." for migration in pending]
    if not pending:
        found += [
            f"Routine fastworker.{routine.name} is not this release's: run `fastworker migrate`."
            for routine in _stale(known, schema)
        ]
    for migration in known:
        if migration not in pending or (migration.number == CONTRACT and _is_there(migration, schema)):
            found += _missing(migration, schema)
    return found


def _stale(known: Sequence[Migration], schema: Schema) -> list[routines.Routine]:
    """Routines to install; none for a list of migrations that lacks some of this release's, on which they stand."""
    complete = {one.number for one in packaged()} <= {one.number for one in known}
    return routines.missing(schema.routines) if complete else []


def _pending(known: Sequence[Migration], schema: Schema) -> list[Migration]:
    by_number = {migration.number: migration for migration in known}
    for applied in schema.applied:
        ours = by_number.get(applied.number)
        if ours is None:
            raise SchemaRefused(
                f"The database has migration {applied.name}, which this release does not know: "
                "use the release that made it, or a newer one."
            )
        if ours.checksum != applied.checksum:
            raise SchemaRefused(
                f"Migration {applied.name} of this database is not the one that this release has: "
                "it was made by another build; use that build, or a new database."
            )
    done = {applied.number for applied in schema.applied}
    return [migration for migration in known if migration.number not in done]


def _is_there(migration: Migration, schema: Schema) -> bool:
    return any(table.name in schema.columns for table in _expected(migration.sql))


def _missing(migration: Migration, schema: Schema) -> list[str]:
    expected = _expected(migration.sql)
    found = cures(schema.odd, {table.name: table.columns for table in expected})
    for table in expected:
        columns = schema.columns.get(table.name)
        if columns is None and any(table.name == odd.table and odd.name == "" for odd in schema.odd):
            continue  # something else has its name
        if columns is None:
            found.append(f"Table {table.name} is missing: {_mend(table.name)}.")
            continue
        for column, type_ in table.columns.items():
            if column not in columns:
                found.append(f"Column {table.name}.{column} ({type_}) is missing: {_mend(table.name)}.")
            elif not _holds(columns[column], type_):
                found.append(
                    f"Column {table.name}.{column} is {columns[column]}, expected {type_}: ALTER TABLE {table.name} "
                    f"ALTER COLUMN {column} TYPE {type_}."
                )
        found += [
            f"Table {table.name} has no unique index on ({', '.join(sorted(unique))}): CREATE UNIQUE INDEX "
            f"CONCURRENTLY ON {table.name} ({', '.join(sorted(unique))}); duplicates have to go first."
            for unique in table.uniques - schema.uniques.get(table.name, set())
        ]
    return found


def _mend(table: str) -> str:
    """Who makes what is missing."""
    return "restore it from a backup" if "." in table else "let the AppView make its schema (drizzle-kit push)"


def _holds(actual: str, expected: str) -> bool:
    """Whether every value of the expected type fits: a wider text column is as good, and so is a wider number."""
    if actual == expected or (expected, actual) == ("integer", "bigint"):
        return True
    widths = [re.fullmatch(r"character varying(?:\((\d+)\))?|text", type_) for type_ in (actual, expected)]
    if widths[0] is None or widths[1] is None:
        return False
    have, need = (int(width[1]) if width[1] else None for width in widths if width)
    return have is None or (need is not None and have >= need)


def _refusal(missing: list[str]) -> str:
    return (
        f"This database has tables of the AppView, but {len(missing)} of the things that ingestion needs are not "
        f"there. Mend them, then migrate again. {' '.join(missing)}"
    )


# The SQL files are written for these patterns: one column per line, types without spaces.
_TABLE = re.compile(r"^CREATE TABLE (\S+) \(\n(.*?)\n\)(?: WITH \(.*?\))?;$", re.MULTILINE | re.DOTALL)
_COLUMN = re.compile(r"^    ([a-z]\w*) ([a-z]\S*?)(?=[ ,]|$)(.*)$", re.MULTILINE)
_KEY = re.compile(r"^    PRIMARY KEY \((.*)\)", re.MULTILINE)
_ADDED = re.compile(r"^ALTER TABLE (\S+) ADD COLUMN ([a-z]\w*) ([a-z]\S*?)(?=[ ;])", re.MULTILINE)
_UNIQUE_INDEX = re.compile(r"^CREATE UNIQUE INDEX \S+ ON (\S+) \(([^)]*)\);$", re.MULTILINE)
_SPELLING = {
    "varchar": "character varying",
    "timestamp": "timestamp without time zone",
    "timestamptz": "timestamp with time zone",
    "serial": "integer",
}


def _spelled(type_: str) -> str:
    return re.sub(r"^[a-z]+", lambda m: _SPELLING.get(m[0], m[0]), type_)


@cache
def _expected(sql: str) -> list[Expected]:
    tables = {}
    for name, body in _TABLE.findall(sql):
        found = _COLUMN.findall(body)
        keys = [frozenset(key.split(", ")) for key in _KEY.findall(body)]
        keys += [frozenset({column}) for column, _, rest in found if re.search(r"\b(PRIMARY KEY|UNIQUE)\b", rest)]
        tables[name] = Expected(
            name=name,
            columns={column: _spelled(type_) for column, type_, _ in found},
            uniques=set(keys),
        )
    for name, column, type_ in _ADDED.findall(sql):
        tables.setdefault(name, Expected(name=name, columns={}, uniques=set())).columns[column] = _spelled(type_)
    for name, columns in _UNIQUE_INDEX.findall(sql):
        if name in tables:
            tables[name].uniques.add(frozenset(columns.split(", ")))
    return list(tables.values())

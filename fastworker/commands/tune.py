"""`fastworker migrate --tune`: what makes the tables cheaper to write, for a database that is the operator's to change.

Optional, printed before it is done, remembered, and undone by `--untune`. A storage parameter that somebody else set is
left alone; an index is dropped only when the word `indexes` is given; server settings are advice. docs/tuning.md has
what each does and costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal

import msgspec
from rich.filesize import decimal

from fastworker.errors import ExitCode
from fastworker.store.schema_admin import SchemaRefused
from fastworker.store.tuning import (
    Index,
    Remembered,
    Server,
    Tunable,
    Tuning,
    create_sql,
    drop_sql,
    open_tuning,
    reset_sql,
    set_sql,
)

Extent = Literal["tables", "indexes"]
Say = Callable[[str], None]


class Advice(msgspec.Struct, frozen=True):
    """Storage parameters of some tables. The values are guesses; `scripts/bench end_to_end --tuned` measures them."""

    tables: tuple[str, ...]
    parameters: dict[str, str]
    why: str
    costs: str


STORAGE: Final = (
    Advice(
        ("post_aggregations",),
        {
            "fillfactor": "80",
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_vacuum_cost_limit": "1000",
        },
        "its rows are updated again and again: room on the page keeps the new version of a row beside the old one, and "
        "vacuum comes after 2 % of dead rows, not 20 %",
        "pages that are written from now on are a fifth emptier; vacuum reads and writes more often, and faster",
    ),
    Advice(
        ("post_viewer_states",),
        {
            "fillfactor": "90",
            "autovacuum_vacuum_scale_factor": "0.05",
            "autovacuum_vacuum_insert_scale_factor": "0.05",
            "autovacuum_analyze_scale_factor": "0.02",
            "autovacuum_vacuum_cost_limit": "1000",
        },
        "a repost or an unlike updates a column that no index holds: with room on the page no index is touched",
        "pages that are written from now on are a tenth emptier; vacuum and analyze run more often",
    ),
    Advice(
        ("blocks", "feed_items", "follows", "likes", "list_items", "notifications", "posts", "quotes", "reposts"),
        {
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_vacuum_insert_scale_factor": "0.05",
            "autovacuum_analyze_scale_factor": "0.02",
            "autovacuum_vacuum_cost_limit": "1000",
        },
        "they only grow: after 20 % of all rows vacuum comes ever more rarely, and then has ever more to do at once; "
        "smaller shares keep index-only scans, freezing and the planner's estimates up to date",
        "vacuum and analyze run more often, and their cost limit is not shared out among the autovacuum workers",
    ),
    Advice(
        ("fastworker.recheck",),
        {"autovacuum_vacuum_scale_factor": "0", "autovacuum_vacuum_threshold": "1000"},
        "a queue: every row is deleted soon, and dead rows are read again each time until vacuum comes",
        "vacuum of a small table after each thousand of rows",
    ),
    Advice(
        ("fastworker.versions",),
        {"autovacuum_vacuum_scale_factor": "0.05"},
        "its tombstones are deleted in bulk, and the space is to be used again",
        "vacuum runs more often",
    ),
)
COUNTERS: Final = frozenset({"like_count", "repost_count", "reply_count", "bookmark_count", "quote_count"})
INDEXED: Final = (
    "blocks",
    "bookmarks",
    "feed_items",
    "follows",
    "labels",
    "likes",
    "list_blocks",
    "list_items",
    "notifications",
    "post_aggregations",
    "post_viewer_states",
    "quotes",
    "reposts",
    "verifications",
)
"""Tables whose indexes are looked at: what the worker writes often, and where the contract repeats itself."""
_TABLES: Final = tuple(sorted({table for advice in STORAGE for table in advice.tables} | set(INDEXED)))

NOTE_TABLES: Final = (
    "ALTER TABLE ... SET takes SHARE UPDATE EXCLUSIVE: reads and writes go on, a running VACUUM of the table is waited "
    "for (60 s at most). Rows that are there are not moved."
)
NOTE_INDEXES: Final = (
    "DROP INDEX CONCURRENTLY runs outside a transaction and waits for those that began before it; reads and writes go "
    "on. A drizzle-kit push of the AppView's schema makes the indexes again."
)


class Drop(msgspec.Struct, frozen=True):
    index: Index
    why: str
    costs: str


async def run_tune(database_url: str, extent: Extent | None, say: Say, *, only_check: bool) -> ExitCode:
    """`migrate --tune` and, without an extent, `migrate --untune`. NO: `only_check`, and there is something to do."""
    is_done = True
    if extent is None:
        is_done = await untune(database_url, say, only_check=only_check)
    elif only_check:
        is_done = await report(database_url, extent, say)
    else:
        await tune(database_url, extent, say)
    return ExitCode.DONE if is_done or not only_check else ExitCode.NO


async def report(database_url: str, extent: Extent, say: Say) -> bool:
    """What `tune` would do, and what is in force. True when there is nothing to do."""
    async with open_tuning(database_url) as tuning:
        found = await _read(tuning)
    parameters = _parameters(found)
    drops = _drops(found)
    if parameters:
        say(f"Storage parameters, set by `fastworker migrate --tune`. {NOTE_TABLES}")
        for advice in STORAGE:
            wanted = [table for table in advice.tables if table in parameters]
            for table in wanted:
                say(f"  {set_sql(table, parameters[table])};")
            if wanted:
                say(f"    why: {advice.why}.\n    costs: {advice.costs}.")
    if drops:
        say(f"Indexes, dropped only by `fastworker migrate --tune=indexes`. {NOTE_INDEXES}")
        for drop in drops:
            say(f"  {drop_sql(drop.index.name)};\n    why: {drop.why}.\n    costs: {drop.costs}.")
    for sentence in (*_left_alone(found), *_server(found)):
        say(sentence)
    if found.remembered:
        say(f"{_in_force(found)}; `fastworker migrate --untune` undoes all of it.")
    pending = bool(parameters or (drops and extent == "indexes"))
    if pending and (refusal := _not_allowed(found, parameters, drops if extent == "indexes" else [])):
        say(refusal)
    if not pending:
        say("Nothing to do: tuned." if extent == "indexes" or not drops else "Nothing to do: tables are tuned.")
    return not pending


async def tune(database_url: str, extent: Extent, say: Say) -> None:
    """Apply. Raises SchemaRefused; what was done until then is in force and remembered."""
    async with open_tuning(database_url) as tuning:
        found = await _read(tuning)
        parameters = _parameters(found)
        drops = _drops(found) if extent == "indexes" else []
        if (parameters or drops) and (refusal := _not_allowed(found, parameters, drops)):
            raise SchemaRefused(f"{refusal} Nothing was changed.")
        if parameters:
            await tuning.set_parameters(parameters)
            for table, values in sorted(parameters.items()):
                say(f"applied {set_sql(table, values)}")
        for position, drop in enumerate(drops, 1):
            size = decimal(drop.index.bytes_used)
            say(f"dropping index {position} of {len(drops)}: {drop.index.name} of {drop.index.table} ({size}) ...")
            await tuning.drop_index(drop.index)
            say(f"applied {drop_sql(drop.index.name)}")
        if extent == "tables" and (others := _drops(found)):
            say(
                f"{len(others)} indexes could go: `fastworker migrate --tune=indexes --check` says which, why, and at "
                "what price."
            )
        for sentence in (*_left_alone(found), *_server(found)):
            say(sentence)
        if not parameters and not drops:
            say("Nothing to do: tuned." if extent == "indexes" else "Nothing to do: tables are tuned.")


async def untune(database_url: str, say: Say, *, only_check: bool) -> bool:
    """Undo what is remembered, or say what would be undone. True when there was nothing."""
    async with open_tuning(database_url) as tuning:
        found = await _read(tuning)
        parameters = [change for change in found.remembered if change.kind == "parameter"]
        indexes = [change for change in found.remembered if change.kind == "index"]
        resets: dict[str, list[str]] = {}
        for change in parameters:
            table = found.tables.get(change.table)
            if table is not None and table.parameters.get(change.name) == change.value:  # else it is not ours any more
                resets.setdefault(change.table, []).append(change.name)
        there = {index.name: index for index in found.indexes}
        if only_check:
            for table_name, names in sorted(resets.items()):
                say(f"  {reset_sql(table_name, names)};")
            for change in indexes:
                if change.name not in there or not there[change.name].valid:
                    say(f"  {create_sql(change.value)};")
            say(f"{_in_force(found)}." if found.remembered else "Nothing to undo.")
            return not found.remembered
        if found.remembered and (refusal := _not_allowed(found, resets, indexes)):
            raise SchemaRefused(f"{refusal} Nothing was changed.")
        if parameters:
            await tuning.reset_parameters(resets, parameters)
            for table_name, names in sorted(resets.items()):
                say(f"applied {reset_sql(table_name, names)}")
        for position, change in enumerate(indexes, 1):
            old = there.get(change.name)
            if old is not None and old.valid:  # the AppView made it again
                await tuning.forget(change)
                continue
            say(f"creating index {position} of {len(indexes)}: {change.name} of {change.table} ...")
            await tuning.create_index(change, broken=old is not None)
            say(f"applied {create_sql(change.value)}")
        if found.remembered:
            await tuning.forget_all()
        else:
            say("Nothing to undo.")
        return not found.remembered


async def _read(tuning: Tuning) -> Tunable:
    found = await tuning.read(_TABLES)
    if missing := [table for table in _TABLES if table not in found.tables]:
        raise SchemaRefused(
            f"Table {missing[0]} is missing: run `fastworker migrate` first, then with --tune. Nothing was changed."
        )
    return found


def _parameters(found: Tunable) -> dict[str, dict[str, str]]:
    """What is not set as advised: not set at all, or by an earlier release of ours."""
    ours = {(change.table, change.name): change.value for change in found.remembered if change.kind == "parameter"}
    wanted: dict[str, dict[str, str]] = {}
    for advice in STORAGE:
        for table in advice.tables:
            there = found.tables[table]
            values = {
                name: value
                for name, value in advice.parameters.items()
                if (now := there.parameters.get(name)) is None or (now != value and now == ours.get((table, name)))
            }
            if values and not there.partitioned:
                wanted[table] = values
    return wanted


def _left_alone(found: Tunable) -> Iterator[str]:
    ours = {(change.table, change.name): change.value for change in found.remembered}
    for advice in STORAGE:
        for table in advice.tables:
            there = found.tables[table]
            if there.partitioned:
                yield f"{table} is partitioned: set the parameters on its partitions yourself."
            for name, value in advice.parameters.items():
                now = there.parameters.get(name)
                if now is not None and now not in (value, ours.get((table, name))):
                    yield f"{table}: {name} is {now}, set by somebody else, and stays; the advice is {value}."


def _drops(found: Tunable) -> list[Drop]:
    """Indexes that cost more than they give, each with its reason. Computed from what is there, not from names."""
    drops = []
    remembered = {change.name for change in found.remembered if change.kind == "index"}
    for index in found.indexes:
        if not index.loose or not (index.valid or index.name in remembered):
            continue
        back = "; it was dropped before and is there again" if index.name in remembered else ""
        if index.table == "post_aggregations" and not COUNTERS.isdisjoint(index.columns):
            drops.append(
                Drop(
                    index,
                    "an update of a column that an index holds is not HOT: each counter that changes puts a new entry "
                    f"into every index of the table{back}",
                    f"a query that sorts or filters by {', '.join(index.columns)} reads the whole table "
                    f"({index.scans:,} scans of this index since the statistics began)",
                )
            )
        elif (wider := _wider(index, found.indexes)) is not None:
            drops.append(
                Drop(
                    index,
                    f"{wider.name} ({', '.join(wider.columns)}) begins with the same columns and serves the same "
                    f"look-ups, but each new row enters both{back}",
                    f"look-ups by {', '.join(index.columns)} ({index.scans:,} scans) read {wider.name}, "
                    f"{decimal(wider.bytes_used)} instead of {decimal(index.bytes_used)}",
                )
            )
    return drops


def _wider(index: Index, indexes: list[Index]) -> Index | None:
    """An index that serves every look-up that this one serves; of two equal ones the first by name stays."""
    width = len(index.keys)
    for other in indexes:
        serves = other.table == index.table and other.whole and other.keys[:width] == index.keys
        if serves and (len(other.keys) > width or not other.loose or other.name < index.name):
            return other
    return None


def _server(found: Tunable) -> Iterator[str]:
    for sentence in server_advice(found.server):
        yield f"Advice, never applied: {sentence}"


def server_advice(server: Server) -> Iterator[str]:
    """Which server setting costs what, and what to set. Only said: fastworker changes no server setting."""
    number = {name: value for name, (value, _) in server.settings.items() if isinstance(value, int)}
    shown = {name: text for name, (_, text) in server.settings.items()}
    buffers, of_memory = _quarter(server.memory_bytes, 8 << 30)
    if number.get("shared_buffers", buffers >> 13) << 13 < min(buffers, 1 << 30) * 3 // 4:
        yield (
            f"shared_buffers is {shown['shared_buffers']}: the indexes that every row enters do not fit, and a worker "
            f"slows down as the tables grow (to about half after 200,000 events). Set {_size(buffers)}, {of_memory}; "
            "needs a restart."
        )
    wal, of_disk = _quarter(server.disk_free_bytes, 8 << 30, "free disk")
    if number.get("max_wal_size", wal >> 20) << 20 < min(wal, 4 << 30):
        yield (
            f"max_wal_size is {shown['max_wal_size']}: after so much WAL a checkpoint comes, and after it "
            f"every page is logged whole once more. Set {_size(wal)}, {of_disk}; costs that much disk, and time to "
            "recover after a crash."
        )
    if number.get("checkpoint_timeout", 900) <= 300:
        yield (
            f"checkpoint_timeout is {shown['checkpoint_timeout']}, with the same effect. Set 15min; costs time to "
            "recover after a crash."
        )
    if shown.get("wal_compression") == "off":
        yield ("wal_compression is off: pages that are logged whole are most of the WAL. Set on (or lz4); costs CPU.")


def _quarter(total: int | None, most: int, of: str = "memory") -> tuple[int, str]:
    """A quarter of what the machine has, as a power of two up to `most`, and why."""
    if total is None:
        usual = 1 << 30 if of == "memory" else most
        return usual, f"or more where its machine has four times that {of}"
    quarter = max(total // 4, 128 << 20)
    return min(1 << (quarter.bit_length() - 1), most), f"of this machine's {decimal(total)} of {of}"


def _size(count: int) -> str:
    """As postgresql.conf writes it."""
    return f"{count >> 30}GB" if count >= 1 << 30 else f"{count >> 20}MB"


def _not_allowed(found: Tunable, parameters: Iterable[str], indexes: Sequence[Drop | Remembered]) -> str | None:
    """Why this role cannot change these tables and indexes, in one sentence with the mending."""
    tables = {*parameters, *(one.index.table if isinstance(one, Drop) else one.table for one in indexes)}
    others = sorted(name for name in tables if name in found.tables and not found.tables[name].owned)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        owner = found.tables[others[0]].owner
        return (
            f"The role {found.role} does not own the table {others[0]}{more}, and only an owner may change storage "
            f"parameters and indexes: run it with a DATABASE_URL of {owner} or of a superuser."
        )
    if not found.may_remember:
        return (
            f"The role {found.role} may not keep fastworker.tuning, where changes are remembered so that they can be "
            f"undone: GRANT USAGE, CREATE ON SCHEMA fastworker TO {found.role}, or run it as the role that tuned."
        )
    if indexes and not found.may_index:
        return f"The role {found.role} may not make indexes again: GRANT CREATE ON SCHEMA public TO {found.role}."
    return None


def _in_force(found: Tunable) -> str:
    parameters = sum(change.kind == "parameter" for change in found.remembered)
    return f"In force: {parameters} storage parameters, {len(found.remembered) - parameters} dropped indexes"

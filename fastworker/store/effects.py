"""Derived rows: from what `table.derive.Effects` collected to the arguments of the routines that write them."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from fastworker.store import statements as sql
from fastworker.store.look import Key
from fastworker.store.rows import copy, put
from fastworker.store.session import Connection
from fastworker.store.writer import Writer, columns
from fastworker.table import derive
from fastworker.table.batch import Progress, Row
from fastworker.table.derive import Effects
from fastworker.table.rows import GATE, NOTIFICATION, PROFILE
from fastworker.table.schema import FEED_ITEMS, NOTIFICATIONS, PROFILES, QUOTES, Table

_READ: Final = msgspec.structs.replace(
    NOTIFICATIONS, columns=(*NOTIFICATIONS.columns, "is_read"), types=(*NOTIFICATIONS.types, "boolean")
)


class Owed(NamedTuple):
    """What a main transaction leaves to be done after its commit: joined rows, by its note.

    `is_owing`: there is something to pay, ours or others'.
    """

    joined: set[Key]
    note: int | None
    is_owing: bool


async def write_items(writer: Writer, db: Connection, effects: Effects) -> None:
    """Quotes, feed items, notifications and viewer states collected so far; `effects` forgets them.

    In a large flush, before the locks that others wait for are taken.
    """
    await _copy_items(writer, db, effects)
    if arguments := item_arguments(writer, effects):
        await put(db, arguments)


async def write_effects(
    writer: Writer,
    db: Connection,
    effects: Effects,
    progress: Progress | None = None,
    floors: dict[str, Any] | None = None,
) -> Owed:
    """Everything that follows from the rows; the counters late, because nobody else pays them until the commit.

    Last in the main transaction. Also stores how far the stream is finished. Returns what is owed now: it is paid after
    the commit, when both sides of a join can be seen. `floors`: what the routine is to know of floors.
    """
    if effects.profiles:
        await db.execute(sql.PROFILES, profile_rows(effects))
    await write_gates(db, effects)
    if effects.labels_added:
        await db.execute(sql.LABEL_EVENTS, sorted(effects.labels_added))
    await _copy_items(writer, db, effects)
    arguments = item_arguments(writer, effects) | last_arguments(writer, effects, progress) | (floors or {})
    if not arguments:
        return Owed(set(), None, is_owing=False)
    done = await put(db, arguments)
    # mutant: nothing is owed (2)
    return Owed(effects.owed, done["note"], is_owing=bool(done["is_owing"]))


async def _copy_items(writer: Writer, db: Connection, effects: Effects) -> None:
    """Those of which there are many: what follows from a new record is new."""
    for table, removed, added in _items(effects):
        if writer.copying.may(len(added)):
            keys = [key for key in sorted(added) if key not in removed]
            rows = [added.pop(key) for key in keys]
            if table is NOTIFICATIONS and writer.read_before is not None:
                await copy(writer, db, _READ, [(*row, _is_read(writer, row)) for row in rows])
            else:
                await copy(writer, db, table, rows)


def _is_read(writer: Writer, row: Row) -> bool:
    return writer.read_before is not None and row[NOTIFICATION.created_at] < writer.read_before


def item_arguments(writer: Writer, effects: Effects) -> dict[str, Any]:
    """Arguments of `fastworker.put` for what `write_items` writes; `effects` forgets it."""
    arguments: dict[str, Any] = {}
    if writer.read_before is not None:
        # mutant: history comes in unread
        writer.unread.update(key for key, row in effects.notes_added.items() if _is_read(writer, row))
    for table, removed, added in _items(effects):
        if gone := removed.difference(added):
            arguments["no_" + table.name] = sorted(gone)
        if added:
            arguments["new_" + table.name] = [added[key] for key in sorted(added)]
        removed.clear()
        added.clear()
    if effects.viewers_cleared:
        cleared = [
            (post, viewer, 0 in which, 1 in which, 2 in which)
            for (post, viewer), which in sorted(effects.viewers_cleared.items())
        ]
        arguments.update(zip(sql.UNSEEN, columns(cleared), strict=True))
    states = [(*key, *state) for key, state in sorted(effects.viewers_set.items()) if state != [None, None, False]]
    if states:
        arguments["new_viewers"] = states
    effects.viewers_set.clear()
    effects.viewers_cleared.clear()
    return arguments


def last_arguments(writer: Writer, effects: Effects, progress: Progress | None) -> dict[str, Any]:
    """Arguments of `fastworker.put`: counters, what is owed, how far the group has come."""
    arguments: dict[str, Any] = {}
    # mutant: recount without its lock
    if "counts" in writer.derive and (keys := sorted(effects.counts.keys() | effects.recount)):
        none = [0, 0, 0, 0, 0]  # a recounted key gets no delta: zeros only lock its row
        arguments["deltas"] = [(k, *(none if k in effects.recount else effects.counts[k])) for k in keys]
        arguments["recounts"] = sorted(effects.recount) or None
        arguments.update(zip(sql.COUNTED, writer.counted, strict=True))
    # mutant: nothing is owed
    if effects.owed:
        arguments["owed_kinds"], arguments["owed_keys"] = columns(sorted(effects.owed))
    if progress is not None:
        arguments["of_stream"], arguments["of_consumer"] = progress.stream, progress.consumer
        arguments["until_seq"], arguments["until_entry"] = progress.seq, progress.entry_id
    return arguments


def profile_rows(effects: Effects) -> list[Row]:
    """Rows of the profiles, from which public.users takes its columns; empty ones where a profile is gone. Their key
    does not matter."""
    empty = (None,) * len(PROFILES.columns)
    return [(did, did, *(row or empty)[PROFILE.did + 1 :]) for did, row in sorted(effects.profiles.items())]


def gate_arguments(effects: Effects) -> dict[str, Any]:
    """Arguments of `sql.OF_GATES`: public.thread_gates and public.post_gates by the gates that were set and removed."""
    set_rows = [row for _, row in sorted(effects.gates_set.items())]
    threads = {row[GATE.post_uri]: derive.thread_gate_row(row) for row in set_rows if row[GATE.kind] == "thread"}
    posts = {row[GATE.post_uri]: derive.post_gate_row(row) for row in set_rows if row[GATE.kind] == "post"}
    gone = sorted(effects.gates_removed.items())
    no_thread = [p for p, row in threads.items() if row is None]
    no_thread += [post for uri, post in gone if "/app.bsky.feed.threadgate/" in uri and post not in threads]
    no_post = [post for uri, post in gone if "/app.bsky.feed.postgate/" in uri and post not in posts]
    arguments: dict[str, Any] = {}
    if no_thread:
        arguments["no_thread_gates"] = sorted(no_thread)
    if live := {post: row for post, row in threads.items() if row is not None}:
        arguments.update(zip(sql.THREAD_GATE, _sorted_columns(live), strict=True))
    if no_post:
        arguments["no_post_gates"] = sorted(no_post)
    if posts:
        arguments.update(zip(sql.POST_GATE, _sorted_columns(posts), strict=True))
    return arguments


async def write_gates(db: Connection, effects: Effects) -> None:
    """The rows that follow from gates."""
    if effects.gates_set or effects.gates_removed:
        arguments = gate_arguments(effects)
        for statement, names in sql.OF_GATES:
            if names[0] in arguments:
                await db.execute(statement, *(arguments[name] for name in names))


def _items(effects: Effects) -> tuple[tuple[Table, set[str], dict[str, Row]], ...]:
    """(table, keys removed, rows added)"""
    return (
        (QUOTES, effects.quotes_removed, effects.quotes_added),
        (FEED_ITEMS, effects.feed_removed, effects.feed_added),
        (NOTIFICATIONS, effects.notes_removed, effects.notes_added),
    )


def _sorted_columns(rows: dict[str, Row]) -> list[tuple[Any, ...]]:
    return columns(row for _, row in sorted(rows.items()))

"""A worker's view as the figures of the status page: /status.json."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Final

from fastworker import __version__
from fastworker.monitor.facts import partitions_of, told_workers
from fastworker.monitor.page import Card, Chart, Page, Wait, Worker
from fastworker.monitor.reader_port import cards as reader_cards
from fastworker.monitor.readiness import FRESH_S
from fastworker.monitor.view import Reading, View
from fastworker.sync.told import HistoryStatus, RepairStatus

LONG_S: Final = 60.0  # what waits longer is shown in red
OWED_LONG_S: Final = 10.0  # what is owed for longer
LATE_S: Final = 3_600.0  # a repair that waits longer
TRUE: Final = 0.999
OUTCOME_TITLES: Final = {
    "committed": "committed",
    "nothing_to_store": "nothing to store",
    "set_aside": "set aside",
    "ghosts": "trimmed while pending",
}


def page_of(view: View) -> Page:
    reading = view.reading
    ledger = reading.ledger if reading else {}
    return Page(
        version=__version__,
        service="up" if view.with_reader else "worker",
        at=time.time(),
        uptime_s=view.uptime_s,
        age_s=view.age_s,
        ready=not view.why,
        why=view.why,
        charts=_charts(view.settings.max_stream_len),
        cards=_cards(view, reading) if reading else {},
        waits=_waiting(view, reading) if reading else [],
        processes=view.processes,
        workers=_workers(view.others),
        written=view.written,
        drops={name.removeprefix("drop:"): count for name, count in ledger.items() if name.startswith("drop:")},
        dead_letters=reading.newest_letters if reading else [],
    )


def _cards(view: View, reading: Reading) -> dict[str, list[Card]]:
    settings, ledger, ours, full = view.settings, reading.ledger, view.ours, view.full_s
    length = reading.stream.length if reading.stream else 0
    busy = sum(snapshot.gauges.connections_busy for snapshot in view.workers)
    cards = {
        "Now": [
            Card("finished", view.finished_per_s, "events/s"),
            Card("appended", view.appended_per_s, "events/s"),
            Card("lag", ours.lag, "entries"),
            Card("oldest unfinished", ours.unfinished_s, "s", bad=ours.unfinished_s > LONG_S),
            Card("latency, median", view.median),
            Card("latency, 99 %", view.p99),
            Card("in work", ours.pending, "entries"),
            Card("dead letters", reading.dead_letters, bad=reading.dead_letters > 0),
        ],
        "Stream and connections": [
            Card("stream", length, f"of {settings.max_stream_len:,}", bad=length > 0.8 * settings.max_stream_len),
            Card("stream is full in", full if math.isfinite(full) else "does not grow", "s", bad=full < 3_600),
            Card("stream memory", view.stream_bytes, "bytes"),
            Card("PostgreSQL connections", busy, f"at work, at most {settings.pool_size}"),
        ],
        "Since the stream began": [
            *(
                Card(title, count := ledger.get(name, 0), bad=name == "ghosts" and count > 0)
                for name, title in OUTCOME_TITLES.items()
            ),
            Card("not accounted for", reading.unaccounted, bad=(reading.unaccounted or 0) < 0),
        ],
    }
    if (repair := reading.repair) is not None:
        cards["Equal to the network"] = _repair_cards(repair)
    if (history := reading.history) is not None:
        cards["History"] = _history_cards(history)
    if reading.reader is not None:
        told_s = reading.reader_age_s + view.age_s
        cards["Reader"] = [*reader_cards(reading.reader, None), Card("told", told_s, "s ago", bad=told_s > FRESH_S)]
    return cards


def _repair_cards(repair: RepairStatus) -> list[Card]:
    worst = min(repair.tables.values(), key=lambda one: one.truth, default=None)
    truth = f"{worst.truth:.4%}" if worst is not None else "no sample yet"
    return [
        Card("truth", truth, bad=worst is not None and worst.truth < TRUE),
        Card("sampled", repair.samples, "accounts a day"),
        Card("gaps open", repair.gaps_open, bad=repair.gaps_open > 0),
        Card("repairs waiting", repair.waiting + repair.fetching, bad=repair.oldest_s > LATE_S),
        Card("oldest repair", repair.oldest_s, "s", bad=repair.oldest_s > LATE_S),
        Card("mended", sum(one.differences for one in repair.mended.values()), "rows a day"),
        Card("repairs given up", repair.refused),
    ]


def _history_cards(history: HistoryStatus) -> list[Card]:
    left: float | str = "unknown" if history.open else "done"
    if history.left_s is not None:
        left = history.left_s
    held_back = ", ".join(history.resting) or "none"
    return [
        Card("history done", f"{history.share:.1%}", f"of {history.ended + history.open:,} accounts"),
        Card("accounts open", history.open, "paused" if history.paused else ""),
        Card("history", history.records_per_s, "records/s"),
        Card("history is done in", "paused" if history.paused and history.open else left, "s" if left else ""),
        Card("hosts that hold back", history.resting_hosts, held_back if history.resting else ""),
        Card("accounts given up", history.refused),
    ]


def _waiting(view: View, reading: Reading) -> list[Wait]:
    """What is not done yet, wherever it is, and for how long."""
    waits = []
    for one in view.groups:
        whose = "" if one.group == view.settings.group else f" by {one.group}"
        waits += [
            Wait(f"entries to be taken{whose}", one.lag, one.undelivered_s, bad=one.undelivered_s > LONG_S),
            Wait(f"entries in work{whose}", one.pending, one.pending_s, bad=one.pending_s > LONG_S),
        ]
    partitions = partitions_of(reading.stream, view.settings.group, reading.time_ms)
    if worst := max(partitions, key=lambda one: one.lag_entries, default=None):
        waits.append(Wait(f"of these in {worst.stream}, the most", worst.lag_entries, worst.lag_seconds))
    if reading.reader is not None:
        waits.append(Wait("entries that the reader has to append", reading.reader.outbox_items, None))
    if (debts := view.debts) is not None:
        waits.append(
            Wait("counters and joined rows to be paid", debts.owed, debts.oldest_s, bad=debts.oldest_s > OWED_LONG_S)
        )
        if debts.put_back:
            waits.append(Wait(f"of these put back: {debts.error}", debts.put_back, None, bad=True))
    letters = reading.newest_letters
    oldest = Wait("dead letters, for a person", reading.dead_letters, None, bad=bool(letters))
    return [*waits, oldest]


def _charts(max_stream_len: int) -> tuple[Chart, ...]:
    return (
        Chart(title="Events", unit="/s", lines=("appended", "finished")),
        Chart(title="Latency", unit="ms", band=("median", "99 %")),
        Chart(title="Not finished", unit="entries", lines=("to be taken", "in work")),
        Chart(title="Oldest unfinished", unit="s", lines=("oldest",)),
        Chart(title="Stream", unit="entries", lines=("stream",), limit=max_stream_len),
        Chart(title="Cursor's age", unit="s", lines=("age",)),
    )


def _workers(statuses: Mapping[str, str]) -> list[Worker]:
    found = []
    for told in told_workers(statuses):
        at_work = [one for one in told.processes if one.name.startswith("worker")]
        rate = sum(one.entries_per_s for one in at_work)
        told_s = max(0.0, time.time() - told.at)
        found.append(Worker(told.owner, told.version, told.ready, rate, len(at_work), told_s))
    return found

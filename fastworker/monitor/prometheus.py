"""A worker's view as Prometheus figures (metrics.py says what each means)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from fastworker import __version__, metrics
from fastworker.metrics import Figures
from fastworker.monitor.facts import partitions_of
from fastworker.monitor.reader_port import put_figures
from fastworker.monitor.view import Reading, View, buckets, since_s
from fastworker.process.board import FLUSH_ENTRIES, FLUSH_MS, LATENCY_MS, State, now_ms
from fastworker.sync.told import HistoryStatus, RepairStatus

GROUPS_SHOWN: Final = 20
"""Series of a label that others choose: our group and those with the most lag."""
LABEL_MAX: Final = 100  # characters of it


def figures_of(view: View) -> Figures:
    m, settings, reading = metrics, view.settings, view.reading
    figures = Figures(m.UP_METRICS if view.with_reader else m.WORKER_METRICS)
    figures.set(m.BUILD, 1, __version__)
    figures.set(m.READY, not view.why)
    figures.set(m.CONNECTIONS_MAX, settings.pool_size)
    figures.set(m.STREAM_ENTRIES_MAX, settings.max_stream_len)
    figures.set(m.STREAM_TRIMMED, view.trimmed)
    figures.set(m.REDIS_AGE, view.age_s)
    if reading is not None:
        _of_redis(figures, view, reading)
        if reading.reader is not None and view.with_reader:
            put_figures(figures, reading.reader)
    _of_processes(figures, view)
    return figures


def _of_redis(figures: Figures, view: View, reading: Reading) -> None:
    m, stream, ours = metrics, reading.stream, view.ours
    figures.set(m.DEAD_LETTERS, reading.dead_letters)
    figures.set(m.STREAM_ENTRIES, stream.length if stream else 0)
    figures.set(m.STREAM_FULL_SECONDS, view.full_s)
    if view.stream_bytes is not None:
        figures.set(m.STREAM_BYTES, view.stream_bytes)
    if reading.repair is not None:
        _of_repairs(figures, reading.repair)
    if reading.history is not None:
        _of_history(figures, reading.history)
    for outcome in m.OUTCOMES:
        figures.set(m.ENTRIES, reading.ledger.get(outcome, 0), outcome)
    for reason in m.DROPS.closed:
        figures.set(m.DROPS, reading.ledger.get(f"drop:{reason}", 0), reason)
    for kind in m.KINDS:
        figures.set(m.EVENTS, reading.events.get(kind, 0), kind)
    if reading.unaccounted is not None:
        figures.set(m.UNACCOUNTED, reading.unaccounted)
    for one in sorted(view.groups, key=lambda one: (one.group != ours.group, -one.lag))[:GROUPS_SHOWN]:
        figures.set(m.GROUP_LAG, one.lag, one.group[:LABEL_MAX])
    for partition in partitions_of(stream, ours.group, reading.time_ms):
        figures.set(m.PARTITION_LAG, partition.lag_entries, partition.stream[-LABEL_MAX:])
    figures.set(m.LAG_ENTRIES, ours.lag)
    figures.set(m.LAG_SECONDS, ours.unfinished_s)
    figures.set(m.PENDING, ours.pending)
    figures.set(m.PENDING_AGE, ours.pending_s)


def _of_repairs(figures: Figures, repair: RepairStatus) -> None:
    m = metrics
    figures.set(m.GAPS_OPEN, repair.gaps_open)
    figures.set(m.REPAIRS_WAITING, repair.waiting + repair.fetching)
    figures.set(m.REPAIR_OLDEST, repair.oldest_s)
    figures.set(m.REPAIRS_REFUSED, repair.refused)
    for reason, one in repair.mended.items():
        figures.set(m.REPAIRS_MENDED, one.differences, reason[:LABEL_MAX])
    figures.set(m.TRUTH_SAMPLES, repair.samples)
    for table, truth in repair.tables.items():
        figures.set(m.TRUTH, truth.truth, table)
        figures.set(m.TRUTH_LOW, truth.low, table)


def _of_history(figures: Figures, history: HistoryStatus) -> None:
    m = metrics
    for state in ("waiting", "fetching", "done", "gone", "refused"):
        figures.set(m.HISTORY_ACCOUNTS, getattr(history, state), state)
    figures.set(m.HISTORY_ACCOUNTS_RATE, history.accounts_per_s)
    figures.set(m.HISTORY_RECORDS_RATE, history.records_per_s)
    figures.set(m.HISTORY_BYTES_RATE, history.bytes_per_s)
    if history.left_s is not None or not history.open:
        figures.set(m.HISTORY_LEFT, history.left_s or 0.0)
    figures.set(m.HISTORY_RESTING, history.resting_hosts)
    figures.set(m.HISTORY_PAUSED, history.paused)


def _of_processes(figures: Figures, view: View) -> None:
    m, now = metrics, now_ms()
    workers = view.workers
    states = [State(snapshot.gauges.state).name.lower() for snapshot in workers]
    for state in State:
        if state is not State.FREE:
            figures.set(m.PROCESSES, states.count(state.name.lower()), state.name.lower())
    for snapshot in workers:
        gauges, name = snapshot.gauges, snapshot.name
        figures.set(m.LAST_FLUSH, gauges.flush_us_last / 1e6, name)
        figures.set(m.UNSETTLED_AGE, since_s(gauges.oldest_ms, now), name)
        figures.set(m.PROGRESS_AGE, since_s(gauges.progress_ms, now), name)
        figures.set(m.HELD, gauges.held, name)
        if gauges.store_ms:
            figures.set(m.STORE_AGE, since_s(gauges.store_ms, now), name)
    figures.set(m.CONNECTIONS, sum(snapshot.gauges.connections for snapshot in workers), "open")
    figures.set(m.CONNECTIONS, sum(snapshot.gauges.connections_busy for snapshot in workers), "busy")
    names = {snapshot.gauges.pid: snapshot.name for snapshot in view.children} | {os.getppid(): "supervisor"}
    for pid, size in view.memory.items():
        if pid in names:
            figures.set(m.MEMORY, size, names[pid])
    if view.debts is not None:
        figures.set(m.DEBTS, view.debts.owed)
        figures.set(m.DEBT_AGE, view.debts.oldest_s)
        figures.set(m.DEBTS_PUT_BACK, view.debts.put_back)
    everybody = view.everybody
    counters = [snapshot.counters for snapshot in everybody]
    figures.set(m.RESTARTS, sum(counter.restarts for counter in counters))
    figures.set(m.REPLACED, sum(counter.replaced for counter in counters))
    figures.set(m.ROWS, sum(counter.rows for counter in counters))
    figures.set(m.SUPERSEDED, sum(counter.superseded for counter in counters))
    figures.set(m.CLAIMED, sum(counter.claimed for counter in counters))
    figures.set(m.RETRIES, sum(counter.store_retries for counter in counters), "postgresql")
    figures.set(m.RETRIES, sum(counter.stream_retries for counter in counters), "redis")
    for table in m.CHANGES.closed:
        figures.set(m.CHANGES, sum(snapshot.tables.get(table, 0) for snapshot in everybody), table)
    figures.set(m.RETRIES, sum(counter.conflicts for counter in counters), "conflict")
    total_ms = sum(counter.latency_ms_total for counter in counters)
    figures.distribute(m.LATENCY, _seconds(LATENCY_MS), buckets(everybody, "latency_ms"), total_ms / 1e3)
    total_us = sum(counter.flush_us_total for counter in counters)
    figures.distribute(m.FLUSH_SECONDS, _seconds(FLUSH_MS), buckets(everybody, "flush_ms"), total_us / 1e6)
    total = sum(counter.flush_entries_total for counter in counters)
    figures.distribute(m.FLUSH_ENTRIES, FLUSH_ENTRIES, buckets(everybody, "flush_entries"), total)


def _seconds(bounds_ms: Sequence[int]) -> list[float]:
    return [ms / 1000 for ms in bounds_ms]

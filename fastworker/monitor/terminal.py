"""`Status` for people, in 80 columns."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastworker.monitor.facts import DebtStatus, Status
from fastworker.sync.told import HistoryStatus, RepairStatus

OWED_LONG_S: Final = 10.0  # what is owed for longer is shown
TREND: Final = 44  # looks shown as a line
BAR: Final = 20  # characters of a bar
_BARS: Final = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


class Trend(msgspec.Struct):
    """What the live view has seen, look by look: entries per second in and out, entries not finished."""

    appended: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=TREND))
    finished: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=TREND))
    waiting: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=TREND))

    def add(self, status: Status) -> None:
        self.appended.append(status.appended_per_s or 0.0)
        self.finished.append(status.finished_per_s or 0.0)
        self.waiting.append(status.lag_entries + status.pending_entries)


def render(status: Status, trend: Trend | None = None) -> RenderableType:
    """With `trend`: the live view, with a heading and lines."""
    parts: list[RenderableType] = [_overview(status)]
    if trend is not None:
        parts = [_heading(status), Text(), *parts, *_lines(trend)]
    if status.workers:
        parts.append(_processes(status))
    else:
        parts.append(Text("No fastworker worker reported within the last seconds.", style="yellow"))
    if len(status.groups) > 1:
        parts.append(_groups(status))
    if written := _written(status):
        parts.append(Text(f"Changes/s: {written}"))
    if drops := [f"{name} {count:,}" for name, count in sorted(status.drops.items()) if count]:
        parts.append(Text("Drops: " + ", ".join(drops)))
    for process in (process for worker in status.workers for process in worker.processes if process.error):
        age = "" if process.error_age_s is None else f", {_seconds(process.error_age_s)} ago"
        parts.append(Text(f"{process.name}{age}: {process.error}", style="red"))
    if status.reader.error:
        parts.append(Text(f"reader: {status.reader.error}", style="red"))
    return Group(*parts)


def _heading(status: Status) -> RenderableType:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.at))
    is_well = bool(status.workers) and all(worker.ready for worker in status.workers) and status.reader.connected
    state = Text("well", style="green") if is_well else Text("not well", style="bold red")
    return Text.assemble(
        ("fastworker status", "bold"), f" {status.version}  {clock}  ", state, f"  {status.stream_key}"
    )


def _lines(trend: Trend) -> Iterator[RenderableType]:
    """The last looks as bars, each with its name, its newest value and its highest one."""
    for name, values in (("in/s", trend.appended), ("out/s", trend.finished), ("waiting", trend.waiting)):
        if values:
            yield Text(f"{name:<8} {_line(values):<{TREND}} {values[-1]:>7,.0f}, max {max(values):,.0f}")


def _written(status: Status) -> str:
    """By table, all workers together, the busiest first."""
    rates: dict[str, float] = {}
    for worker in status.workers:
        for table, per_s in worker.written_per_s.items():
            rates[table] = rates.get(table, 0.0) + per_s
    busiest = sorted(rates.items(), key=lambda one: one[1], reverse=True)
    return ", ".join(f"{table} {per_s:,.1f}" for table, per_s in busiest if per_s >= 0.05)


def _repairs(repair: RepairStatus | None) -> Text:
    if repair is None:
        return Text()
    waiting = repair.waiting + repair.fetching
    words = f"{waiting:,} waiting" + (f", oldest {_seconds(repair.oldest_s)}" if waiting else "")
    words += f", {repair.gaps_open:,} gaps open" if repair.gaps_open else ""
    if repair.tables:
        name, worst = min(repair.tables.items(), key=lambda one: one[1].truth)
        words += f"; truth {worst.truth:.4%} or more ({name}), {repair.samples:,} accounts sampled"
    if repair.error:
        words += f"; waits: {repair.error}"
    return Text(words, style="yellow" if repair.gaps_open or repair.error else "")


def history_words(history: HistoryStatus) -> Text:
    """A bar, then how far it is, how fast, and what holds it back."""
    full = int(history.share * BAR)
    words = f"{'█' * full}{'░' * (BAR - full)} {history.share:.1%}, {history.ended:,} of "
    words += f"{history.ended + history.open:,} accounts, {history.records:,} records"
    words += f", {history.refused:,} refused" if history.refused else ""
    if history.open:
        words += f"; {history.accounts_per_s:,.1f} accounts/s, {history.records_per_s:,.0f} records/s"
        words += "" if history.left_s is None else f", {_seconds(history.left_s)} left"
        words += "; lists of accounts are still being read" if history.lists_open else ""
        words += "; PAUSED" if history.paused else ""
        if history.resting:
            few = ", ".join(f"{host} ({_seconds(seconds)})" for host, seconds in list(history.resting.items())[:3])
            more = history.resting_hosts - 3
            words += f"; holding back: {few}" + (f" and {more:,} more" if more > 0 else "")
    return Text(words, style="yellow" if history.open and history.paused else "")


def _debts(debts: DebtStatus | None) -> Text:
    """Empty while all is paid in time."""
    if debts is None or (debts.oldest_s <= OWED_LONG_S and not debts.put_back):
        return Text()
    words = f"{debts.owed:,} counters and joined rows, oldest {_seconds(debts.oldest_s)}"
    words += f"; {debts.put_back:,} put back: {debts.error}" if debts.put_back else ""
    return Text(words, style="yellow")


def _overview(status: Status) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    reader = status.reader
    if reader.connected:
        age = "" if reader.frame_age_s is None else f", last frame {_seconds(reader.frame_age_s)} ago"
        style = "yellow" if reader.silent else ""
        table.add_row("reader", Text(f"connected to {reader.url.partition('/xrpc/')[0]}{age}", style=style))
    else:
        table.add_row("reader", Text("not connected" if reader.running else "not running", style="yellow"))
    behind = "" if reader.cursor_age_s is None else f" ({_seconds(reader.cursor_age_s)} old)"
    cursor = f"cursor {reader.cursor or 'none'}{behind}, {reader.reconnects} reconnects, {reader.gaps} gaps"
    table.add_row("", cursor + (", WAITS FOR ROOM" if reader.waits_for_room else ""))
    for gap in reader.newest_gaps:
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(gap.at))
        after = "where it was" if gap.after is None else f"{gap.after}"
        table.add_row("gap", Text(f"{day} UTC {gap.relay}: {after} to {gap.resumed}, {gap.reason}", style="yellow"))
    history = Text() if status.history is None else history_words(status.history)
    for name, words in (("repairs", _repairs(status.repair)), ("owed", _debts(status.debts)), ("history", history)):
        if words:
            table.add_row(name, words)
    share = 100 * status.stream_entries / status.stream_entries_max
    size = "" if status.stream_bytes is None else f", {_bytes(status.stream_bytes)}"
    table.add_row("stream", f"{status.stream_entries:,} entries ({share:.0f} % of the limit){size}")
    if fulls := [worker.stream_full_s for worker in status.workers if worker.stream_full_s is not None]:
        full = min(fulls)
        table.add_row("", Text(f"full in {_seconds(full)} if it goes on so", style="yellow" if full < 3600 else ""))
    if status.held_by is not None and status.held_by != status.group:
        table.add_row("", Text(f"held back by group {status.held_by}", style="yellow"))
    about = "" if status.lag_is_exact else "about "
    table.add_row("lag", f"{about}{status.lag_entries:,} entries, {_seconds(status.lag_seconds)}")
    if status.partitions:
        worst = max(status.partitions, key=lambda one: (one.lag_entries, one.lag_seconds))
        much = f"most in {worst.stream}: {worst.lag_entries:,} entries, {_seconds(worst.lag_seconds)}"
        table.add_row("partitions", f"{len(status.partitions)}, {much}")
    table.add_row("pending", f"{status.pending_entries:,} entries, oldest {_seconds(status.oldest_pending_seconds)}")
    table.add_row("rate", f"{_rate(status.appended_per_s)} in, {_rate(status.finished_per_s)} out")
    ledger = status.ledger
    table.add_row(
        "finished",
        f"{ledger['committed']:,} committed, {ledger['nothing_to_store']:,} nothing to store, "
        f"{ledger['set_aside']:,} set aside",
    )
    if status.unaccounted_entries is None:
        balance = Text("ledger not comparable on this server")
    elif status.unaccounted_entries == 0:
        balance = Text("ledger balances", style="green")
    else:
        others = "entries were acked by others, or left the pending list without an ack (XGROUP)"
        if status.unaccounted_entries < 0:
            others = "entries were finished that this stream did not give: it was replaced, or its group was moved"
        balance = Text(f"{status.unaccounted_entries:+,} {others}", style="yellow")
    table.add_row("", balance)
    table.add_row("dead letters", Text(f"{status.dead_letters:,}", style="red" if status.dead_letters else ""))
    limit = f" of {_bytes(status.redis_maxmemory_bytes)}" if status.redis_maxmemory_bytes else ""
    table.add_row("redis", f"{status.redis_version}, {_bytes(status.redis_memory_bytes)}{limit}")
    return table


def _processes(status: Status) -> RenderableType:
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    for name in ("process", "state"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in ("events/s", "entries", "flush ms", "oldest", "memory", "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in status.workers:
        style = "" if worker.ready else "yellow"
        why = "" if worker.ready else f" ({'; '.join(worker.why)})"
        parts = f"{worker.connections_open} PostgreSQL connections, at most {worker.connections_max}"
        table.add_row(Text(worker.owner, style="bold"), Text(("ready" if worker.ready else "not ready"), style=style))
        for process in worker.processes:
            table.add_row(
                f" {process.name}",
                process.state,
                f"{process.entries_per_s:,.0f}",
                f"{process.entries:,}",
                f"{process.flush_ms:,.0f}",
                _seconds(process.oldest_unflushed_s),
                "" if process.memory_bytes is None else _bytes(process.memory_bytes),
                str(process.restarts),
            )
        table.caption = f"{parts}{why}"
        table.caption_justify = "left"
    return table


def _groups(status: Status) -> RenderableType:
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    table.add_column("group", no_wrap=True, overflow="ellipsis")
    for name in ("consumers", "lag", "pending"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in status.groups:
        table.add_row(group.name, str(group.consumers), f"{group.lag_entries:,}", f"{group.pending_entries:,}")
    return table


def _line(values: Sequence[float]) -> str:
    """The values as bars, the highest one full."""
    high = max(*values, 1.0)
    return "".join(_BARS[min(len(_BARS) - 1, int(value / high * len(_BARS)))] for value in values)


def _rate(per_s: float | None) -> str:
    return "unknown" if per_s is None else f"{per_s:,.0f}/s"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.0f} d"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GB"

"""`fastworker backfill`: the history of chosen accounts from their hosts, beside the live stream (sync/many.py)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from yarl import URL

from fastworker.config import Config
from fastworker.errors import ExitCode, Unreachable
from fastworker.monitor.terminal import history_words
from fastworker.store.repos import CHOSEN, EVERYBODY
from fastworker.store.sizes import row_bytes
from fastworker.sync.choice import REASON, Choice, all_hosts, feed_of, known, pieces_of
from fastworker.sync.history import TRIES
from fastworker.sync.hosts import HostError, Hosts, without_port
from fastworker.sync.lists import relay_of
from fastworker.sync.many import Scene, Work, opened, settle_all
from fastworker.sync.progress import history_status
from fastworker.sync.report import Report, duration
from fastworker.table.chosen import is_account_left_out

RECORDS: Final = 435  # of an account of the network, on average
CAR_BYTES: Final = 160_000
KNOWN_MIN: Final = 20
"""Of fewer accounts nothing is reckoned for others."""
HOSTS_SHOWN: Final = 10
WRITES_S: Final = 8_000.0  # records that one process compares and writes in a second


async def backfill(config: Config, choice: Choice, stop: asyncio.Event, *, hosts: Hosts | None = None) -> ExitCode:
    """DONE: everybody who was chosen is settled. What others have put into the queue is worked on, too."""
    choice.check()
    report = Report(dry_run=False)
    async with opened(config, "backfill", hosts, reads_only=False) as scene:
        work = Work(priority_max=EVERYBODY, tries=TRIES)
        return await settle_all(scene, report, work, stop, feed=feed_of(scene, choice, report))


# Before it begins, and beside it ------------------------------------------------------------------


async def estimate(config: Config, choice: Choice, *, hosts: Hosts | None = None) -> ExitCode:
    """What the choice would cost, by what is known. Reads lists, fetches no repository, stores nothing."""
    choice.check()
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        by_host = await _count(scene, choice)
        expected = _expected(by_host, Counter(dict(await scene.queue.rows(_KNOWN_HOSTS))))
        done = (
            await scene.queue.rows(
                "SELECT count(*), avg(records)::float8, avg(bytes)::float8 FROM fastworker.repos WHERE state = 'done'"
            )
        )[0]
        accounts, requests = by_host.total(), expected + Counter({URL(config.plc_url).authority: by_host.total()})
        # Turns are evenly spaced, and the first comes at once.
        seconds = {host: (many - 1) / scene.hosts.rate(host) for host, many in requests.items() if host}
        disk = await row_bytes(scene.queue.rows)
        rates = {host: scene.hosts.rate(host) for host in seconds}
    is_known = done[0] >= KNOWN_MIN
    records, size = (done[1], done[2]) if is_known else (RECORDS, CAR_BYTES)
    rows = accounts * records
    by_hosts, by_rows = max(seconds.values(), default=0.0), rows / WRITES_S / config.backfill_share
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"accounts  {accounts:,}\n"
        f"to fetch  {_size(accounts * size)}\n"
        f"rows      {rows:,.0f}\n"
        f"disk      {_size(rows * disk)} in PostgreSQL, with all indexes\n"
        f"time      {duration(max(by_hosts, by_rows))}: {duration(by_hosts)} for the hosts, {duration(by_rows)} for "
        f"one process to compare and write in {config.backfill_share:.0%} of its time\n"
        + (
            f"By the average of {done[0]:,} accounts that were fetched: {records:,.0f} records, {size:,.0f} bytes."
            if is_known
            else f"By the network's average: {records:,} records and {size:,} bytes an account."
        )
    )
    _show_hosts(console, requests, rates, seconds)
    return ExitCode.DONE


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e10 else f"{count / 1e6:,.1f} MB"


def _show_hosts(console: Console, requests: Counter[str], rates: dict[str, float], seconds: dict[str, float]) -> None:
    """Those that take longest. Where nobody has asked for an account's document, its host is not known."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("host", "requests", "a second", "takes"):
        grid.add_column(name, justify="left" if name == "host" else "right", no_wrap=True)
    longest = sorted(seconds, key=lambda host: -seconds[host])
    for host in longest[:HOSTS_SHOWN]:
        grid.add_row(without_port(host), f"{requests[host]:,}", f"at most {rates[host]:g}", duration(seconds[host]))
    if unknown := requests[""]:
        grid.add_row("not known yet", f"{unknown:,}", "", "")
    console.print(grid)
    if len(longest) > HOSTS_SHOWN:
        console.print(f"and {len(longest) - HOSTS_SHOWN:,} more hosts, each in less time")


def _expected(by_host: Counter[str], known_hosts: Counter[str]) -> Counter[str]:
    """Accounts whose host is not known are spread over hosts as all those are whose host is known."""
    every = known_hosts.total()
    if not by_host[""] or every < KNOWN_MIN:
        return by_host
    spread = Counter({host: round(by_host[""] * many / every) for host, many in known_hosts.items()})
    return by_host + spread - Counter({"": by_host[""]})


async def _count(scene: Scene, choice: Choice) -> Counter[str]:
    """Accounts by host, as in a URL; those whose host nobody has asked for are at ''. Who is chosen in several ways
    counts once: of millions only a hash is remembered."""
    if choice.everybody:  # the others are among them
        return Counter({_of_list(scene, one.hostname): one.accountCount or 0 async for one in all_hosts(scene)})
    found: Counter[str] = Counter()
    seen: set[int] = set()
    async for host, dids in _chosen(scene, choice):
        new = [did for did in dict.fromkeys(dids) if hash(did) not in seen and not is_account_left_out(did)]
        seen.update(map(hash, new))
        found += await _by_host(scene, new) if host is None else Counter({_of_list(scene, host): len(new)})
    return found


async def _chosen(scene: Scene, choice: Choice) -> AsyncIterator[tuple[str | None, list[str]]]:
    """Those that `sync/choice.py` queues, and their host where a list of it names them."""
    if choice.host is not None:
        async for dids in _listed(scene, scene.hosts.origin(choice.host)):
            yield choice.host, dids
    if choice.dids is not None:
        for dids in pieces_of(choice.dids):
            yield None, dids
    if choice.known:
        async for dids in known(scene.queue):
            yield None, dids
    if choice.follows_of:
        level, seen = list(choice.follows_of), set(choice.follows_of)
        yield None, level
        for _ in range(choice.depth):
            level = [did for did in await scene.queue.followed(level) if did not in seen]
            seen.update(level)
            yield None, level
    for collection in choice.collection:
        async for dids in _listed(scene, relay_of(scene.config.relay_urls[0]), collection):
            yield None, dids


def _of_list(scene: Scene, hostname: str) -> str:
    return URL(scene.hosts.origin(hostname)).authority


async def _by_host(scene: Scene, dids: list[str]) -> Counter[str]:
    return Counter({row[0]: row[1] for row in await scene.queue.rows(_HOSTS, dids)})


async def _listed(scene: Scene, source: str, collection: str | None = None) -> AsyncIterator[list[str]]:
    """The accounts of a list."""
    cursor = None
    while True:
        try:
            if collection is None:
                repos, cursor = await scene.hosts.list_repos(source, cursor)
            else:
                repos, cursor = await scene.hosts.list_collection(source, collection, cursor)
        except HostError as error:
            raise Unreachable(f"the list of accounts cannot be read: {error}") from error
        yield [one.did for one in repos]
        if cursor is None or not repos:
            return


_HOSTS: Final = """
SELECT coalesce(r.host, ''), count(*) FROM unnest($1::varchar[]) AS d (did)
LEFT JOIN fastworker.repos AS r ON r.did = d.did GROUP BY 1
"""
_KNOWN_HOSTS: Final = "SELECT host, count(*) FROM fastworker.repos WHERE host <> '' GROUP BY host"
_STATES: Final = """
SELECT reason, count(*) FILTER (WHERE state = 'waiting'), count(*) FILTER (WHERE state = 'fetching'),
    count(*) FILTER (WHERE state = 'done'), count(*) FILTER (WHERE state = 'gone'),
    count(*) FILTER (WHERE state = 'refused'), coalesce(sum(records), 0)::bigint, coalesce(sum(differences), 0)::bigint
FROM fastworker.repos GROUP BY reason ORDER BY reason
"""
_GAPS: Final = """
SELECT g.relay, g.from_seq, g.to_seq, g.seen_at, (
    SELECT count(*) FROM fastworker.repos AS r
    WHERE r.sweep = g.sweep AND r.state IN ('waiting', 'fetching', 'refused')) AS left, s.done_at IS NOT NULL AS is_read
FROM fastworker.gaps AS g LEFT JOIN fastworker.sweeps AS s ON s.id = g.sweep
WHERE g.closed_at IS NULL ORDER BY g.seen_at
"""


async def show(config: Config, *, hosts: Hosts | None = None) -> ExitCode:
    """What waits, what is done, how fast, who holds it back, and which gaps are open."""
    console = Console(highlight=False, soft_wrap=True)
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        states = await scene.queue.rows(_STATES)
        history = await history_status(scene.queue)
        gaps = await scene.queue.rows(_GAPS)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    names = ("queued by", "waiting", "fetching", "done", "gone", "refused", "records", "differences")
    for name in names:
        grid.add_column(name, justify="left" if name == names[0] else "right", no_wrap=True)
    for row in states:
        grid.add_row(row[0], *(f"{cell:,}" if cell else "" for cell in tuple(row)[1:]))
    console.print(grid if states else "Nothing was ever queued.")
    if history.open or history.ended:
        console.print(history_words(history))
    if history.paused:
        console.print("History is paused: `fastworker backfill --resume` lets it go on.")
    for gap in gaps:
        console.print(_gap_words(gap), markup=False)
    return ExitCode.DONE


def _gap_words(gap: Any) -> str:
    words = f"Open gap of {gap['relay']}, seq {gap['from_seq']} to {gap['to_seq']}: "
    if gap["left"]:
        return words + f"{gap['left']:,} accounts are left."
    return words + ("its repairs are done." if gap["is_read"] else "run `fastworker repair --gap`.")


async def cancel(config: Config, *, hosts: Hosts | None = None) -> ExitCode:
    """Forget what a backfill has queued and not begun. Running ones end when nothing is left."""
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        await scene.queue.execute(
            "UPDATE fastworker.sweeps SET done_at = now() WHERE done_at IS NULL AND reason = $1", REASON
        )
        tag = await scene.queue.execute(
            "DELETE FROM fastworker.repos WHERE state = 'waiting' AND priority >= $1", CHOSEN
        )
    Console(highlight=False).print(f"{int(tag.rpartition(' ')[2]):,} accounts are not fetched any more.")
    return ExitCode.DONE


async def pause(config: Config, *, is_paused: bool, hosts: Hosts | None = None) -> ExitCode:
    """History waits, on every host, until it is told to go on. Repairs do not."""
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        await scene.queue.execute("UPDATE fastworker.backfill SET is_paused = $1", is_paused)
    words = "History waits. `fastworker backfill --resume` lets it go on." if is_paused else "History goes on."
    Console(highlight=False).print(words)
    return ExitCode.DONE

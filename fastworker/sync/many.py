"""Many accounts made equal to their repositories: the one engine of repair, backfill and sampling.

For each: S0 is the reader's cursor before the request, so everything up to S0 happened before the snapshot. The
repository is fetched and checked (sync/fetch.py). Then the worker must have finished what was on the stream when S0
was read; what comes later is newer, or its version is lower and the writer sees that. Then only the differences are
written (sync/settle.py). What waits, and who works on it, is in PostgreSQL (store/repos.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, StreamUnavailable, Unreachable, first_of
from fastworker.event.repository import Repository
from fastworker.store.chosen_accounts import keep_reading, read_accounts
from fastworker.store.migrate import check as check_schema
from fastworker.store.repos import (
    AGAIN_S,
    CHOSEN,
    RENEW_S,
    Claim,
    Left,
    Listed,
    Queue,
    open_queue,
)
from fastworker.store.store import Store
from fastworker.store.stored import Stored, open_stored
from fastworker.stream.admin import RedisAdmin, age_s, open_redis
from fastworker.stream.consumer import FOREIGN_IDLE_MS
from fastworker.stream.repairs import cursor_relay
from fastworker.sync.fetch import NotFetched, Refusal, document_of, fetched
from fastworker.sync.hosts import HostError, Hosts, handle_in, pds_of
from fastworker.sync.progress import Teller
from fastworker.sync.report import Report, unless_stopped
from fastworker.sync.settle import FLUSH_BESIDE, SMALL_BYTES, Job, Settle, Settled
from fastworker.sync.status import Word
from fastworker.table.snapshot import Snapshot

LOOK_S: Final = 0.3
COUNT_S: Final = 2.0
"""What is left in the queue is counted no more often, while there is work: it may be millions."""
STALL_S: Final = 120.0  # without progress of the worker
LIVE_S: Final = 2.0
"""While the oldest unfinished entry is older, history waits."""
LIVE_PAUSE_S: Final = 10.0  # but never longer than this before one batch
LARGE: Final = "fastworker-large"  # the session that writes a large account
_SPOOL: Final = "fastworker-repositories-"
_PASSING: Final = frozenset((Refusal.UNREACHABLE, Refusal.BAD_CAR, Refusal.BAD_ANSWER, Refusal.NO_SPACE, Refusal.STALE))
_GONE: Final = frozenset((Refusal.GONE,))


class Mark(NamedTuple):
    """Where reader and stream were before a request."""

    seq: int
    entry_id: str
    at: datetime


class Waiting(Protocol):
    async def claim(self, many: int, priority_max: int) -> list[Claim]: ...
    async def moved(self, did: str, host: str) -> bool: ...
    async def done(self, did: str, rev: str, seq: int, records: int, size: int, differences: int) -> None: ...
    async def ended(self, did: str, state: str, error: str) -> None: ...
    async def again(self, did: str, seconds: float, error: str, *, spends: bool) -> None: ...
    async def renew(self) -> None: ...
    async def give_back(self) -> None: ...
    async def left(self, priority_max: int) -> Left: ...


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """`tries`: after so many failures of the passing kind an account is refused. `priority_max`: the lowest class that
    is worked on. `accept_older`: also repositories that are older than what is stored. `waits`: also for those that
    may not be tried yet."""

    priority_max: int
    tries: int = 1
    accept_older: bool = False
    waits: bool = True


class Live:
    """The stream beside which all this happens."""

    def __init__(self, admin: RedisAdmin, config: Config) -> None:
        self._admin = admin
        self._config = config
        self._looked = float("-inf")
        self._unfinished: str | None = None
        self._one = asyncio.Lock()

    async def mark(self) -> Mark:
        """The cursor first: what it covers was appended with it."""
        text = await self._admin.cursor(self._config.cursor_key)
        if text is None or not text.isdecimal():
            raise Unreachable(f"{self._config.cursor_key} holds no cursor: start `fastworker reader` first")
        stream = await self._admin.stream()
        last_id = "0-0" if stream is None else stream.last_id
        return Mark(int(text), last_id, datetime.now(UTC).replace(tzinfo=None))

    async def relay(self) -> str | None:
        """Whose the cursor is."""
        return await cursor_relay(self._admin)

    async def finished(self, mark: Mark) -> None:
        """Wait until the group has finished everything that was on the stream before the request."""
        last, since, asked = "", time.monotonic(), time.monotonic()
        while True:
            unfinished = await self._oldest(asked)
            if unfinished is None or _order(unfinished) > _order(mark.entry_id):
                return
            if unfinished != last:
                last, since = unfinished, time.monotonic()
            elif time.monotonic() - since > STALL_S:
                raise Unreachable(f"the worker has not finished entry {unfinished} for {STALL_S:.0f} s: is it running?")
            await asyncio.sleep(LOOK_S)
            asked = time.monotonic() - LOOK_S / 2

    async def first(self) -> None:
        """Wait while the live stream is behind: its events go before history."""
        give_up = time.monotonic() + LIVE_PAUSE_S
        while time.monotonic() < give_up:
            unfinished = await self._oldest(time.monotonic() - LOOK_S)
            if unfinished is None or age_s(unfinished) < LIVE_S:
                return
            await asyncio.sleep(LOOK_S)

    async def all_are_ours(self) -> bool:
        """Whether nobody but fastworkers has worked in the group lately: others know no floors."""
        found = await self._admin.consumers(self._config.group)
        return all(one.ours or one.leased or one.idle_ms > FOREIGN_IDLE_MS for one in found)

    async def _oldest(self, not_before: float) -> str | None:
        """The age of the oldest unfinished entry; one question to Redis for all who ask at the same time."""
        async with self._one:
            if self._looked >= not_before:
                return self._unfinished
            looked = time.monotonic()
            stream = await self._admin.stream()
            group = None if stream is None else stream.group(self._config.group)
            if group is None and stream is not None and stream.length:
                raise Unreachable(f"{self._config.stream_key} has no group {self._config.group}: start a worker first")
            self._unfinished = None if group is None else group.unfinished_id
            self._looked = looked
            return self._unfinished


class Pace:
    """Live first: entered for each batch of history, of one account or several at a time. It waits while the live
    stream is behind, and writes for no more than `share` of the time."""

    def __init__(self, live: Live, share: float) -> None:
        self._live = live
        self._share = share
        self._began = self._not_before = 0.0
        self._one = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._one.acquire()
        try:
            await self._wait()
        except BaseException:
            self._one.release()
            raise
        self._began = time.monotonic()

    async def _wait(self) -> None:
        # mutant: history does not wait for the live stream
        await self._live.first()
        await asyncio.sleep(self._not_before - time.monotonic())

    async def __aexit__(self, *_: object) -> None:
        ended = time.monotonic()
        self._not_before = ended + min((ended - self._began) * (1 / self._share - 1), LIVE_PAUSE_S)
        self._one.release()


def _order(entry_id: str) -> list[int]:
    return [int(part) for part in entry_id.split("-")]


Keep = Callable[[str, Repository, Snapshot, str], Awaitable[None]]
"""What to do with a repository instead of comparing it: DID, repository, its snapshot, what was on the stream then."""


class _Ready(NamedTuple):
    """A repository that was fetched, to be compared; `settle`: how."""

    job: Job
    settle: Settle
    settled: asyncio.Future[Settled]


class Ways(NamedTuple):
    """How accounts are settled: `now`; `history`, at its pace; `beside` gives one with connections of its own, for a
    large account."""

    now: Settle
    history: Settle
    beside: Callable[[Settle], AbstractAsyncContextManager[Settle]]


class Many:
    """The engine. `repaired` is told of each account that is equal now, with its S0. `keep`: see Keep."""

    def __init__(
        self,
        waiting: Waiting,
        hosts: Hosts,
        live: Live,
        ways: Ways,
        folder: Path,
        report: Report,
        repaired: Callable[[str, int], Awaitable[None]],
        keep: Keep | None = None,
    ) -> None:
        self._keep = keep
        self._waiting = waiting
        self._hosts = hosts
        self._live = live
        self._settle = ways.now
        self._history = ways.history
        self._beside = ways.beside
        self._folder = folder
        self._report = report
        self._repaired = repaired
        self._at_work: set[str] = set()
        self._one = asyncio.Lock()  # one group of accounts is compared at a time, while others are fetched
        self._ready: list[_Ready] = []  # fetched, to be compared
        self._one_large = asyncio.Lock()

    async def all(self, work: Work, at_once: int, feed: Callable[[], Awaitable[None]] | None = None) -> None:
        """Until nothing is left that this may do. `feed` puts more into the queue meanwhile."""
        async with asyncio.TaskGroup() as tasks:
            feeding = None if feed is None else tasks.create_task(_awaited(feed))
            renewing = tasks.create_task(self._renew())
            running: set[asyncio.Task[None]] = set()
            left, due = Left(0, 0, 0.0), 0.0
            while True:
                running = {task for task in running if not task.done()}
                room = at_once - len(running)
                claimed = await self._waiting.claim(room, work.priority_max) if room else []
                running |= {tasks.create_task(self._account(one, work)) for one in claimed}
                if not running or time.monotonic() >= due:
                    began = time.monotonic()
                    left = await self._waiting.left(work.priority_max)
                    due = time.monotonic() + max(COUNT_S, 20 * (time.monotonic() - began))
                self._report.tell(left.waiting + left.fetching, self._hosts.resting())
                if running:
                    await asyncio.wait(running, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                elif feeding is not None and not feeding.done():
                    await asyncio.sleep(LOOK_S)
                elif (not left.waiting and not left.fetching) or not (claimed or work.waits):
                    break
                else:
                    await asyncio.sleep(min(max(left.next_s, LOOK_S), 2.0))
            renewing.cancel()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self._waiting.renew()

    async def _account(self, one: Claim, work: Work) -> None:
        # mutant: an account twice at once
        if one.did in self._at_work:  # asked for once more while it is being settled
            await self._waiting.again(one.did, 1.0, "", spends=False)
            return
        self._at_work.add(one.did)
        try:
            await self._one_account(one, work)
        except NotFetched as error:
            await self._not_fetched(one, work, error)
        finally:
            self._at_work.discard(one.did)

    async def _one_account(self, one: Claim, work: Work) -> None:
        mark = await self._live.mark()
        try:
            await self._fetched(one, work, mark)
        except NotFetched as error:
            if error.status is not None and self._keep is None:
                await self._live.finished(mark)
                found = Settled(one.did)
                async with self._one:
                    await self._settle.status(await self._word(one, mark), error.status, found)
                self._report.gone(found)
            raise

    async def _word(self, one: Claim, mark: Mark) -> Word:
        return Word(one.did, await self._live.relay(), mark.seq)

    async def _account_of(self, one: Claim, mark: Mark, document: dict[str, Any]) -> Settled:
        """What document and host say of the account itself. That a host serves a repository says that it is active only
        where it says so."""
        found, word = Settled(one.did), await self._word(one, mark)
        status = None
        if not await self._settle.is_active(one.did):
            try:
                said = await self._hosts.repo_status(pds_of(document) or "", one.did)
            except HostError:
                said = None
            if said is None:
                return found
            status = None if said.active else said.status
        await self._settle.status(word, status, found)
        await self._settle.handle(word, handle_in(document), found)
        return found

    async def _fetched(self, one: Claim, work: Work, mark: Mark) -> None:
        document, host = await document_of(self._hosts, one.did)
        if host != one.host and not await self._waiting.moved(one.did, host):
            return
        async with fetched(self._hosts, one.did, self._folder, document=document) as repository:
            # mutant: a settle does not wait for the worker
            if self._keep is None:
                await self._live.finished(mark)
            commit = repository.commit
            # mutant: older than the list said
            if one.want_rev is not None and commit.rev < one.want_rev:
                raise NotFetched(
                    Refusal.STALE, f"its revision {commit.rev} is older than {one.want_rev}, as was listed"
                )
            # mutant: S0 after the fetch
            snapshot = Snapshot(one.did, commit.rev, mark.seq, mark.at)
            if self._keep is not None:
                async with self._one:
                    await self._keep(one.did, repository, snapshot, mark.entry_id)
                await self._waiting.ended(one.did, "spooled", "")
                self._report.kept()
                return
            settle = self._history if one.priority >= CHOSEN else self._settle
            async with self._one:
                found = await self._account_of(one, mark, document)
            job = Job(repository, snapshot, one.part, accept_older=work.accept_older, result=found)
            size = repository.size
            # mutant: everybody waits for a large account
            if size > SMALL_BYTES:
                settled = await self._large(job, settle)
            else:
                settled = await self._together(job, settle)
        await self._settled(one, settled, snapshot, size)

    async def _together(self, job: Job, settle: Settle) -> Settled:
        """Whoever comes while others are compared is compared with all who come meanwhile."""
        settled: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self._ready.append(_Ready(job, settle, settled))
        async with self._one:
            while not settled.done():
                group = self._next_group()
                try:
                    await self._settle_group(group)
                except BaseException as error:
                    for one in group:
                        if not one.settled.done():
                            one.settled.set_exception(error) if isinstance(error, Exception) else one.settled.cancel()
                    raise
        return await settled

    async def _large(self, job: Job, settle: Settle) -> Settled:
        """A large account takes minutes: the others do not wait for it."""
        async with self._one_large, self._beside(settle) as another:
            one = _Ready(job, another, asyncio.get_running_loop().create_future())
            await self._settle_group([one])
        return one.settled.result()

    def _next_group(self) -> list[_Ready]:
        """Those who came first, as many as may be held at once."""
        group: list[_Ready] = []
        size = 0
        while self._ready:
            one = self._ready[0]
            if group and (size + one.job.repository.size > SMALL_BYTES or one.settle is not group[0].settle):
                break
            group.append(self._ready.pop(0))
            size += one.job.repository.size
        return group

    async def _settle_group(self, group: list[_Ready]) -> None:
        settle = group[0].settle
        # mutant: a floor beside others who know none
        floor = await settle.may_floor() and await self._live.all_are_ours()
        jobs = [one.job._replace(floor=floor) for one in group]
        for found, one in zip(await settle.settle_some(jobs), group, strict=True):
            if not one.settled.done():
                one.settled.set_result(found)

    async def _settled(self, one: Claim, settled: Settled, snapshot: Snapshot, size: int) -> None:
        self._report.add(settled)
        # mutant: a refused account counts as settled
        if settled.refused:
            self._report.failed(one.did, settled.refused)
            await self._waiting.ended(one.did, "refused", settled.refused)
            return
        await self._repaired(one.did, snapshot.seq)
        records, differences = settled.records, settled.differences
        await self._waiting.done(one.did, snapshot.rev, snapshot.seq, records, size, differences)

    async def _not_fetched(self, one: Claim, work: Work, error: NotFetched) -> None:
        # mutant: a 429 spends a try
        is_limited = error.refusal == Refusal.LIMITED
        if work.tries > 1 and (is_limited or (error.refusal in _PASSING and one.attempts + 1 < work.tries)):
            pause = 1.0 if is_limited else AGAIN_S[min(one.attempts, len(AGAIN_S) - 1)]
            await self._waiting.again(one.did, max(pause, error.wait_s), str(error), spends=not is_limited)
            return
        self._report.failed(one.did, str(error))
        await self._waiting.ended(one.did, "gone" if error.refusal in _GONE else "refused", str(error))


async def _awaited(feed: Callable[[], Awaitable[None]]) -> None:
    await feed()


# What it needs ------------------------------------------------------------------------------------


class Scene(NamedTuple):
    """What a command has opened."""

    config: Config
    admin: RedisAdmin
    live: Live
    stored: Stored
    store: Store | None
    queue: Queue
    hosts: Hosts
    folder: Path


@asynccontextmanager
async def opened(config: Config, command: str, hosts: Hosts | None, *, reads_only: bool) -> AsyncIterator[Scene]:
    """`hosts`: where tests put their own servers. Raises ConfigError and Unreachable."""
    url = config.require_database_url(command)
    if problems := await check_schema(url):
        raise Unreachable("\n".join(problems))
    try:
        async with contextlib.AsyncExitStack() as stack:
            name = f"fastworker-{command}"
            admin = await stack.enter_async_context(open_redis(config.redis_url, config.stream_key, client_name=name))
            stored = await stack.enter_async_context(open_stored(url))
            store = None
            if not reads_only:
                store = await Store.connect(url, application_name=name, rules=config.rules)
                stack.push_async_callback(store.close)
            queue = await stack.enter_async_context(open_queue(url))
            if hosts is None:
                hosts = await stack.enter_async_context(Hosts(config.plc_url))
            hosts.share(queue)
            if config.accounts is not None:
                await read_accounts(config.accounts, queue.followed)
                reading = asyncio.create_task(keep_reading(config.accounts, queue.followed))
                stack.callback(reading.cancel)
            folder = stack.enter_context(spool())
            yield Scene(config, admin, Live(admin, config), stored, store, queue, hosts, folder)
    except (StoreUnavailable, StreamUnavailable) as error:
        raise Unreachable(str(error)) from error


async def settle_all(
    scene: Scene,
    report: Report,
    work: Work,
    stop: asyncio.Event,
    *,
    feed: Callable[[], Awaitable[None]] | None = None,
    only: Listed | None = None,
    repaired: Callable[[str, int], Awaitable[None]] | None = None,
    keep: Keep | None = None,
) -> ExitCode:
    """What is in the queue; `only`: just look at these. `keep`: see Keep."""

    async def forget(did: str, seq: int) -> None:
        if scene.store is not None and only is None:
            await scene.store.forget_repair(did, seq)
        if repaired is not None:
            await repaired(did, seq)

    waiting: Waiting = scene.queue if only is None else only
    store = scene.store if only is None else None
    settle = Settle(scene.stored, store, asyncio.Lock(), at_once=FLUSH_BESIDE)
    history = Settle(scene.stored, store, Pace(scene.live, scene.config.backfill_share), at_once=FLUSH_BESIDE)

    @asynccontextmanager
    async def beside(of: Settle) -> AsyncIterator[Settle]:
        config = scene.config
        url = config.require_database_url("sync")
        async with open_stored(url) as stored:
            second = None if store is None else await Store.connect(url, application_name=LARGE, rules=config.rules)
            try:
                yield of.beside(stored, second)
            finally:
                if second is not None:
                    await second.close()

    many = Many(waiting, scene.hosts, scene.live, Ways(settle, history, beside), scene.folder, report, forget, keep)
    telling = None
    if only is None and work.priority_max >= CHOSEN:
        telling = asyncio.create_task(_keep_telling(scene))
    try:
        if not await unless_stopped(many.all(work, scene.config.fetch_at_once, feed), stop):
            report.stop()
            await waiting.give_back()
    except* (StoreUnavailable, StreamUnavailable, Unreachable, ConfigError) as group:
        raise first_of(group) from None
    finally:
        if telling is not None:
            telling.cancel()
            await asyncio.wait({telling})
    return report.end()


async def _keep_telling(scene: Scene) -> None:
    """How far history is, for status, page and metrics; once more at the end."""
    teller = Teller()
    try:
        while True:
            with contextlib.suppress(StoreUnavailable, StreamUnavailable):
                await teller.tell(scene.admin, scene.queue)
            await asyncio.sleep(1.0)
    finally:
        with contextlib.suppress(StoreUnavailable, StreamUnavailable):
            await teller.tell(scene.admin, scene.queue, at_once=True)


@contextmanager
def spool() -> Iterator[Path]:
    """A folder for what is fetched. Those that killed processes have left go."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_SPOOL}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_SPOOL))
            with contextlib.suppress(OSError):  # another process that starts now takes it for one that was left
                stack.enter_context(_locked(folder))
                if folder.exists():
                    break
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held for as long as the process lives. Raises OSError when another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

"""One worker process: its connections, its pipelines, their side tasks, and the order in which they stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from functools import partial

import msgspec

from fastworker.config import Config
from fastworker.crashpoint import arm
from fastworker.edge.tracing import OpenSpan, spans
from fastworker.errors import RowRejected, StoreUnavailable, StreamUnavailable, Unreachable
from fastworker.process.board import Slot, State, now_ms
from fastworker.process.child import StartAgain, run_child
from fastworker.process.children import ChildSpec
from fastworker.process.clocks import ids_ahead, which_is_off
from fastworker.redact import redact
from fastworker.store.chosen_accounts import keep_reading, read_accounts
from fastworker.store.debts import Debts
from fastworker.store.store import Store
from fastworker.stream.client import Redis, connect
from fastworker.stream.cluster import node_of
from fastworker.stream.consumer import ConsumerLeaseLost, WorkerStream
from fastworker.stream.keys import Keys
from fastworker.stream.members import Members
from fastworker.stream.partitions import layout
from fastworker.table.batch import Progress
from fastworker.table.dates import parse_date
from fastworker.worker.failover import Failover
from fastworker.worker.intake import Intake
from fastworker.worker.limits import DeadLetterLimit, Refusals
from fastworker.worker.locked import Locks
from fastworker.worker.overlap import Marks, Overlap
from fastworker.worker.pipeline import Pipeline
from fastworker.worker.readers import Readers
from fastworker.worker.suspects import Quiet, Suspects

log = logging.getLogger(__name__)

RENEWALS = 5  # per lease: every 3 s of 15; old TypeScript workers claim at 10 s
MAINTAIN_S = 10.0
PAY_S = 0.5  # after a flush: what its payer had not seen yet
FIGURES_S = 0.5
TELL_S = 0.5  # what is held longer is recorded in Redis: not trimmed even if the pending list is lost
FOLLOW_S = 1.0  # between two looks which partitions are ours to read
OVERLAPS = 4  # pipelines of one process that are told apart at least
LOOK_S = 2.0  # between two looks whether PostgreSQL is there, where nothing is written anyway


def shrunk(settings: Config) -> Config:
    """Settings whose connections, one per pipeline and one for the monitor, fit under `pool_size`; says so once."""
    room = _room(settings)
    processes = min(settings.processes, room)
    pipelines = min(settings.pipelines, room // processes)
    if (processes, pipelines) == (settings.processes, settings.pipelines):
        return settings
    log.warning(
        "DB_POOL_SIZE=%d leaves room for %d processes with %d pipelines each, not %d with %d",
        settings.pool_size, processes, pipelines, settings.processes, settings.pipelines,
    )  # fmt: skip
    return msgspec.structs.replace(settings, processes=processes, pipelines=pipelines)


def processes_max(settings: Config) -> int:
    """How many processes with all their pipelines fit under `pool_size`: what SIGTTIN may reach."""
    return max(1, _room(settings) // settings.pipelines)


def _room(settings: Config) -> int:
    return max(1, settings.pool_size - 1)


def dead_letter_limit(settings: Config) -> DeadLetterLimit:
    in_a_row = settings.dead_letters_in_a_row
    return DeadLetterLimit(run_max=in_a_row, window=8 * in_a_row)


class Shared(msgspec.Struct, frozen=True):
    """Memory that the processes of a worker share; made before the fork."""

    dead_letters: DeadLetterLimit
    marks: Marks = msgspec.field(default_factory=Marks)
    suspects: Suspects = msgspec.field(default_factory=Suspects)


def worker_child(settings: Config) -> ChildSpec:
    """A worker's children, made before the fork."""
    shared = Shared(dead_letter_limit(settings))
    target = partial(_worker_main, settings, shared)
    return ChildSpec("worker", target, count=settings.processes, died=shared.suspects.note_death)


def _worker_main(settings: Config, shared: Shared, slot: Slot) -> int:
    if slot.get("starts") == 1:  # a test kills the first process of each slot; its successors must recover
        arm(settings.crashpoint)
    return run_child(slot, partial(work, settings, shared=shared))


async def work(settings: Config, slot: Slot, stopping: asyncio.Event, *, shared: Shared | None = None) -> None:
    """Connect, lease, run until `stopping` and drained. Raises Unreachable where it cannot begin."""
    redis = connect(settings.redis_url, stream_key=settings.stream_key, client_name="fastworker-worker")
    failover = Failover(redis, settings.stream_key, settings.group)
    try:
        try:
            known = (await layout(redis, settings.stream_key)).known
            store = await Store.connect(
                settings.require_database_url("worker"),
                pool_size=_pool_size(settings, known),
                application_name="fastworker",
                rules=settings.rules,
                meet=failover.meet,
            )
        except (StreamUnavailable, StoreUnavailable) as error:
            raise Unreachable(str(error)) from error
        try:
            with spans(on=settings.tracing) as open_span:
                readers = _readers(
                    settings, shared or Shared(dead_letter_limit(settings)), slot, redis, store, open_span
                )
                await _work(settings, slot, stopping, store, failover, readers)
        finally:
            await store.close()
    finally:
        await redis.aclose()


def _pool_size(settings: Config, partitions: int) -> int:
    """Connections of one process: one for each pipeline, as far as they fit under the ceiling of all."""
    share = -(-partitions // settings.processes)
    return max(settings.pipelines, min(share, _room(settings) // settings.processes))


def _readers(settings: Config, shared: Shared, slot: Slot, redis: Redis, store: Store, open_span: OpenSpan) -> Readers:
    refusals, quiet, locks = Refusals(), Quiet(), Locks()
    at_once = settings.processes * settings.pipelines

    def make(number: int, partition: int) -> tuple[WorkerStream, Pipeline]:
        async def last_finished() -> str | None:
            progress = await store.finished(stream.stream_key)
            return progress.entry_id if progress is not None else None

        keys = Keys(settings.stream_key, settings.group, partition)
        stream = WorkerStream(
            node_of(redis, keys.stream),
            keys=keys,
            group=settings.group,
            consumer_id=settings.consumer_id,
            batch_size=settings.batch_size,
            dead_letter_maxlen=settings.dead_letter_maxlen,
            last_finished=last_finished,
            lease_ms=settings.lease_ms,
            foreign_idle_ms=settings.foreign_idle_ms,
        )
        intake = Intake(
            stream,
            slot,
            scan_s=settings.scan_s,
            own_idle_ms=settings.lease_ms,
            foreign_idle_ms=settings.foreign_idle_ms,
        )
        pipeline = Pipeline(
            intake,
            stream,
            store,
            slot,
            limits=settings.limits.shared_by(max(at_once, readers.layout.written)),
            dead_letters=shared.dead_letters,
            refusals=refusals,
            overlap=Overlap(shared.marks, slot.number * max(settings.pipelines, OVERLAPS) + number),
            open_span=open_span,
            suspects=shared.suspects,
            quiet=quiet,
            locks=locks,
        )
        return stream, pipeline

    members = Members(redis, settings.stream_key, settings.group)
    readers = Readers(members, quiet, make, settings.pipelines, settings.max_stream_len)
    return readers


async def _work(
    settings: Config,
    slot: Slot,
    stopping: asyncio.Event,
    store: Store,
    failover: Failover,
    readers: Readers,
) -> None:
    try:
        try:
            await readers.follow()
            slot.text("consumers", readers.names)
            await _take_entry_rules(store, readers)
            if settings.accounts is not None:
                await read_accounts(settings.accounts, store.followed)
        except (StreamUnavailable, StoreUnavailable) as error:
            raise Unreachable(str(error)) from error
        await _run(settings, slot, stopping, store, failover, readers)
    finally:
        await readers.release()


async def _run(
    settings: Config,
    slot: Slot,
    stopping: asyncio.Event,
    store: Store,
    failover: Failover,
    readers: Readers,
) -> None:
    """Everything in one group: an unexpected end of any task ends them all, and the process."""
    renew_s = settings.lease_ms / 1000 / RENEWALS
    failing: Failing = {}
    maintaining = partial(_maintain, slot, store, failover, readers, failing)
    async with asyncio.TaskGroup() as group:
        side_tasks = [
            group.create_task(_every(renew_s, partial(_renew, readers, failing)), name="renew leases"),
            group.create_task(_every(TELL_S, partial(_tell_held, readers, failing)), name="tell what is held"),
            group.create_task(_every(MAINTAIN_S, maintaining), name="maintain"),
            group.create_task(_pay(slot, store), name="pay what is owed"),
            group.create_task(_figures(slot, store, readers), name="figures"),
            *_choosing(settings, store, group),
            group.create_task(_every(LOOK_S, partial(_look_for, store, slot, failover)), name="look for PostgreSQL"),
        ]
        readers.start(group)
        following = group.create_task(
            _every(FOLLOW_S, partial(_follow, slot, store, readers, failing)), name="follow partitions"
        )
        slot.set(ready=1, state=State.RUNNING, maintained_ms=now_ms())
        await stopping.wait()
        following.cancel()
        await asyncio.wait([following])
        # No intake from here on; what is held is settled within the budget, or stays pending for the next worker.
        loops = readers.stop()
        late: set[asyncio.Task[None]] = set()
        if loops:
            _, late = await asyncio.wait(loops, timeout=settings.drain_s)
        if late:
            held = sum(pipeline.held_count for pipeline in readers.pipelines)
            log.error("Not drained within %.1f s: %d entries stay pending", settings.drain_s, held)
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(1):
                await store.pay()  # nobody may come next
        for task in (*late, *side_tasks):
            task.cancel()


def _choosing(settings: Config, store: Store, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
    if settings.accounts is None:
        return []
    return [group.create_task(keep_reading(settings.accounts, store.followed), name="read the accounts")]


_UPKEEP = "upkeep"
Failing = dict[str, str]
"""What is done beside the pipelines and fails: why. They wait for a server that is away, and say so; what is refused
here alone (a right to one command) would be said by nobody, so maintenance says it."""


@contextlib.contextmanager
def _noting(failing: Failing, what: str) -> Iterator[None]:
    try:
        yield
    except (StreamUnavailable, StoreUnavailable) as error:
        failing[what] = redact(str(error))
    else:
        failing.pop(what, None)


async def _follow(slot: Slot, store: Store, readers: Readers, failing: Failing) -> None:
    """The partitions that this process should read, and nothing else."""
    before = readers.pipelines
    try:
        with _noting(failing, "follow"):
            await readers.follow()
            if readers.pipelines != before:
                slot.text("consumers", readers.names)
                await _take_entry_rules(store, readers)
    except ConsumerLeaseLost as error:
        raise StartAgain(str(error)) from error


async def _every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await act()
        await asyncio.sleep(seconds * random.uniform(0.8, 1.2))


async def _renew(readers: Readers, failing: Failing) -> None:
    try:
        with _noting(failing, "renew"):
            for stream in readers.streams:
                await stream.renew()
    except ConsumerLeaseLost as error:
        raise StartAgain(str(error)) from error


async def _pay(slot: Slot, store: Store) -> None:
    """What is owed still: a flush leaves it to another that pays just then, and may have looked already.

    Not while nothing was written, and nothing was owed at the last look.
    """
    before, is_owing = -1, True
    while True:
        flushes = slot.get("flushes")
        if flushes != before or is_owing:
            with contextlib.suppress(StoreUnavailable, RowRejected):  # `maintain` tells
                await store.pay()
                debts = await _look_at_debts(slot, store)
                before, is_owing = flushes, debts.owed > debts.put_back
        await asyncio.sleep(PAY_S)


async def _look_at_debts(slot: Slot, store: Store) -> Debts:
    debts = await store.debts()
    now = now_ms()
    slot.set(
        debts=debts.owed,
        debts_put_back=debts.put_back,
        debts_since_ms=now - int(debts.oldest_s * 1000) if debts.owed > debts.put_back else 0,
        debts_at_ms=now,
    )
    slot.text("debt", redact(debts.error))
    return debts


async def _tell_held(readers: Readers, failing: Failing) -> None:
    with _noting(failing, "tell"):
        for stream in readers.streams:
            await stream.tell_held()


async def _maintain(slot: Slot, store: Store, failover: Failover, readers: Readers, failing: Failing) -> None:
    """Store how far the group has come, then do what committed transactions left owed, in bounded pieces.

    It may take long, and says so while it gets on; not where a part of it failed the last time: what succeeds beside
    that says nothing of it.
    """
    has_failed = failing.pop(_UPKEEP, None) is not None

    def got_on() -> None:
        # mutant: upkeep that gets on hides what fails
        if not has_failed:
            slot.set(maintained_ms=now_ms())

    async def note() -> None:
        for stream in readers.owned_streams:
            await stream.give_skipped()
        for pipeline in readers.pipelines:
            await pipeline.note_progress()
        await _note_idle(store, readers)
        await failover.note(store)

    async def maintain() -> None:
        while await store.maintain(crowds=False):  # `_pay` has them
            got_on()
        await _look_at_debts(slot, store)

    failure = next(iter(failing.values()), "")
    for act in (
        note,
        partial(_take_entry_rules, store, readers),
        maintain,
        partial(_prune, slot, store, readers.members, readers.pipelines, got_on),
    ):
        try:
            await act()
        except (StoreUnavailable, StreamUnavailable, RowRejected) as error:
            failure = failure or redact(str(error))
    if failure:
        failing[_UPKEEP] = failure
        slot.text("maintain_error", failure)  # the monitor tells, where it goes on
    else:
        slot.set(maintained_ms=now_ms())


async def _note_idle(store: Store, readers: Readers) -> None:
    """A partition that gets few events has come as far as the reader, when nothing is left in it.

    The reader's cursors are asked first: what they cover was on the stream before we look.
    """
    if readers.layout.known == 1:
        return
    sessions = store.sessions
    cursors = await readers.members.cursors()
    # mutant: progress without a look
    finished = [one.partition for one in readers.owned_streams if await one.is_finished()]
    look = await readers.members.look()
    if look is not None and look.members[0] == readers.members.token:
        # What the reader does not append to any more must not hold back what follows from the lowest of all.
        finished += look.empty
    for number in finished:
        if cursor := cursors.get(number):
            stream = readers.members.stream_of(number)
            await store.note_progress(Progress(stream, "idle", cursor.seq, cursor.entry_id, sessions))


async def _prune(
    slot: Slot, store: Store, members: Members, pipelines: list[Pipeline], got_on: Callable[[], None] = lambda: None
) -> None:
    """Only while the clocks agree, and by the earliest: a delete forgotten too soon sets all new records aside."""
    clocks = {"PostgreSQL": await store.now(), "Redis": await members.time(), "this machine": datetime.now(UTC)}
    off = which_is_off(clocks)
    if off:
        log.warning("Nothing is pruned: %s", off)
    slot.text("clocks", off or ids_ahead(await members.newest(), clocks["Redis"]))
    if off:
        return
    told = [at for one in pipelines if one.told and (at := parse_date(one.told)) is not None]
    now = min([clocks["this machine"], *(at.replace(tzinfo=UTC) for at in told)])
    while await store.prune(now=now):
        got_on()


async def _take_entry_rules(store: Store, readers: Readers) -> None:
    rules = await store.entry_rules()
    for pipeline in readers.pipelines:
        pipeline.follow(rules)


async def _look_for(store: Store, slot: Slot, failover: Failover) -> None:
    """An idle worker writes nothing, and would not notice that it could not: ask, and note when an answer came.

    Not while every connection writes: then flushes tell, by their progress.
    """
    opened, busy = store.connections
    if slot.get("held") and busy == opened:
        return
    try:
        await store.ping()
        slot.set(store_ms=now_ms())
        await failover.note(store)
    except StreamUnavailable:
        pass  # the pipelines wait for Redis, and say so
    except (StoreUnavailable, Unreachable) as error:
        slot.failed(error)


async def _figures(slot: Slot, store: Store, readers: Readers) -> None:
    """What the pipelines know, into the slot. Running is an effort of all: the slowest one is what is shown."""

    def finished() -> int:
        return slot.get("committed") + slot.get("nothing_to_store") + slot.get("set_aside")

    acked, at, conflicts = finished(), now_ms(), 0
    while True:
        await asyncio.sleep(FIGURES_S)
        now = now_ms()
        total, pipelines = finished(), readers.pipelines
        oldest = [pipeline.oldest_ms for pipeline in pipelines if pipeline.oldest_ms]
        if slot.get("state") != State.DRAINING:
            slot.set(state=max((pipeline.state for pipeline in pipelines), default=State.RUNNING))
        slot.set(
            progress_ms=min((pipeline.progress_ms for pipeline in pipelines), default=now),
            oldest_ms=min(oldest, default=0),
            held=sum(pipeline.held_count for pipeline in pipelines),
            acked_per_second=(total - acked) * 1000 // max(1, now - at),
            connections=store.connections[0],
            connections_busy=store.connections[1],
        )
        slot.add(conflicts=store.writer.conflicts - conflicts)
        acked, at, conflicts = total, now, store.writer.conflicts

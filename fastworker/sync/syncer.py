"""The syncer: a child of the worker's supervisor that keeps the tables equal to the network, beside the stream.

In rounds: what events asked for (#sync, broken chains), what a gap may have cost, what a sample found, are accounts in
`fastworker.repos`; they are fetched and settled, by priority. Then, if it is time, one random account is compared, and
history that was asked for goes on for a minute (sync/history.py, sync/widen.py). Any number of syncers share one
database. Nothing is kept in memory: a killed one's work is done by the next.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, StreamUnavailable, Unreachable
from fastworker.process.backoff import Backoff, pause
from fastworker.redact import redact
from fastworker.store.repos import REPAIR, SAMPLE, Queue, Wanted, open_queue
from fastworker.stream.admin import RedisAdmin, open_redis
from fastworker.stream.repairs import tell, told
from fastworker.sync.gaps import close_gaps, read_gaps
from fastworker.sync.history import fetch_some, is_wanted
from fastworker.sync.hosts import Hosts
from fastworker.sync.lists import relay_of
from fastworker.sync.many import Scene, Work, opened, settle_all
from fastworker.sync.progress import Teller
from fastworker.sync.report import Report
from fastworker.sync.sampling import Looked, draw, draw_active, look_twice
from fastworker.sync.settle import Settled
from fastworker.sync.tell import repair_status
from fastworker.sync.widen import Widening, fetch_widened

log = logging.getLogger(__name__)

ROUND_S: Final = 15.0
TELL_S: Final = 10.0
TRIES: Final = 5
APART_S: Final = 720
"""Between two repairs of one account that events ask for, at first. One that asks again within twice the time waits
twice as long, a day at most: a host that breaks at each commit costs less and less."""
APART_MAX_S: Final = 86_400
AFTER_A_BUG_S: Final = 60.0
_HAS_WORK: Final = f"""
SELECT EXISTS (SELECT FROM fastworker.repairs) OR EXISTS (SELECT FROM fastworker.gaps WHERE closed_at IS NULL)
    OR EXISTS (SELECT FROM fastworker.repos WHERE state = 'waiting' AND priority <= {SAMPLE} AND next_at <= now())
"""
_LATELY: Final = """
SELECT did FROM fastworker.repos WHERE did = ANY($1::varchar[]) AND ended_at > now() - make_interval(secs => apart_s)
"""
_APART: Final = f"""
UPDATE fastworker.repos SET apart_s = CASE WHEN ended_at > now() - make_interval(secs => 2 * apart_s)
    -- mutant: the time between repairs does not grow
    THEN least(2 * apart_s, {APART_MAX_S}) ELSE {APART_S} END
WHERE did = ANY($1::varchar[]) AND reason = 'event' AND state NOT IN ('waiting', 'fetching')
"""
_RECORDED: Final = "SELECT did FROM fastworker.repairs ORDER BY seen_at LIMIT 10000"
_DUE: Final = "SELECT coalesce(now() - max(at) >= make_interval(secs => $1::float8), true) FROM fastworker.samples"
_SAMPLED: Final = """
INSERT INTO fastworker.samples (did, host, records, tables, examples, is_repaired)
VALUES ($1, $2, $3, $4::text::jsonb, $5::text::jsonb, $6)
"""
_FORGET: Final = "DELETE FROM fastworker.samples WHERE at < now() - interval '90 days'"


class _Log(Report):
    """What people would be told goes to the log."""

    def __init__(self) -> None:
        super().__init__(dry_run=False)

    def add(self, settled: Settled) -> None:
        super().add(settled)
        if settled.differences:
            log.info("%s is settled: %d differences mended", settled.did, settled.differences)

    def failed(self, name: str, why: str) -> None:
        self.failures += 1
        log.info("%s is not settled: %s", name, why)

    def tell(self, left: int, resting: object = ()) -> None:
        pass

    def end(self) -> ExitCode:
        return ExitCode.DONE


async def run_syncer(config: Config, stop: asyncio.Event, *, hosts: Hosts | None = None) -> None:
    """Until `stop`. Never raises: what it waits for is told. `hosts`: where tests put their own servers."""
    log.info(
        "FASTWORKER_SYNC is on: repositories are asked for at the hosts of accounts, documents at %s; "
        "FASTWORKER_SYNC=off switches it off (docs/repair.md)",
        redact(config.plc_url),
    )
    backoff, waits_for, teller, widening = Backoff(1.0, 60.0), "", Teller(), Widening(config)
    while not stop.is_set():
        try:
            await _round(config, stop, hosts, teller, widening)
            backoff.reset()
            waits_for = ""
            await pause(ROUND_S, stop)
        except (Unreachable, StoreUnavailable, StreamUnavailable, ConfigError) as error:
            if str(error) != waits_for:
                waits_for = str(error)
                log.info("Repairs wait: %s", waits_for)
            await _tell_error(config, waits_for)
            await backoff.wait(stop)
        except Exception:
            log.exception("The syncer failed; it begins again in %.0f s", AFTER_A_BUG_S)
            await pause(AFTER_A_BUG_S, stop)


async def _round(config: Config, stop: asyncio.Event, hosts: Hosts | None, teller: Teller, widening: Widening) -> None:
    url = config.require_database_url("worker")
    async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-sync") as admin:
        async with open_queue(url) as queue:
            has_work = await queue.value(_HAS_WORK) or await admin.gaps() or await admin.recorded_repairs()
            is_due = await _is_due(queue, config)
            has_history, is_wider = await is_wanted(queue, config), await widening.look(queue)
            await _tell(admin, queue, [])
            await teller.tell(admin, queue)
        if not (has_work or is_due or has_history or is_wider):
            return
        async with opened(config, "sync", hosts, reads_only=False) as scene:
            if has_work:
                await _mend(scene, stop)
            if is_due and not stop.is_set():
                await _sample(scene, stop)
            if has_history and not stop.is_set():
                await fetch_some(scene, _Log(), stop)
            if is_wider and not stop.is_set():
                await fetch_widened(scene, _Log(), stop)
            await _tell(admin, scene.queue, scene.hosts.resting())


async def _is_due(queue: Queue, config: Config) -> bool:
    if not config.sample_per_hour:
        return False
    return bool(await queue.value(_DUE, 3_600 / config.sample_per_hour))


# Repairs --------------------------------------------------------------------------------------------


async def _mend(scene: Scene, stop: asyncio.Event) -> None:
    """Everything that waits and may be tried now."""
    records: dict[str, bytes] = {}

    async def feed() -> None:
        await _take_recorded(scene, records)
        try:
            await read_gaps(scene, relay_of(scene.config.relay_urls[0]))
        except Unreachable as error:
            log.info("Gaps wait: %s", error)

    async def again_and_again() -> None:
        while True:
            await asyncio.sleep(TELL_S)
            await _take_recorded(scene, records)
            await _tell(scene.admin, scene.queue, scene.hosts.resting())

    async def repaired(did: str, _seq: int) -> None:
        if did in records:
            await scene.admin.forget_repair(did, records.pop(did))

    meanwhile = asyncio.create_task(again_and_again())
    try:
        work = Work(priority_max=SAMPLE, tries=TRIES, waits=False)
        await settle_all(scene, _Log(), work, stop, feed=feed, repaired=repaired)
    finally:
        meanwhile.cancel()
        await asyncio.wait({meanwhile})
    if not meanwhile.cancelled() and (error := meanwhile.exception()) is not None:
        raise error
    if not stop.is_set():
        await close_gaps(scene)


async def _take_recorded(scene: Scene, records: dict[str, bytes]) -> None:
    """Accounts that events asked to be settled, into the queue: each again when it was asked for again."""
    found = await scene.admin.recorded_repairs()
    # mutant: who asks again while it is repaired is forgotten
    new = [did for did, record in found.items() if records.get(did) != record]
    records |= found
    new += [row[0] for row in await scene.queue.rows(_RECORDED) if row[0] not in records]
    if new:
        lately = {row[0] for row in await scene.queue.rows(_LATELY, new)}  # these stay recorded, and are taken later
        # mutant: who breaks at each commit is repaired each time
        due = [did for did in new if did not in lately]
        await scene.queue.execute(_APART, due)
        await scene.queue.put([Wanted(did) for did in due], "event", REPAIR, again=True)


# Samples --------------------------------------------------------------------------------------------


async def _sample(scene: Scene, stop: asyncio.Event) -> None:
    """One account, kept with what was found; what differs is repaired in the next round."""
    turn = await scene.queue.value("SELECT count(*) % 2 FROM fastworker.samples")
    dids = (await draw_active(scene) if turn else []) or await draw(scene, 1)
    if not dids:
        return
    looked = await look_twice(scene, dids, stop)
    if stop.is_set():
        return
    differing = looked.differing
    for did in dids:
        await _keep(scene, did, looked)
    if differing:
        await scene.queue.put([Wanted(did) for did in differing], "sample", SAMPLE, again=True)
    await scene.queue.execute(_FORGET)


async def _keep(scene: Scene, did: str, looked: Looked) -> None:
    """Also one that could not be judged: its row has no tables, and the next is drawn in its time."""
    one = looked.found.get(did) or Settled(did)
    tables = {
        table: [kind[table] for kind in (one.compared, one.missing, one.different, one.extra)]
        for table in sorted({*one.compared, *one.extra})
    }
    texts = (msgspec.json.encode(tables).decode(), msgspec.json.encode(one.examples).decode())
    await scene.queue.execute(_SAMPLED, did, looked.hosts.get(did, ""), one.records, *texts, bool(one.differences))


# What it tells --------------------------------------------------------------------------------------


async def _tell(admin: RedisAdmin, queue: Queue, resting: list[str]) -> None:
    await tell(admin, admin.keys.repair_status, msgspec.json.encode(await repair_status(queue, resting)))


async def _tell_error(config: Config, why: str) -> None:
    """PostgreSQL may be away: what was told last stays, with the reason."""
    try:
        async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-sync") as admin:
            before = await told(admin, admin.keys.repair_status)
            if before is not None:
                now = msgspec.json.decode(before) | {"error": why[:300]}
                await tell(admin, admin.keys.repair_status, msgspec.json.encode(now))
    except (Unreachable, StreamUnavailable):
        return

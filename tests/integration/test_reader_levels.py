"""The reader's levels of verification, from a relay's WebSocket to what lies in Redis, verdict by verdict."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import libipld
import pytest
from redis.asyncio import Redis

from fastworker.config import Config
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.reader.reader import run_reader
from fastworker.reader.stats import ReaderStats
from fastworker.simulator.cbor import cid_of
from fastworker.simulator.hosts import SimHosts
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import Clock, LiveClock, Repo, SimFrame, Write, identity_frame, tid

DID = "did:plc:" + "a" * 24
STREAM, REPAIRS, CURSOR = "firehose:events", "fastworker:repairs", "firehose:python_cursor"
ASIDE = "fastworker:unverified"


def like(number: int) -> dict[str, Any]:
    subject = {"uri": f"at://{DID}/app.bsky.feed.post/{number}", "cid": "bafyreid"}
    return {"$type": "app.bsky.feed.like", "subject": subject, "createdAt": "2026-07-04T00:00:00Z"}


def create(number: int) -> Write:
    return "create", f"app.bsky.feed.like/{tid(1_780_000_000_000_000 + number)}", like(number)


def changed(frame: SimFrame | bytes, **members: Any) -> bytes:
    """Another message with these members; None takes one away."""
    data = frame if isinstance(frame, bytes) else frame.data
    header, payload = libipld.decode_dag_cbor_multi(data)
    payload = {name: value for name, value in {**payload, **members}.items() if value is not None}
    linked = {name: _Link(payload[name]) for name in ("commit", "prevData") if name in payload}
    return libipld.encode_dag_cbor(header) + _encoded({**payload, **linked})


class _Link(bytes):
    pass


def _encoded(value: Any) -> bytes:
    """DAG-CBOR in which CIDs stay links: libipld reads both as bytes."""
    if isinstance(value, _Link):
        return b"\xd8\x2a\x58\x25\x00" + bytes(value)
    if isinstance(value, dict):
        head = libipld.encode_dag_cbor({str(n): 0 for n in range(len(value))})
        size = 1 if len(value) < 24 else 2
        parts = [head[:size]]
        for key in sorted(value, key=lambda key: (len(key), key)):
            member = value[key]
            is_link = key in ("cid", "prev") and isinstance(member, bytes)
            parts += [libipld.encode_dag_cbor(key), _encoded(_Link(member) if is_link else member)]
        return b"".join(parts)
    if isinstance(value, list):
        head = libipld.encode_dag_cbor([0] * len(value))
        return head[: len(head) - len(value)] + b"".join(map(_encoded, value))
    return libipld.encode_dag_cbor(value)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, protocol=2) as redis:
        yield redis


@pytest.fixture
async def relay(redis: Redis) -> AsyncIterator[SimRelay]:
    await redis.set(CURSOR, "0")
    async with SimRelay((), start="oldest") as relay:
        yield relay


@asynccontextmanager
async def reading(redis_url: str, relay: SimRelay, **more: Any) -> AsyncIterator[ReaderStats]:
    stats, stop = ReaderStats(), asyncio.Event()
    settings = Config(redis_url=redis_url, relay_urls=(relay.url,), **{"stream_format": "native", **more})
    task = asyncio.create_task(run_reader(settings, stop, stats=stats))
    try:
        yield stats
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await task


async def until(condition: Callable[[], Awaitable[bool]] | Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            came = condition()
            if came if isinstance(came, bool) else await came:
                return
            await asyncio.sleep(0.02)


async def commits(redis: Redis) -> list[Commit]:
    entries: Any = await redis.xrange(STREAM)
    events = [decode_entry(fields) for _, fields in entries]
    return [event for event in events if isinstance(event, Commit)]


async def repairs(redis: Redis) -> dict[str, Any]:
    found: Any = await redis.hgetall(REPAIRS)
    return {did.decode(): json.loads(text) for did, text in found.items()}


def counted(stats: ReaderStats) -> dict[str, int]:
    return {verdict: count for verdict, count in stats.verdicts.items() if count}


def grown(did: str = DID, commits: int = 3) -> tuple[Repo, list[SimFrame]]:
    repo = Repo(did, LiveClock())
    return repo, [repo.commit([create(number)]) for number in range(commits)]


@pytest.mark.parametrize("form", ["json", "native", "frame"])
async def test_what_follows_passes(form: str, redis_url: str, redis: Redis, relay: SimRelay) -> None:
    repo, frames = grown()
    empty = repo.commit([])
    frames += [empty, repo.commit([create(9)])]
    async with reading(redis_url, relay, stream_format=form) as stats:
        relay.emit(*frames)
        await until(lambda: stats.last_seq == frames[-1].seq)
    assert counted(stats) == {"first": 1, "ok": 4}
    assert (len(await commits(redis)), stats.empty) == (4, 1)
    assert await repairs(redis) == {}
    left: Any = await redis.hgetall("fastworker:reader:stats")
    assert left[b"verdict:ok"] == b"4"


@pytest.mark.parametrize("form", ["json", "native", "frame"])
async def test_a_lost_commit_queues_a_repair(form: str, redis_url: str, redis: Redis, relay: SimRelay) -> None:
    _, frames = grown(commits=5)
    async with reading(redis_url, relay, stream_format=form) as stats:
        relay.emit(frames[0], frames[1], *frames[3:])
        await until(lambda: stats.last_seq == frames[-1].seq)
    assert counted(stats) == {"first": 1, "ok": 2, "break": 1}
    assert len(await commits(redis)) == 4, "it passes all the same"
    told = (await repairs(redis))[DID]
    assert (told["reason"], told["seq"]) == ("break", frames[3].seq)


async def test_a_reordered_commit(redis_url: str, redis: Redis, relay: SimRelay) -> None:
    _, frames = grown(commits=4)
    late = changed(frames[1], seq=(frames[3].seq or 0) + 1)
    async with reading(redis_url, relay) as stats:
        relay.emit(frames[0], frames[2], frames[3], late)
        await until(lambda: stats.frames == 4 and not stats.outbox_items)
        await until(lambda: stats.last_seq == (frames[3].seq or 0) + 1)
    assert counted(stats) == {"first": 1, "break": 1, "ok": 1, "replay": 1}
    assert len(await commits(redis)) == 4


@pytest.mark.parametrize("odd", [{"prevData": cid_of(b"another tree")}, {"since": tid(1)}], ids=["tree", "revision"])
async def test_another_state_before(odd: dict[str, Any], redis_url: str, redis: Redis, relay: SimRelay) -> None:
    _, frames = grown(commits=3)
    async with reading(redis_url, relay) as stats:
        relay.emit(frames[0], changed(frames[1], **odd), frames[2])
        await until(lambda: stats.last_seq == frames[2].seq)
    assert counted(stats) == {"first": 1, "break": 1, "ok": 1}
    assert set(await repairs(redis)) == {DID}


async def test_a_commit_of_an_old_host(redis_url: str, redis: Redis, relay: SimRelay) -> None:
    _, frames = grown(commits=4)
    async with reading(redis_url, relay) as stats:
        relay.emit(frames[0], changed(frames[1], prevData=None), changed(frames[3], prevData=None))
        await until(lambda: stats.last_seq == frames[3].seq)
    assert counted(stats) == {"first": 1, "legacy": 1, "break": 1}
    assert len(await commits(redis)) == 3


@pytest.mark.parametrize("form", ["json", "native", "frame"])
async def test_a_commit_that_is_too_big(form: str, redis_url: str, redis: Redis, relay: SimRelay) -> None:
    _, frames = grown(commits=3)
    async with reading(redis_url, relay, stream_format=form) as stats:
        relay.emit(frames[0], changed(frames[1], tooBig=True, blocks=b"", ops=[]), frames[2])
        await until(lambda: stats.last_seq == frames[2].seq)
    assert counted(stats) == {"first": 1, "break": 1, "ok": 1}
    assert (await repairs(redis))[DID]["reason"] == "break"


async def test_another_accounts_commit(redis_url: str, redis: Redis, relay: SimRelay) -> None:
    """The blocks of one account in a message of another one."""
    _, frames = grown(commits=2)
    stranger = "did:plc:" + "b" * 24
    async with reading(redis_url, relay) as stats:
        relay.emit(frames[0], changed(frames[1], repo=stranger))
        await until(lambda: stats.last_seq == frames[1].seq)
    assert counted(stats) == {"first": 1, "bad_commit": 1}
    assert (await repairs(redis))[stranger]["reason"] == "bad_commit"


async def test_a_commit_from_the_future(redis_url: str, redis: Redis, relay: SimRelay) -> None:
    _, frames = grown()
    ahead = Repo("did:plc:" + "b" * 24, Clock((frames[-1].seq or 0) + 1, gap_us=86_400_000_000 * 2))
    frame = ahead.commit([create(1)])
    async with reading(redis_url, relay) as stats:
        relay.emit(*frames, frame)
        await until(lambda: stats.last_seq == frame.seq)
    assert counted(stats) == {"first": 1, "ok": 2, "future_rev": 1}
    assert {one.repo for one in await commits(redis)} == {DID}
    assert stats.drops["future_rev"] == 1
    assert (await repairs(redis))[ahead.did]["reason"] == "future_rev"


async def test_a_sync_is_where_the_chain_goes_on(redis_url: str, redis: Redis, relay: SimRelay) -> None:
    repo, frames = grown(commits=2)
    repo.commit([create(50)])  # nobody was told
    frames += [repo.sync(), repo.commit([create(51)])]
    async with reading(redis_url, relay, stream_format="json") as stats:
        relay.emit(*frames)
        await until(lambda: stats.last_seq == frames[-1].seq)
    assert counted(stats) == {"first": 1, "ok": 2}
    assert (await repairs(redis))[DID]["seq"] == frames[2].seq


async def test_the_next_process_goes_on_from_the_file(
    redis_url: str, redis: Redis, relay: SimRelay, tmp_path: Path
) -> None:
    _, frames = grown(commits=6)
    kept = {"home": str(tmp_path), "chain_bytes": 1 << 20}
    async with reading(redis_url, relay, **kept) as stats:
        relay.emit(*frames[:2])
        await until(lambda: stats.last_seq == frames[1].seq)
    async with reading(redis_url, relay, **kept) as stats:
        relay.emit(frames[2], frames[4])
        await until(lambda: stats.last_seq == frames[4].seq)
    assert counted(stats) == {"ok": 1, "break": 1}
    await redis.set(CURSOR, frames[0].seq or 0)  # as after a crash: the file is ahead of the cursor
    async with reading(redis_url, relay, **kept) as stats:
        relay.emit(frames[5])
        await until(lambda: stats.last_seq == frames[5].seq)
    assert counted(stats) == {"replay": 3, "ok": 1}


async def test_off_costs_and_says_nothing(redis_url: str, redis: Redis, relay: SimRelay, tmp_path: Path) -> None:
    _, frames = grown(commits=3)
    async with reading(redis_url, relay, verify="off", home=str(tmp_path)) as stats:
        relay.emit(frames[0], frames[2])
        await until(lambda: stats.last_seq == frames[2].seq)
    assert counted(stats) == {}
    assert await repairs(redis) == {}
    assert not list(tmp_path.iterdir())


# What the account signed


@pytest.fixture
async def sim() -> AsyncIterator[SimHosts]:
    async with SimHosts(Network(1, accounts=1, signed=True).world, count=1) as sim:
        yield sim


def shows(sim: SimHosts, did: str, key: SigningKey | None) -> None:
    method = {"id": f"{did}#atproto", "type": "Multikey", "publicKeyMultibase": key.multikey if key else ""}
    sim.documents[did] = {"id": did, "verificationMethod": [method] if key else []}


def asked(sim: SimHosts, did: str = DID) -> int:
    return sim.counts[f"/{did}"]


def signing(sim: SimHosts, did: str = DID, *, name: str = "one") -> tuple[Repo, SigningKey]:
    key = SigningKey(name)
    shows(sim, did, key)
    return Repo(did, LiveClock(), key=key), key


async def known(stats: ReaderStats, relay: SimRelay, sim: SimHosts, repo: Repo) -> None:
    """The account's key is at hand: a commit of it was verified."""
    relay.emit(repo.commit([create(100_000)]))
    await until(lambda: asked(sim, repo.did) > 0)
    number = 100_001
    async with asyncio.timeout(60):
        while not stats.verdicts["ok"]:
            relay.emit(repo.commit([create(number)]))
            number += 1
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("level", ["signed", "full"])
async def test_an_unknown_key_is_asked_for_beside_the_stream(
    level: str, redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts, tmp_path: Path
) -> None:
    repo, _ = signing(sim)
    kept = {"verify": level, "plc_url": sim.directory.url, "home": str(tmp_path), "chain_bytes": 1 << 20}
    async with reading(redis_url, relay, **kept) as stats:
        first, second = repo.commit([create(1)]), repo.commit([create(2)])
        relay.emit(first, second)
        await until(lambda: stats.last_seq == second.seq)
        assert counted(stats) == {"unverified": 2}
        await known(stats, relay, sim, repo)
    assert asked(sim) == 1
    before = len(await commits(redis))
    async with reading(redis_url, relay, **kept) as stats:  # the next process has kept it
        relay.emit(repo.commit([create(3)]))
        await until(lambda: stats.commits > 1 or stats.verdicts["ok"] == 1)
    assert asked(sim) == 1
    assert len(await commits(redis)) == before + 1
    assert await repairs(redis) == {}


@pytest.mark.parametrize("form", ["json", "native", "frame"])
async def test_what_the_account_did_not_sign_is_set_aside_and_dropped(
    form: str, redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts
) -> None:
    repo, key = signing(sim)
    async with reading(redis_url, relay, verify="signed", plc_url=sim.directory.url, stream_format=form) as stats:
        await known(stats, relay, sim, repo)
        before = asked(sim)
        repo.key = SigningKey("a stranger")
        forged = repo.commit([create(7)])
        relay.emit(forged)
        await until(lambda: stats.verdicts["bad_signature"] == 1 and stats.last_seq == forged.seq)
        await until(lambda: not stats.outbox_items and not stats.unverified)
        assert asked(sim) == before, "it was asked for within the hour"
        assert stats.drops["bad_signature"] == 1
        repo.key = key
    assert "app.bsky.feed.like/" + create(7)[1].rpartition("/")[2] not in {
        f"{op.collection}/{op.rkey}" for one in await commits(redis) for op in one.ops
    }
    told = (await repairs(redis))[DID]
    assert (told["reason"], told["seq"]) == ("bad_signature", forged.seq)
    assert await redis.xlen(ASIDE) == 0


async def test_a_rotated_key(redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts, tmp_path: Path) -> None:
    """The first commit that the new key signed waits until the directory was asked, and is on the stream then."""
    repo, _ = signing(sim)
    kept = {"verify": "full", "plc_url": sim.directory.url, "home": str(tmp_path), "chain_bytes": 1 << 20}
    async with reading(redis_url, relay, **kept) as stats:
        await known(stats, relay, sim, repo)
    new = repo.key = SigningKey("another", "p256")
    rotated = repo.commit([create(8)])
    async with reading(redis_url, relay, **kept) as stats:  # a key of the file: it was not asked for within the hour
        relay.emit(rotated)
        await until(lambda: stats.last_seq == rotated.seq and stats.unverified == 1)
        await until(lambda: asked(sim) == 2)
        await until(lambda: stats.verdicts["bad_signature"] == 1)  # the directory shows the old one yet
    shows(sim, DID, new)
    again = repo.commit([create(9)])
    async with reading(redis_url, relay, **kept) as stats:
        relay.emit(again)
        await until(lambda: stats.verdicts["ok"] + stats.verdicts["break"] == 1)
    assert asked(sim) == 3
    assert (await commits(redis))[-1].rev == again_rev(again)
    assert await redis.xlen(ASIDE) == 0


def again_rev(frame: SimFrame) -> str:
    assert frame.event is not None
    rev: str = frame.event["rev"]
    return rev


async def test_an_identity_event_makes_a_key_old(redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts) -> None:
    repo, _ = signing(sim)
    async with reading(redis_url, relay, verify="signed", plc_url=sim.directory.url) as stats:
        await known(stats, relay, sim, repo)
        new = SigningKey("another")
        shows(sim, DID, new)
        repo.key = new
        relay.emit(identity_frame(repo.clock.tick(), DID, "a.test"))
        await until(lambda: asked(sim) == 2)
        before = stats.verdicts["ok"]
        async with asyncio.timeout(60):
            while stats.verdicts["ok"] == before:
                relay.emit(repo.commit([create(stats.frames)]))
                await asyncio.sleep(0.1)
    assert stats.verdicts["bad_signature"] == 0
    assert await redis.xlen(ASIDE) == 0


async def test_while_the_directory_is_away_it_waits(
    redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts, tmp_path: Path
) -> None:
    """Also over a restart: what waits is in Redis."""
    repo, _ = signing(sim)
    kept = {"verify": "signed", "plc_url": sim.directory.url, "home": str(tmp_path), "chain_bytes": 1 << 20}
    async with reading(redis_url, relay, **kept) as stats:
        await known(stats, relay, sim, repo)
    new = repo.key = SigningKey("another")
    shown, sim.documents[DID] = sim.documents[DID], 503
    frame = repo.commit([create(8)])
    async with reading(redis_url, relay, **kept) as stats:
        relay.emit(frame)
        await until(lambda: stats.unverified == 1 and asked(sim) == 2)
    assert await redis.xlen(ASIDE) == 1
    assert shown != sim.documents[DID]
    shows(sim, DID, new)
    async with reading(redis_url, relay, **kept) as stats:
        await until(lambda: stats.verdicts["ok"] == 1)
    assert (await commits(redis))[-1].rev == again_rev(frame)
    assert await redis.xlen(ASIDE) == 0


async def test_no_more_than_so_many_wait(
    redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastworker.reader.verify.ASIDE_MAX", 2)
    repo, _ = signing(sim)
    kept = {"verify": "signed", "plc_url": sim.directory.url, "home": str(tmp_path), "chain_bytes": 1 << 20}
    async with reading(redis_url, relay, **kept) as stats:
        await known(stats, relay, sim, repo)
    sim.documents[DID] = 503
    repo.key = SigningKey("a stranger")
    frames = [repo.commit([create(number)]) for number in range(5)]
    async with reading(redis_url, relay, **kept) as stats:
        relay.emit(*frames)
        await until(lambda: stats.last_seq == frames[-1].seq)
    assert (stats.verdicts["bad_signature"], await redis.xlen(ASIDE)) == (3, 2)
    assert DID in await repairs(redis)


# What the tree says


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("form", ["json", "native", "frame"])
async def test_ops_that_are_invented_are_dropped_and_hidden_ones_repaired(
    form: str, processes: int, redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts
) -> None:
    repo, _ = signing(sim)
    level = {"verify": "full", "verify_processes": processes, "plc_url": sim.directory.url}
    async with reading(redis_url, relay, stream_format=form, **level) as stats:
        await known(stats, relay, sim, repo)
        hides = repo.commit([create(21), create(22)])
        ops = libipld.decode_dag_cbor_multi(hides.data)[1]["ops"]
        relay.emit(changed(hides, ops=ops[:1]))
        await until(lambda: stats.verdicts["inversion"] == 1)
        invents = repo.commit([create(23), create(24)])
        ops = libipld.decode_dag_cbor_multi(invents.data)[1]["ops"]
        gone = {"action": "delete", "path": create(23)[1], "cid": None, "prev": ops[0]["cid"]}
        relay.emit(changed(invents, ops=[gone, ops[1]]))
        await until(lambda: stats.verdicts["inversion"] == 2 and stats.last_seq == invents.seq)
    first, second = (await commits(redis))[-2:]
    assert ([op.rkey for op in first.ops], first.drops) == ([create(21)[1].rpartition("/")[2]], [])
    assert [op.rkey for op in second.ops] == [create(24)[1].rpartition("/")[2]]
    assert [drop.reason for drop in second.drops] == ["unproved_op"]
    assert (await repairs(redis))[DID]["reason"] == "inversion"


@pytest.mark.parametrize("level", ["chain", "signed", "full"])
@pytest.mark.parametrize("how", ["too big", "another's"])
async def test_ops_without_a_signed_commit(
    how: str, level: str, redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts
) -> None:
    """Whoever can send a delete without a proof could empty an account."""
    repo, _ = signing(sim)
    async with reading(redis_url, relay, verify=level, plc_url=sim.directory.url) as stats:
        if level == "chain":
            relay.emit(repo.commit([create(1)]), repo.commit([create(2)]))
            await until(lambda: stats.verdicts["ok"] == 1)
        else:
            await known(stats, relay, sim, repo)
        frame = repo.commit([("delete", create(100_000)[1], None)])
        odd = {"tooBig": True, "blocks": b""} if how == "too big" else {"rev": tid(repo.clock.now_us + 1)}
        relay.emit(changed(frame, **odd))
        await until(lambda: stats.last_seq == frame.seq)
    verdict = "break" if how == "too big" else "bad_commit"
    assert stats.verdicts[verdict] == 1
    (last,) = (await commits(redis))[-1:]
    assert (len(last.ops), len(last.drops)) == ((1, 0) if level == "chain" else (0, 1))
    assert (await repairs(redis))[DID]["reason"] == verdict


# Provers


def provers() -> list[int]:
    """Process ids of this process's children that prove."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"fastworker.reader.prover" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


@pytest.mark.parametrize("level", ["signed", "full"])
async def test_provers_keep_the_order_and_are_replaced(
    level: str, redis_url: str, redis: Redis, relay: SimRelay, sim: SimHosts
) -> None:
    """Two processes, one of them killed in the middle: every commit is on the stream once, in order, and judged."""
    repo, _ = signing(sim)
    frames = [repo.commit([create(number)]) for number in range(1_500)]
    forged = Repo(DID, repo.clock, key=SigningKey("a stranger")).commit([create(99_999)])
    settings = {"verify": level, "verify_processes": 2, "plc_url": sim.directory.url}
    async with reading(redis_url, relay, **settings) as stats:
        relay.emit(frames[0])
        await until(lambda: asked(sim) == 1)
        await asyncio.sleep(0.5)
        relay.emit(*frames[1:700])
        await until(lambda: stats.verdicts["ok"] > 300)
        first = provers()
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        relay.emit(*frames[700:], forged)
        await until(lambda: stats.last_seq == forged.seq and stats.verdicts["bad_signature"] == 1)
        assert len(provers()) == 2
    assert counted(stats) == {"unverified": 1, "ok": 1_499, "bad_signature": 1}
    assert [one.rev for one in await commits(redis)] == [again_rev(frame) for frame in frames]
    await until(lambda: not provers())

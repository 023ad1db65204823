"""Hostile bytes through the whole path: nobody dies, the good ones beside them are stored, every drop has a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import asyncpg
import libipld
import pytest

from fastworker.errors import Reason
from fastworker.simulator.hostile import hostile_frames
from fastworker.simulator.network import Network
from fastworker.simulator.repo import START_SEQ, SimFrame
from tests.e2e.house import House

KINDS = 400


def sampled(count: int = KINDS) -> list[tuple[str, bytes]]:
    """Evenly from all of them: damage is most of them, and the ones written by hand come first."""
    frames = [(name, data) for name, data in hostile_frames() if len(data) < 200_000]
    step = len(frames) / count
    return [frames[int(n * step)] for n in range(count)]


def good(count: int) -> list[SimFrame]:
    """Commits with one create each, so that each has one row to look for."""
    frames = Network(11, accounts=100, start_seq=START_SEQ + 100_000).frames(count * 3)
    found = [
        f for f in frames
        if f.event is not None and f.event["kind"] == "commit" and len(f.event["ops"]) == 1
        and f.event["ops"][0]["action"] == "create" and f.event["ops"][0]["path"].startswith("app.bsky.feed.post/")
    ]  # fmt: skip
    return found[:count]


def members(data: bytes) -> list[dict[str, Any]]:
    try:
        parts = libipld.decode_dag_cbor_multi(data)
    except ValueError:
        return []
    return [part for part in parts if isinstance(part, dict)]


def ends_the_connection(data: bytes) -> bool:
    """An error frame. A relay that replays it for ever is tests/integration/test_reader.py's business."""
    return any(part.get("op") == -1 for part in members(data)[:1])


def leaps(data: bytes) -> bool:
    """Beyond every seq of the good ones: what comes after it is old, and the relay has said so itself."""
    return any(isinstance(part.get("seq"), int) and part["seq"] > START_SEQ + 1_000 for part in members(data))


async def assert_stored(frames: list[SimFrame], pg: asyncpg.Connection) -> None:
    uris = [f"at://{f.event['repo']}/{f.event['ops'][0]['path']}" for f in frames if f.event]
    found = {r[0] for r in await pg.fetch("SELECT uri FROM posts WHERE uri = ANY($1)", uris)}
    assert found == set(uris)


async def test_through_the_reader(house: House, pg: asyncpg.Connection) -> None:
    friends = good(150)
    mixed: list[bytes] = []
    for n, (_, data) in enumerate(sampled()):
        if not (ends_the_connection(data) or leaps(data)):
            mixed.append(data)
        if n % 3 == 0 and n // 3 < len(friends) - 1:
            mixed.append(friends[n // 3].data)
    mixed.append(friends[-1].data)
    served = [*friends[: (KINDS + 2) // 3], friends[-1]]
    await house.ingest(mixed, form="json", last_seq=friends[-1].seq or 0)
    await assert_stored(served, pg)
    assert house.stats.frames >= KINDS
    ledger = await house.ledger()
    assert sum(ledger.values()) == await house.redis.xlen("firehose:events")
    refused = sum(house.stats.drops.values())
    assert refused > 20
    assert house.stats.set_aside > 20
    letters = await house.letters()
    assert len(letters) >= house.stats.set_aside
    assert {letter["reason"] for letter in letters} <= {str(reason) for reason in Reason}


async def test_straight_onto_the_stream(house: House, pg: asyncpg.Connection) -> None:
    """What no reader of ours writes: hostile frames as entries, and entries that are no entries."""
    friends = good(300)
    hostile = [{b"f": data, b"relay": b"x"} for _, data in sampled(200)]
    hostile += [{b"n": data} for _, data in sampled(100)]
    hostile += [{b"type": b"commit", b"data": data, b"seq": b"1"} for data in broken_json()]
    hostile += [{b"what": b"ever"}, {b"type": b"", b"data": b"", b"seq": b""}, {b"n": b""}, {b"f": b""}]
    entries = []
    for n, friend in enumerate(friends):
        entries.append({b"f": friend.data, b"relay": b"sim.test"})
        entries += hostile[n :: len(friends)]
    await house.entries(entries)
    await assert_stored(friends, pg)
    ledger = await house.ledger()
    assert sum(ledger.values()) == len(entries)
    letters = await house.letters()
    assert len(letters) == ledger["set_aside"] > 100
    assert all(letter["reason"] and letter["origId"] and letter["error"] for letter in letters)


def broken_json() -> list[bytes]:
    did = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
    ops: list[Any] = [
        None, 7, "x", [], {}, [None], [7], [{}], [{"action": "create"}], [{"action": 1, "path": 2}],
        [{"action": "create", "path": "app.bsky.feed.post/a", "cid": "x", "record": []}],
        [{"action": "create", "path": "app.bsky.feed.post/a", "cid": "x", "record": {"text": {"a": 1}}}],
        [{"action": "create", "path": "app.bsky.feed.post", "cid": "x", "record": {}}],
        [{"action": "create", "path": "../../etc/passwd", "cid": "x", "record": {}}],
        [{"action": "explode", "path": "app.bsky.feed.post/a", "cid": "x", "record": {}}],
    ]  # fmt: skip
    documents = [json.dumps({"repo": did, "ops": o}).encode() for o in ops]
    documents += [json.dumps({"repo": repo, "ops": []}).encode() for repo in (None, 7, "", "alice.test", "did:plc")]
    return [*documents, b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 5_000, b'{"repo":"\\ud800"}', b"1e999"]


@pytest.mark.real_data
async def test_records_that_others_call_invalid(real_data: Path, house: House, pg: asyncpg.Connection) -> None:
    """interop data-model vectors as records of an unknown collection: stored or dropped with a reason, never stuck."""
    did = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
    folder = real_data / "interop" / "data-model"
    vectors = [
        v["json"] for name in ("valid", "invalid") for v in json.loads((folder / f"data-model-{name}.json").read_text())
    ]
    entries = []
    for n, record in enumerate(vectors):
        ops = [{"action": "create", "path": f"com.example.vector/v{n}", "cid": "bafyx", "record": record}]
        ops.append({"action": "create", "path": f"com.example.good/g{n}", "cid": "bafyx", "record": {"n": n}})
        data = json.dumps({"repo": did, "ops": ops, "rev": "3mptbypluud2a"}).encode()
        entries.append({b"type": b"commit", b"data": data, b"seq": str(n + 1).encode()})
    assert len(vectors) > 10
    await house.entries(entries)
    assert sum((await house.ledger()).values()) == len(entries)
    set_aside = (await house.ledger()).get("set_aside", 0)
    stored = await pg.fetchval("SELECT count(*) FROM generic_records WHERE record_type = 'com.example.good'")
    assert stored == len(entries) - set_aside
    assert set_aside == len(await house.letters()) <= 2

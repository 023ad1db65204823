"""`fastworker compare` on real servers: each way in which a table can differ from the newest entries, and none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from fastworker.commands import compare
from fastworker.config import parse_config
from fastworker.errors import ExitCode, Unreachable
from fastworker.store.store import Store
from tests.property.feeding import batch_of, settle
from tests.replies import read, to_add
from tests.rig.histories import DIDS, Event, cid_of, number, to_entry
from tests.servers import counts_reads

STREAM, GROUP = "firehose:events", "firehose-processors"
POST, LIKE, LIST = "app.bsky.feed.post", "app.bsky.feed.like", "app.bsky.graph.list"


def step(collection: str, rkey: str, record: dict[str, Any] | None) -> Event:
    op: dict[str, Any] = {"action": "delete", "path": f"{collection}/{rkey}", "cid": None}
    if record is not None:
        full = {"$type": collection, "createdAt": "2026-01-01T00:00:00Z", **record}
        op |= {"action": "create", "cid": cid_of(full), "record": full}
    return {"kind": "commit", "repo": DIDS[0], "bare": False, "ops": [op]}


def post(rkey: str, text: str = "hi") -> Event:
    return step(POST, rkey, {"text": text})


def like(rkey: str, of: str) -> Event:
    return step(LIKE, rkey, {"subject": {"uri": f"at://{DIDS[1]}/{POST}/{of}", "cid": cid_of(of)}})


class House:
    def __init__(self, redis: Redis, redis_url: str, postgres_url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.redis = redis
        self.config = parse_config({"REDIS_URL": redis_url, "DATABASE_URL": postgres_url})
        self.url = postgres_url
        self._capsys = capsys

    async def stream(self, events: Iterable[Event], *, acked: bool = True) -> None:
        """On the stream, and taken by another worker, which stores nothing."""
        if not await self.redis.exists(STREAM):
            await self.redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        for event in events:
            await self.redis.xadd(STREAM, to_add(to_entry(event)))
        found = read(await self.redis.xreadgroup(GROUP, "python-worker-0", {STREAM: ">"}))
        if acked:
            await self.redis.xack(STREAM, GROUP, *(entry_id for entry_id, _ in found))

    async def store(self, *events: Event) -> None:
        store = await Store.connect(self.url)
        await store.write(batch_of(events))
        await settle(store)
        await store.close()

    async def compare(self) -> tuple[ExitCode, dict[str, Any]]:
        code = await compare.compare(self.config, entries=100, seconds=0.1, as_json=True)
        return code, json.loads(self._capsys.readouterr().out)


@pytest.fixture
async def house(
    redis_url: str, postgres_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[House]:
    monkeypatch.setattr(compare, "LOOK_AGAIN_S", 0.0)  # nobody else writes
    async with Redis.from_url(redis_url) as redis:
        yield House(redis, redis_url, postgres_url, capsys)


async def test_what_equals_the_law(house: House) -> None:
    """Also what is not in a table for a reason: a twin, a deleted record, an account that is gone."""
    events = number(
        [
            post("a"),
            like("1", "x"),
            like("2", "x"),  # its twin
            post("gone"),
            step(POST, "gone", None),
            step(LIST, "l", {"name": "L", "purpose": "app.bsky.graph.defs#modlist"}),
            {"kind": "identity", "did": DIDS[0], "handle": "a.test"},
            {**post("of-the-dead"), "repo": DIDS[2]},
            {"kind": "account", "did": DIDS[2], "active": False, "status": "deleted"},
        ],
        bare=False,
    )
    await house.stream(events)
    await house.store(*events)
    code, found = await house.compare()
    assert (code, found["examples"], found["drift"]) == (ExitCode.DONE, [], {})
    tables = {one["table"]: (one["records"], one["fastworker"], one["others"]) for one in found["tables"]}
    assert tables == {"posts": (3, 3, 0), "likes": (2, 2, 0), "lists": (1, 1, 0)}
    assert found["events"] == {"identities": 1, "accounts": 1}
    others = 9 if await counts_reads(house.redis) else None
    assert (found["entries"], found["share"]["others_ever"]) == (9, others)
    assert [(one["name"], one["who"]) for one in found["consumers"]] == [("python-worker-0", "other")]


@pytest.mark.parametrize("together", [True, False])
async def test_an_identity_that_names_no_handle_is_not_missing(house: House, *, together: bool) -> None:
    """Its seq is kept nowhere, not even where an older event of the same user left one."""
    identity: Event = {"kind": "identity", "did": DIDS[0], "handle": "a.test"}
    events = number([identity, {**identity, "handle": None}], bare=False)
    await house.stream(events)
    for some in [events] if together else [[event] for event in events]:
        await house.store(*some)
    code, found = await house.compare()
    assert (code, found["events"]) == (ExitCode.DONE, {"identities": 1, "accounts": 0})


async def test_what_differs(house: House, pg: asyncpg.Connection, capsys: pytest.CaptureFixture[str]) -> None:
    events = number(
        [
            post("kept"),
            post("stale", "old"),
            step(POST, "stale", {"text": "new"}),
            post("left"),
            step(POST, "left", None),
            post("dropped"),
            post("theirs"),
            like("1", "x"),
            {"kind": "identity", "did": DIDS[0], "handle": "a.test"},
        ],
        bare=False,
    )
    await house.stream(events)
    await house.store(events[0], events[1], events[3], events[7])
    await pg.execute(
        "INSERT INTO posts (uri, cid, author_did, text, created_at) VALUES ($1, $2, $3, 'hi', now())",
        f"at://{DIDS[0]}/{POST}/theirs",
        events[6]["ops"][0]["cid"],
        DIDS[0],
    )
    await pg.execute("UPDATE post_aggregations SET like_count = 7")
    code, found = await house.compare()
    assert code is ExitCode.NO
    posts = next(one for one in found["tables"] if one["table"] == "posts")
    assert {name: count for name, count in posts.items() if name != "table"} == {
        "records": 5,
        "fastworker": 2,
        "others": 1,
        "missing": 1,
        "differ": 2,
        "left_over": 1,
    }
    assert found["events"] == {"identities": 1, "identities_missing": 1, "accounts": 0}
    assert found["drift"]["post_aggregations"] == 4, "three of ours, and the row that theirs lacks"
    examples = {
        one.split()[1].rpartition("/")[2]: one.split(None, 2)[2] for one in found["examples"] if "posts " in one
    }
    assert examples["dropped"] == "is missing"
    assert examples["left"] == "was deleted and is still there"
    assert examples["stale"].startswith("differs in cid, text")
    assert "tags" not in examples["theirs"]
    assert examples["theirs"].endswith("created_at, indexed_at (another worker's row)")

    assert await compare.compare(house.config, entries=100, seconds=0.1, as_json=False) is ExitCode.NO
    said = capsys.readouterr().out
    assert "The newest 9 finished entries" in said
    assert "1 of 1 identities are missing." in said
    assert "`fastworker worker --reapply` and then `fastworker verify --repair` mend it" in said


async def test_what_is_not_finished_is_not_judged(house: House) -> None:
    """An entry that somebody holds, and a record that a later entry changes."""
    first, second, held = number([post("a", "old"), post("a", "new"), post("held")], bare=False)
    await house.stream([first])
    await house.stream([second, held], acked=False)
    code, found = await house.compare()
    assert (code, found["entries"], found["share"]["pending"]) == (ExitCode.DONE, 3, 2)


async def test_nothing_to_compare(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unreachable, match="no group firehose-processors"):
        await house.compare()
    await house.redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    assert await compare.compare(house.config, entries=100, seconds=0.1, as_json=False) is ExitCode.DONE
    assert "set FASTWORKER_KEEP_SECONDS" in capsys.readouterr().out

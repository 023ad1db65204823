"""The tables depend on the set of events only: any order, any batch cuts, duplicates, several writers at once.

Random histories over few accounts, so that everything collides; the real writer on a real PostgreSQL against the model.
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from fastworker.event import Account, Commit, Identity, Op
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.store.store import Store
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit
from tests.property.feeding import batch_of, clear, differences, lawful, settle
from tests.rig.histories import Event, cid_of, number
from tests.runs import usually

POST = "app.bsky.feed.post"
RKEYS = ["r1", "r2", "r3"]
BASE = datetime(2026, 1, 1, tzinfo=UTC)
ALPHABET = "234567abcdefghijklmnopqrstuvwxyz"
COLLECTIONS = [
    *[POST] * 6,
    *["app.bsky.feed.like"] * 6,
    *["app.bsky.feed.repost"] * 3,
    *["app.bsky.graph.follow"] * 3,
    *["app.bsky.feed.threadgate"] * 2,
    *["app.bsky.graph.verification"] * 2,
    "app.bsky.graph.block",
    "app.bsky.bookmark",
    "app.bsky.graph.list",
    "app.bsky.graph.listitem",
    "app.bsky.graph.listblock",
    "app.bsky.feed.generator",
    "app.bsky.graph.starterpack",
    "app.bsky.labeler.service",
    "com.atproto.label.label",
    "app.bsky.feed.postgate",
    "app.bsky.actor.profile",
    "com.example.unknown",
]


def tid(number: int) -> str:
    return "".join(ALPHABET[number >> shift & 31] for shift in range(60, -1, -5))


def cid(number: int) -> str:
    return "bafyrei" + tid(number).rjust(52, "a")


def iso(seconds: int) -> str:
    return (BASE + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def history(seed: int, length: int = 60) -> list[dict[str, Any]]:
    r = random.Random(seed)
    dids = [f"did:plc:{c * 24}" for c in "abcd"[: r.choice([2, 3, 4])]]

    def uri(collection: str) -> str:
        return f"at://{r.choice(dids)}/{collection}/{r.choice(RKEYS)}"

    def ref(of: str) -> dict[str, Any]:
        return {"uri": of, "cid": cid(r.randrange(9))}

    def subject() -> str:
        services = [uri("app.bsky.feed.generator"), f"at://{r.choice(dids)}/app.bsky.labeler.service/self"]
        return r.choice([uri(POST)] * 6 + services)

    def record(collection: str, did: str, rkey: str) -> dict[str, Any]:
        made: dict[str, Any] = {"$type": collection, "createdAt": iso(r.randrange(-100, 200))}
        gated = f"at://{did}/{POST}/{rkey}"
        match collection.rpartition(".")[2]:
            case "post":
                made["text"] = r.choice("abc")
                if r.random() < 0.6:
                    made["reply"] = {"parent": ref(uri(POST)), "root": ref(uri(POST))}
                if r.random() < 0.3:
                    made["embed"] = {"$type": "app.bsky.embed.record", "record": ref(subject())}
                if r.random() < 0.3:
                    mention = {"$type": "app.bsky.richtext.facet#mention", "did": r.choice(dids)}
                    made["facets"] = [{"index": {"byteStart": 0, "byteEnd": 1}, "features": [mention]}]
            case "like" | "repost" | "bookmark":
                made["subject"] = ref(subject())
            case "follow" | "block":
                made["subject"] = r.choice([*dids, "did:plc:" + "z" * 24])
            case "list":
                made |= {"name": r.choice("xy"), "purpose": "app.bsky.graph.defs#curatelist"}
            case "listitem":
                owner = did if r.random() < 0.8 else r.choice(dids)
                made |= {"subject": r.choice(dids), "list": f"at://{owner}/app.bsky.graph.list/{r.choice(RKEYS[:2])}"}
            case "listblock":
                made["subject"] = uri("app.bsky.graph.list")
            case "generator":
                made |= {"did": r.choice(dids), "displayName": r.choice("gh")}
            case "starterpack":
                feeds = [{"uri": uri("app.bsky.feed.generator")}]
                made |= {"name": "s", "list": uri("app.bsky.graph.list"), "feeds": feeds}
            case "service":
                made["policies"] = {"labelValues": [r.choice("ab")]}
            case "label":
                made |= {"src": did, "uri": uri(POST), "val": r.choice(["spam", "x"]), "cts": made["createdAt"]}
            case "verification":
                made |= {"subject": r.choice(dids), "handle": r.choice(["a.b", "c.d"]), "displayName": "x"}
            case "threadgate":
                made["post"] = gated
                rules = [{"$type": f"app.bsky.feed.threadgate#{rule}Rule"} for rule in ("mention", "following")]
                if r.random() < 0.7:
                    made["allow"] = r.sample(rules, r.randrange(3))
            case "postgate":
                made |= {"post": gated, "embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}]}
            case "profile":
                made |= {"displayName": r.choice("AB"), "description": r.choice("cd")}
        return made

    events = []
    seq = 1000
    for now in range(length):
        seq += r.randrange(1, 3)
        did, chance = r.choice(dids), r.random()
        base = {"seq": seq, "time": iso(now)}
        if chance < 0.04:
            handle = r.choice([None, "a.test", "b.test", "handle.invalid"])
            events.append({"kind": "identity", "did": did, "handle": handle, **base})
        elif chance < 0.08:
            status = r.choice([None, "deleted", "deleted", "takendown", "deactivated"])
            events.append({"kind": "account", "did": did, "active": status is None, "status": status, **base})
        else:
            ops = []
            for _ in range(r.choice([1] * 6 + [2, 3])):
                collection = r.choice(COLLECTIONS)
                own = collection in ("app.bsky.actor.profile", "app.bsky.labeler.service")
                rkey = "self" if own else r.choice(RKEYS)
                op: dict[str, Any] = {
                    "action": r.choice(["create"] * 5 + ["update"] + ["delete"] * 3),
                    "path": f"{collection}/{rkey}",
                }
                if op["action"] != "delete":
                    op |= {"cid": cid(r.randrange(1000)), "record": record(collection, did, rkey)}
                ops.append(op)
            events.append({"kind": "commit", "repo": did, "rev": tid(10**15 + seq), "ops": ops, **base})
    return events


def put(batch: Batch, event: dict[str, Any]) -> None:
    at = datetime.fromisoformat(event["time"])
    if event["kind"] == "commit":
        ops = [
            Op(op["action"], collection, rkey, op.get("cid"), None, op.get("record"))
            for op in event["ops"]
            for collection, _, rkey in [op["path"].partition("/")]
        ]
        batch.put(map_commit(Commit(event["seq"], event["repo"], event["rev"], event["time"], ops, []), 1))
    elif event["kind"] == "identity":
        handle = None if event["handle"] in (None, "handle.invalid") else event["handle"]
        batch.put_identity(Identity(event["seq"], event["did"], handle, event["time"]), at)
    else:
        account = Account(event["seq"], event["did"], event["active"], event["status"], event["time"])
        batch.put_account(account, at)


async def deliver(store: Store, events: list[dict[str, Any]], r: random.Random) -> None:
    at = 0
    while at < len(events):
        size = r.choice([1, 1, 2, 3, 5, 8, 20, len(events)])
        batch = Batch()
        for event in events[at : at + size]:
            put(batch, event)
        await store.write(batch)
        at += size


@pytest.mark.parametrize("first", usually([0, 300, 600], 0))
async def test_tables_follow_the_set_of_events(first: int, postgres_url: str, pg: asyncpg.Connection) -> None:
    for seed in range(first, first + 4):
        await clear(pg)
        r = random.Random(seed)
        events = history(seed)
        delivered = events + r.sample(events, len(events) // 4)
        match r.choice(["ordered", "window", "shuffled"]):
            case "ordered":
                delivered.sort(key=lambda event: event["seq"])
            case "window":
                delivered.sort(key=lambda event: event["seq"] + r.randrange(30))
            case "shuffled":
                r.shuffle(delivered)
        writers = r.choice([1, 2, 3])
        stores = [await Store.connect(postgres_url) for _ in range(writers)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for n, store in enumerate(stores):
                    tasks.create_task(deliver(store, delivered[n::writers], random.Random(seed * 7 + n)))
            while await stores[0].maintain(owed_age_s=0):
                pass
        finally:
            for store in stores:
                await store.close()
        model = Model()
        for event in events:
            model.apply(event, 1)
        differences = compare.diff(model.tables(), await compare.dump(pg))
        assert not differences, f"history({seed}), {writers} writers: {compare.report(differences)}"


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"])
async def test_the_ends_of_time_survive_a_move(time: str, postgres_url: str, pg: asyncpg.Connection) -> None:
    """A like gives its pair up to an older record and takes it back: its row is read, and written as it was."""
    events: list[Event] = []
    for name, action in (("l2", "create"), ("l1", "create"), ("l1", "delete")):
        record = {
            "$type": "app.bsky.feed.like",
            "subject": {"uri": "at://did:plc:b/app.bsky.feed.post/p", "cid": cid_of("p")},
            "createdAt": time,
        }
        op: dict[str, Any] = {
            "action": action,
            "path": f"app.bsky.feed.like/{name}",
            "cid": cid_of(record),
            "record": record,
        }
        if action == "delete":
            op |= {"cid": None}
            del op["record"]
        events.append({"kind": "commit", "repo": f"did:plc:{'a' * 24}", "bare": False, "ops": [op]})
    events = [event | {"time": time} for event in number(events, bare=False)]
    store = await Store.connect(postgres_url)
    try:
        for event in events:
            await store.write(batch_of([event]))
        await settle(store)
    finally:
        await store.close()
    expected = lawful(events)
    assert [row["uri"][-2:] for row in expected["likes"]] == ["l2"]
    assert await differences(expected, pg) == "no difference"

"""Simulated traffic through the whole path equals the model, whatever the form, the mix and the accidents."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from fastworker.law.compare import Tables, diff, dump, report
from fastworker.law.model import Model
from fastworker.simulator.network import Network
from fastworker.simulator.repo import SimFrame
from tests.e2e.house import GROUP, KEY, Form, House
from tests.rig.histories import to_entry
from tests.sdk_dialect import predecessor

EVENTS = 1_500


def model_of(frames: list[SimFrame]) -> Tables:
    model = Model()
    for frame in frames:
        if frame.event is not None:
            model.apply(frame.event)
    return model.tables()


async def assert_equal(expected: Tables, pg: asyncpg.Connection) -> None:
    differences = diff(expected, await dump(pg))
    assert not differences, report(differences)


@pytest.mark.parametrize(
    ("mix", "form"),
    [
        ("production", "json"),
        ("adversarial", "native"),
        ("adversarial", "frame"),
        *(
            pytest.param(*pair, marks=pytest.mark.extended)
            for pair in (("adversarial", "json"), ("production", "native"), ("production", "frame"))
        ),
    ],
)
async def test_both_mixes_in_every_form(house: House, pg: asyncpg.Connection, mix: Any, form: Form) -> None:
    frames = list(Network(5, mix=mix, accounts=300 if mix == "production" else 8).frames(EVENTS))
    await house.ingest(frames, form=form, last_seq=max(frame.seq or 0 for frame in frames))
    assert await house.letters() == []
    assert sum((await house.ledger()).values()) == await house.redis.xlen(KEY)
    await assert_equal(model_of(frames), pg)


# Collections that the SDK knows: it dumps them in its dialect; all others are plain dictionaries to it.
SDK = ("app.bsky.", "com.atproto.")


def sdk_entry(event: dict[str, Any]) -> dict[bytes, bytes] | None:
    """The entry that the predecessor's reader writes: the SDK's dialect, neither rev nor time, seq as text."""
    if event["kind"] != "commit":
        return to_entry(event)
    ops = []
    for op in event["ops"]:
        dumped = {name: op[name] for name in ("action", "path", "cid") if op.get(name)}
        if "record" in op:
            record = op["record"]
            known = isinstance(record, dict) and op["path"].startswith(SDK)
            try:
                dumped["record"] = predecessor(record) if known else record
            except (AssertionError, TypeError, KeyError):
                return None  # a shape that the SDK refuses, and its reader drops
        ops.append(dumped)
    data = {"repo": event["repo"], "ops": ops}
    return {b"type": b"commit", b"data": json.dumps(data).encode(), b"seq": str(event["seq"]).encode()}


async def test_the_predecessor_s_dialect_gives_the_same_tables(house: House, pg: asyncpg.Connection) -> None:
    frames = [f for f in Network(9, accounts=200).frames(EVENTS) if f.event is not None and f.event["kind"] != "sync"]
    pairs = [(frame, entry) for frame in frames if frame.event and (entry := sdk_entry(frame.event)) is not None]
    assert len(pairs) > 0.95 * len(frames)  # what the converter knows is nearly everything
    assert sum(b"py_type" in entry[b"data"] for _, entry in pairs) > 1_000
    await house.entries(entry for _, entry in pairs)
    assert await house.letters() == []
    expected = model_of([frame for frame, _ in pairs])
    for post in expected["posts"]:  # an explicit type where it is implied is what the dialect loses
        if post["embed"] and post["embed"]["$type"] == "app.bsky.embed.recordWithMedia":
            post["embed"]["record"].pop("$type", None)
    found = await dump(pg)
    wrong = [d for d in diff(expected, found) if d.column not in {"commit_time", "commit_rev"}]
    assert not wrong, report(wrong)


async def test_killed_connections_repeats_and_a_second_reading_change_nothing(
    house: House, pg: asyncpg.Connection
) -> None:
    frames = list(Network(6, mix="adversarial").frames(800))
    last = max(frame.seq or 0 for frame in frames)
    await house.ingest(frames, form="json", last_seq=last)
    expected = model_of(frames)
    await assert_equal(expected, pg)
    # everything once more, as after a lost group
    await house.redis.xgroup_setid(KEY, GROUP, "0")
    await house.redis.delete("fastworker:ledger")
    async with house.worker(), asyncio.timeout(60):
        for _ in range(5):
            await asyncio.sleep(0.05)
            await pg.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fastworker' "
                "AND datname = current_database()"
            )
        await house.settled()
    await assert_equal(expected, pg)

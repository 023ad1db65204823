"""Half of the entries are taken by a worker in the predecessor's style; afterwards everything can be made right."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from fastworker.commands.reapply import reapply
from fastworker.commands.verify import VerifyOptions, verify
from fastworker.config import Config
from fastworker.errors import ExitCode
from fastworker.law.compare import dump
from fastworker.store.rules import DEFAULTS
from fastworker.stream.keys import USUAL
from fastworker.table import derive
from tests import replies
from tests.e2e.house import GROUP, KEY, House
from tests.property.feeding import differences, lawful
from tests.rig.foreign import Foreign
from tests.rig.histories import random_history, to_recording

EVENTS = 900


async def test_reapply_and_verify_make_it_right(
    redis_url: str, postgres_url: str, pg: asyncpg.Connection, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nobody writes any more when it verifies: what differs need not be waited for
    monkeypatch.setattr("fastworker.commands.verify.LOOK_AGAIN_S", (0.0,))
    monkeypatch.setattr("fastworker.commands.verify.LOOK_AGAIN_JOINED_S", (0.0,))
    history = random_history(8, EVENTS, bare=False)
    order = list(chain.from_iterable(history.batches))
    async with Redis.from_url(redis_url) as redis:
        house = House(redis, redis_url, postgres_url)
        foreign, taken = Foreign(pg), 0
        shown: set[tuple[str, str]] = set()  # DID and handle, as the old worker wrote them

        async def old_worker() -> None:
            nonlocal taken
            while True:
                found = await redis.xreadgroup(GROUP, "python-worker-0", {KEY: ">"}, count=10, block=1_000)
                for entry_id, fields in replies.read(found):
                    event = history.events[int(fields[b"seq"]) - history.events[0]["seq"]]
                    await foreign.apply(event)
                    if event["kind"] == "identity" and event["handle"] not in (None, "handle.invalid"):
                        shown.add((event["did"], event["handle"].lower()))
                    await redis.xack(KEY, GROUP, entry_id)
                    taken += 1

        async with house.worker():
            old = asyncio.create_task(old_worker())
            for start in range(0, len(order), 8):
                pipe = redis.pipeline(transaction=False)
                for position in order[start : start + 8]:
                    pipe.xadd(KEY, replies.to_add(to_recording(history.events[position])))
                await pipe.execute()
                await asyncio.sleep(0.01)
            async with asyncio.timeout(90):
                while await house.unread() or await house.pending():
                    await asyncio.sleep(0.05)
            old.cancel()
            await asyncio.wait([old])
        ledger = replies.counts(await redis.hgetall(USUAL.ledger))
        ours = sum(count for name, count in ledger.items() if not name.startswith("drop:"))
        assert taken > EVENTS / 20, "the old worker took hardly anything"
        assert ours > EVENTS / 10, "ours took hardly anything"

    expected = lawful(history.events)
    assert await differences(expected, pg) != "no difference"

    assert await verify(postgres_url, DEFAULTS, VerifyOptions(as_json=True)) is ExitCode.NO
    assert await verify(postgres_url, DEFAULTS, VerifyOptions(as_json=True, repair=True)) is ExitCode.DONE
    assert await verify(postgres_url, DEFAULTS, VerifyOptions(as_json=True)) is ExitCode.DONE

    settings = Config(redis_url=redis_url, database_url=postgres_url, derive=derive.FULL, resolve_handles=False)
    assert await reapply(settings, "0") is ExitCode.DONE
    assert await verify(postgres_url, DEFAULTS, VerifyOptions(as_json=True, repair=True)) is ExitCode.DONE
    # A follow of nobody ("subject": "") made the old worker a user of that name, which is nobody's to take away.
    await pg.execute("DELETE FROM users WHERE did = ''")
    # A handle that an old worker wrote counts as verified, until somebody else's is (show_handles.sql): who of those that
    # claim it comes first in the law may not be the one who shows it.
    found = {row["handle"]: row["did"] for row in (await dump(pg, ["users"]))["users"]}
    users = {row["did"]: row for row in expected["users"]}
    for row in expected["users"]:
        if ((holder := found.get(row["handle"], row["did"])), row["handle"]) in shown and holder != row["did"]:
            users[holder]["handle"], row["handle"] = row["handle"], "handle.invalid"
    assert await differences(expected, pg) == "no difference"
    capsys.readouterr()

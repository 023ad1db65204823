"""FASTWORKER_COLLECTIONS and FASTWORKER_ACCOUNTS in the reader: what is left out does not come onto the stream."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from redis.asyncio import Redis

from fastworker.event import Account, Commit, Identity
from fastworker.event.entry import decode_entry
from fastworker.reader.resume import read_and_resume
from fastworker.reader.stats import ReaderStats
from fastworker.simulator.network import Network
from fastworker.simulator.repo import SimFrame
from fastworker.table.chosen import choose, choose_accounts
from tests import replies
from tests.integration.test_reader import STREAM, Relay, cursor_is, redis, relay, settings, until  # noqa: F401

KEPT = ("app.bsky.feed.like", "app.bsky.graph.*")


@pytest.fixture
def everything_again() -> Iterator[None]:
    yield
    choose(())
    choose_accounts(None)


def said(frames: list[SimFrame], accounts: set[str] | None) -> tuple[Counter[tuple[str, ...]], int]:
    """What must come of these frames, and how many ops must not. `accounts` None: nothing is left out."""
    found: Counter[tuple[str, ...]] = Counter()
    left_out = 0
    for frame in frames:
        event = frame.event
        if event is None:
            continue
        if event["kind"] != "commit":
            found[event["kind"], event["did"]] += 1
        for op in event.get("ops", ()):
            collection = op["path"].partition("/")[0]
            is_kept = collection == KEPT[0] or collection.startswith("app.bsky.graph.")
            if accounts is None or op["action"] == "delete" or (is_kept and event["repo"] in accounts):
                found[op["action"], event["repo"], op["path"]] += 1
            else:
                left_out += 1
    return found, left_out


async def came(redis: Redis) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for _, fields in replies.entries(await redis.xrange(STREAM)):
        event = decode_entry(fields)
        match event:
            case Commit():
                assert event.ops
                found.update((op.action, event.repo, f"{op.collection}/{op.rkey}") for op in event.ops)
            case Identity():
                found["identity", event.did] += 1
            case Account():
                found["account", event.did] += 1
    return found


@pytest.mark.parametrize("form", ["json", "frame"])
async def test_only_what_nobody_else_reads_is_filtered(
    redis: Redis,
    relay: Relay,
    redis_url: str,
    tmp_path: Path,
    form: Literal["json", "frame"],
    everything_again: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    network = Network(5, accounts=9)
    narrow, wide = (list(network.frames(count)) for count in (500, 100))
    accounts = {one.did for one in network.world.accounts()[:4]}
    file = tmp_path / "accounts"
    file.write_text("\n".join(accounts))
    choose(KEPT)
    config = settings(redis_url, relay, collections=KEPT, accounts=str(file), stream_format=form)
    stop, stats = asyncio.Event(), ReaderStats()
    task = asyncio.create_task(read_and_resume(config, stop, stats=stats))

    async def comes(frames: list[SimFrame]) -> None:
        relay.frames.extend((frame.seq or 0, frame.data) for frame in frames)
        await until(cursor_is(redis, frames[-1].seq or 0))

    try:
        await until(lambda: relay.open)
        await redis.xgroup_create(STREAM, config.group, mkstream=True)
        await until(lambda: "what they leave out is not put on" in caplog.text)
        await comes(narrow)
        expected, left_out = said(narrow, accounts)
        assert await came(redis) == expected
        assert left_out > 100
        assert stats.drops["filtered"] + stats.drops["filtered_account"] == left_out
        assert min(stats.drops["filtered"], stats.drops["filtered_account"]) > 20
        assert sum(many for key, many in expected.items() if key[0] == "delete") > 10
        await redis.delete(STREAM)
        await redis.xgroup_create(STREAM, "somebody", mkstream=True)
        await until(lambda: "everything is put on: group somebody reads it, too" in caplog.text)
        await comes(wide)
        assert await came(redis) == said(wide, None)[0]
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)

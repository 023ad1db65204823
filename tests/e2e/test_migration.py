"""From old workers to fastworker and back, under load, as docs/migration.md tells it.

Old worker, both, fastworker, both, old worker, and in the end healed: every entry is handled by one or the other,
what fastworker handled is as the model has it, derived tables equal a recomputation, and after `--reapply` everything
equals the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from fastworker.commands.check import check
from fastworker.commands.compare import compare as run_compare
from fastworker.commands.reapply import reapply
from fastworker.commands.verify import VerifyOptions, verify
from fastworker.config import Config, parse_config
from fastworker.edge.embedded import EmbeddedPostgres, free_port
from fastworker.errors import ExitCode
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import SimFrame
from tests import replies
from tests.rig.foreign import OldWorker

ROOT = Path(__file__).resolve().parents[2]
KEY, GROUP, LEDGER, CURSOR = "firehose:events", "firehose-processors", "fastworker:ledger", "firehose:python_cursor"
RATE = 60
PRIMARY = ("posts", "likes", "reposts", "follows", "blocks", "lists", "list_items", "list_blocks", "feed_generators")
PAIRS = {
    "likes": ("user_did", "post_uri"),
    "reposts": ("user_did", "post_uri"),
    "follows": ("follower_did", "following_did"),
    "blocks": ("blocker_did", "blocked_did"),
    "list_items": ("list_uri", "subject_did"),
    "list_blocks": ("blocker_did", "list_uri"),
}


class Command:
    """A `fastworker` command as an operator runs it."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}

    async def start(self, *args: str, **env: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fastworker",
            *args,
            env={**self.env, **env},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    @contextlib.asynccontextmanager
    async def service(self, *args: str, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Stopped by SIGTERM at the end: it drains, and ends with 0."""
        process = await self.start(*args, **env)
        said = asyncio.create_task(process.stdout.read())  # type: ignore[union-attr]
        try:
            yield process
            assert process.returncode is None, (await said).decode()
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await process.wait() == 0, (await said).decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await said


def traffic(seed: int, served: list[SimFrame], done: asyncio.Event) -> Iterator[SimFrame]:
    network = Network(seed, accounts=300, weights={"app.bsky.actor.profile": 2.0})
    while not done.is_set():
        for frame in network.step():
            served.append(frame)
            yield frame


@contextlib.asynccontextmanager
async def old_worker(redis_url: str, database_url: str, *, is_cut_off: bool) -> AsyncIterator[OldWorker]:
    """Cut off, it leaves entries pending, which are adopted a minute later."""
    worker = OldWorker(redis_url, database_url)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
        assert not task.done(), task
        worker.stopping = True
        if not is_cut_off:
            async with asyncio.timeout(60):
                await task
    finally:
        task.cancel()
        await asyncio.wait([task])


def untouched(served: list[SimFrame], by_others: set[int]) -> tuple[set[str], set[str]]:
    """URIs, and pairs `table a b`, about which another worker handled nothing; nor of an account of which it did."""
    uris: dict[str, bool] = {}
    pairs: dict[str, str] = {}
    spoilt: set[str] = set()
    for frame in served:
        event = frame.event
        if event is None or frame.seq is None:
            continue
        theirs = frame.seq in by_others
        if event["kind"] == "account" and theirs:
            spoilt.add(event["did"])
        for op in event["ops"] if event["kind"] == "commit" else ():
            uri = f"at://{event['repo']}/{op['path']}"
            uris[uri] = uris.get(uri, True) and not theirs
            subject = (op.get("record") or {}).get("subject")
            pairs[uri] = f"{event['repo']} {json.dumps(subject, sort_keys=True)}" if subject else pairs.get(uri, uri)
    bad_pairs = {pairs[uri] for uri, clean in uris.items() if not clean}
    return {
        uri for uri, clean in uris.items() if clean and pairs[uri] not in bad_pairs and uri.split("/")[2] not in spoilt
    }, spoilt


def only(tables: compare.Tables, uris: set[str]) -> compare.Tables:
    # what follows from gates and likes of others is not this record's
    derived = {"has_thread_gate", "has_post_gate", "like_count"}
    return {
        name: [{c: v for c, v in row.items() if c not in derived} for row in tables[name] if row["uri"] in uris]
        for name in PRIMARY
    }


async def _unread(redis: Redis) -> bool:
    """Whether the group has not been handed the last entry; an old Redis does not count the lag."""
    last = (await redis.xinfo_stream(KEY))["last-generated-id"]
    return bool((await redis.xinfo_groups(KEY))[0]["last-delivered-id"] != last)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.extended)])
async def test_there_and_back(
    redis_url: str,
    postgres_url: str,
    pg: asyncpg.Connection,
    seconds: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": postgres_url,
        "CONSUMER_ID": "fastworker",
        "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_PROCESSES": "2" if seconds >= 60 else "1",
        "FASTWORKER_KEEP_SECONDS": "3600",
        "FASTWORKER_RESOLVE_HANDLES": "off",
        "FASTWORKER_SYNC": "off",
    }
    command, config = Command(env), parse_config(env)
    is_long = seconds >= 60  # and then the old worker is cut off, so that it leaves entries pending
    served: list[SimFrame] = []
    done = asyncio.Event()
    olds: list[OldWorker] = []

    async def compared(entries: int = 400) -> dict[str, Any]:
        await run_compare(config, entries=entries, seconds=1.0, as_json=True)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    async def verified(*, repair: bool = False) -> tuple[ExitCode, int]:
        code = await verify(postgres_url, config.rules, VerifyOptions(as_json=True, repair=repair))
        return code, json.loads(capsys.readouterr().out)["drift"]

    async with (
        Redis.from_url(redis_url, socket_timeout=60) as redis,
        SimRelay(traffic(3, served, done), rate=RATE, window=10_000_000, start="oldest", wait_for_client=True) as relay,
        command.service("reader", RELAY_URL=relay.url),
        contextlib.AsyncExitStack() as stack,
    ):
        async with old_worker(redis_url, postgres_url, is_cut_off=is_long) as old:
            olds.append(old)
            await asyncio.sleep(seconds / 5)
            await stack.enter_async_context(command.service("worker"))
            while not await redis.hgetall(LEDGER):
                await asyncio.sleep(0.05)
            await asyncio.sleep(seconds / 5)
            both = await compared()
            await check(config, as_json=True)
            checked = json.loads(capsys.readouterr().out)
        await asyncio.sleep(seconds / 5)
        alone = await compared()
        async with old_worker(redis_url, postgres_url, is_cut_off=is_long) as old:
            olds.append(old)
            await asyncio.sleep(seconds / 5)
            await stack.aclose()  # fastworker's worker drains and ends, while the old one works
            await asyncio.sleep(seconds / 5)
            done.set()
            last = max(frame.seq or 0 for frame in served)
            async with asyncio.timeout(60):
                while int(await redis.get(CURSOR) or 0) < last or await _unread(redis):
                    await asyncio.sleep(0.05)
        # what an old worker still held when it was cut off
        if left := (await redis.xpending(KEY, GROUP))["pending"]:
            assert is_long, left
            async with command.service("worker"), asyncio.timeout(100):
                while (await redis.xpending(KEY, GROUP))["pending"]:
                    await asyncio.sleep(0.1)

        # every event is handled by one or the other
        theirs = set.union(*(old.handled for old in olds))
        entries = replies.entries(await redis.xrange(KEY))
        info = await redis.xinfo_stream(KEY)
        ledger = replies.counts(await redis.hgetall(LEDGER))
        ours = sum(count for name, count in ledger.items() if not name.startswith("drop:"))
        assert info.get("entries-added", info["length"]) == info["length"] == len(entries) == ours + len(theirs)
        assert min(ours, len(theirs)) > 50, "one of them took hardly anything"
        seqs = {entry_id.decode(): int(fields[b"seq"]) for entry_id, fields in entries}
        on_stream = set(seqs.values())
        for frame in served:
            event = frame.event
            if event is not None and (event["kind"] != "commit" or event["ops"]) and event["kind"] != "sync":
                assert frame.seq in on_stream

    # while they ran side by side
    assert any("Other workers are active" in one["sentence"] for one in checked)
    share = both["share"]
    assert share["by_fastworker"] > 0
    knows = "entries-added" in info  # Redis 6.2 does not count what a group was given
    assert share["by_others"] > 0 if knows else share["by_others"] is None
    who = {one["name"].rpartition("-")[0]: one["who"] for one in both["consumers"]}
    assert who == {"python-worker": "other", "fastworker": "fastworker"}
    assert sum(table["others"] + table["missing"] for table in both["tables"]) > 0
    share = alone["share"]
    assert share["by_others"] == (0 if knows else None)
    assert share["by_fastworker"] > 0

    # what fastworker handled is as the law has it
    model = Model()
    for frame in served:
        if frame.event is not None:
            model.apply(frame.event)
    expected = model.tables()
    uris, _ = untouched(served, {seqs[entry_id] for entry_id in theirs})
    found = await compare.dump(pg)
    wanted = only(expected, uris)
    assert sum(map(len, wanted.values())) > len(entries) / 10
    assert compare.report(compare.diff(wanted, only(found, uris))) == "no difference"

    # derived tables equal a recomputation
    # nobody writes any more: what differs need not be waited for
    monkeypatch.setattr("fastworker.commands.verify.LOOK_AGAIN_S", (0.0,))
    monkeypatch.setattr("fastworker.commands.verify.LOOK_AGAIN_JOINED_S", (0.0,))
    code, drift = await verified()
    assert (code, drift > 0) == (ExitCode.NO, True), "the old worker left none?"
    assert (await verified(repair=True))[0] is ExitCode.DONE
    assert await verified() == (ExitCode.DONE, 0)

    # and everything is as the law has it once the retained entries were applied again
    assert (await compared(len(entries)))["tables"] != []
    settings = Config(redis_url=redis_url, database_url=postgres_url, resolve_handles=False)
    assert await reapply(settings, "0") is ExitCode.DONE
    assert f"{len(entries):,} entries applied again" in capsys.readouterr().out
    assert (await verified(repair=True))[0] is ExitCode.DONE
    assert compare.report(compare.diff(expected, await compare.dump(pg))) == "no difference"
    healed = await compared(len(entries))
    assert (healed["examples"], healed["entries"]) == ([], len(entries))


def test_a_server_starts_on_a_base_backup(server_dir: Path) -> None:
    """With the settings of docs/migration.md; its `pg_ctl` refuses to run as root, so that the copy is started our way."""
    original = EmbeddedPostgres(server_dir / "original", durable=False, port=free_port())
    tools = original.programs
    with original:
        count: list[str | Path] = [
            tools / "psql",
            original.url,
            "-XAtqc",
            "CREATE TABLE t AS SELECT generate_series(1, 7); SELECT count(*) FROM t",
        ]
        assert subprocess.run(count, check=True, capture_output=True, text=True).stdout == "7\n"
        copy = server_dir / "copy"
        copy.mkdir()
        backup: list[str | Path] = [
            "--dbname",
            original.url,
            "--pgdata",
            copy / "data",
            "--checkpoint=fast",
            "--wal-method=stream",
        ]
        subprocess.run([tools / "pg_basebackup", *backup], check=True, capture_output=True)
    if account := original._account:
        for path in (copy, *copy.rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid)
    with EmbeddedPostgres(copy, durable=False, port=free_port()) as restored:
        ask: list[str | Path] = [tools / "psql", restored.url, "-XAtqc", "SELECT count(*) FROM t"]
        assert subprocess.run(ask, check=True, capture_output=True, text=True).stdout == "7\n"

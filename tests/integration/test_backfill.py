# ruff: noqa: F811 - fixtures of another file
"""`fastworker backfill` and `repair --gap|--host`: many accounts, on simulated hosts, beside a running worker."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from fastworker.commands import backfill as history
from fastworker.commands.backfill import backfill
from fastworker.commands.repairs import RepairOptions, repair
from fastworker.config import Config, parse_config
from fastworker.errors import ExitCode
from fastworker.simulator import mst
from fastworker.store.repos import CHOSEN, REPAIR, Wanted, open_queue
from fastworker.stream.admin import open_redis
from fastworker.sync import gaps, many
from fastworker.sync.choice import Choice
from fastworker.sync.hosts import Bounds, Hosts
from fastworker.sync.lists import GAP
from fastworker.table.chosen import Part
from fastworker.table.snapshot import tid_of
from tests.integration.test_repairs import GROUP, STREAM, Scene, scene, worker  # noqa: F401 - fixtures
from tests.services import Service


def config_of(scene: Scene) -> Config:
    env = {"REDIS_URL": scene.config.redis_url, "DATABASE_URL": scene.config.database_url or ""}
    return parse_config({**env, "RELAY_URL": scene.sim.relay.url.replace("http", "ws")})


async def chosen(scene: Scene, **choice: Any) -> ExitCode:
    return await backfill(config_of(scene), Choice(**choice), asyncio.Event(), hosts=scene.hosts)


async def states(pg: asyncpg.Connection) -> dict[str, int]:
    rows = await pg.fetch("SELECT state, count(*) FROM fastworker.repos GROUP BY state")
    return {row["state"]: row["count"] for row in rows}


async def test_a_gap_is_closed_by_the_relays_list(
    scene: Scene,
    worker: Service,
    pg: asyncpg.Connection,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene.happen(300)
    await scene.finished()
    after = scene.network.clock.seq
    scene.happen(400, lose=lambda _: True)
    gap = {"relay": "sim.test", "reason": "outdated_cursor", "after": after, "resumed": scene.network.clock.seq}
    scene.client.lpush("fastworker:gaps", json.dumps(gap), "no JSON")
    scene.happen(50)
    before = sum(len(pds.asked) for pds in scene.sim.pdses)
    bad = scene.sim.pdses[0]
    bad.fail("wrong_key")
    config = config_of(scene)
    options = RepairOptions((), gap=True)
    assert await repair(config, options, asyncio.Event(), hosts=scene.hosts) == ExitCode.NO
    assert await history.show(config, hosts=scene.hosts) == ExitCode.DONE
    words = capsys.readouterr().out
    assert f"Open gap of sim.test, seq {after} to {gap['resumed']}: " in words
    assert "accounts are left" in words
    bad.fail(None)
    assert await repair(config, options, asyncio.Event(), hosts=scene.hosts) == ExitCode.DONE
    assert await scene.differences(pg) == "no difference"
    assert await pg.fetchval("SELECT count(*) FROM fastworker.gaps WHERE closed_at IS NULL") == 0
    assert scene.client.lrange("fastworker:gaps", 0, -1) == [b"no JSON"]
    lists = len(scene.sim.relay.asked)
    assert await repair(config, options, asyncio.Event(), hosts=scene.hosts) == ExitCode.DONE
    assert len(scene.sim.relay.asked) == lists  # nothing is open: nobody is asked
    assert before == 0
    assert worker.process.poll() is None


async def test_a_gap_is_open_until_its_list_is_read_and_everybody_is_settled(
    scene: Scene, pg: asyncpg.Connection
) -> None:
    gap = {"relay": "sim.test", "reason": "outdated_cursor", "after": 5, "resumed": 9}
    scene.client.lpush("fastworker:gaps", json.dumps(gap))
    async with many.opened(scene.config, "test", scene.hosts, reads_only=True) as there:
        sweep = await there.queue.sweep("sim.test", GAP, REPAIR)
        await pg.execute(
            "INSERT INTO fastworker.gaps (relay, from_seq, to_seq, reason, sweep) VALUES ('sim.test', 5, 9, 'x', $1)",
            sweep.id,
        )
        assert await gaps.close_gaps(there) == ExitCode.NO, "a list that broke off has named nobody yet"
        await there.queue.put([Wanted("did:plc:" + "a" * 24)], GAP, REPAIR, sweep=sweep.id)
        await pg.execute("UPDATE fastworker.sweeps SET done_at = now()")
        for state in ("waiting", "fetching", "refused"):
            await pg.execute("UPDATE fastworker.repos SET state = $1", state)
            assert await gaps.close_gaps(there) == ExitCode.NO, state
        assert scene.client.llen("fastworker:gaps") == 1
        await pg.execute("UPDATE fastworker.repos SET state = 'done'")
        assert await gaps.close_gaps(there) == ExitCode.DONE
    assert scene.client.llen("fastworker:gaps") == 0


async def test_a_list_that_began_before_a_gap_does_not_cover_it(
    scene: Scene, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages that were read may name accounts that changed in the gap, with their revisions of before. The next list
    names who has changed since ten minutes before the gap: hosts have their own clocks."""
    stored = datetime(2026, 7, 1)  # noqa: DTZ001 - as the tables have it
    await pg.execute(
        "INSERT INTO posts (uri, cid, author_did, text, created_at, indexed_at, commit_seq) "
        "VALUES ('at://a/app.bsky.feed.post/1', 'c', 'a', '', $1, $1, '5')",
        stored,
    )
    covered: list[int | None] = []

    async def read(*_: object) -> None:
        covered.append(await pg.fetchval("SELECT sweep FROM fastworker.gaps"))
        await pg.execute("UPDATE fastworker.sweeps SET done_at = now()")

    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(gaps, "read_repos", read)
    monkeypatch.setattr(gaps, "read_handles", nothing)
    gap = {"relay": "sim.test", "reason": "outdated_cursor", "after": 5, "resumed": 9}
    scene.client.lpush("fastworker:gaps", json.dumps(gap))
    async with many.opened(scene.config, "test", scene.hosts, reads_only=True) as there:
        begun = await there.queue.sweep("sim.test", GAP, REPAIR)
        await pg.execute("UPDATE fastworker.sweeps SET cursor = 'page 2'")
        await gaps.read_gaps(there, "sim.test")
    lists = await pg.fetch("SELECT id, since_rev FROM fastworker.sweeps ORDER BY id")
    assert [tuple(one) for one in lists] == [(begun.id, ""), (covered[1], tid_of(stored - timedelta(minutes=10)))]
    assert covered[0] is None


async def test_choices(
    scene: Scene,
    worker: Service,
    pg: asyncpg.Connection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first: list[int] = []
    wait = many.Live.first

    async def counted(live: many.Live) -> None:
        first.append(1)
        await wait(live)

    monkeypatch.setattr(many.Live, "first", counted)
    scene.happen(400, lose=lambda n: n % 2 == 0)
    accounts = scene.network.world.accounts()
    file = tmp_path / "dids"
    file.write_text(f"# two of them\n{accounts[0].did}\n\n{accounts[1].did}  # the second\n")
    assert await chosen(scene, dids=file) == ExitCode.DONE
    assert await states(pg) == {"done": 2}
    fetched = sum(len(pds.asked) for pds in scene.sim.pdses)
    assert await chosen(scene, dids=file) == ExitCode.DONE  # done: nobody is asked again
    assert sum(len(pds.asked) for pds in scene.sim.pdses) == fetched

    pds = scene.sim.pdses[1]
    host = pds.url.removeprefix("http://")
    assert await chosen(scene, host=host) == ExitCode.DONE
    done = {row[0] for row in await pg.fetch("SELECT did FROM fastworker.repos WHERE state = 'done'")}
    assert done == {accounts[0].did, accounts[1].did, *pds.accounts}

    follower = await pg.fetchval("SELECT follower_did FROM follows LIMIT 1")
    assert await chosen(scene, follows_of=(follower,)) == ExitCode.DONE
    follows = {row[0] for row in await pg.fetch("SELECT following_did FROM follows WHERE follower_did = $1", follower)}
    done = {row[0] for row in await pg.fetch("SELECT did FROM fastworker.repos WHERE state IN ('done', 'gone')")}
    assert done >= {follower, *follows}

    likes_and_posts = ("app.bsky.feed.like", "app.bsky.feed.post")
    capsys.readouterr()
    choice = Choice(collection=likes_and_posts)
    assert await history.estimate(config_of(scene), choice, hosts=scene.hosts) == ExitCode.DONE
    starts = tuple(f"{name}/".encode() for name in likes_and_posts)
    have = {one.did for one in accounts if any(key.startswith(starts) for key, _ in mst.items(one.repo.root))}
    assert f"accounts  {len(have):,}\n" in capsys.readouterr().out  # who has both is counted once
    several = Choice(collection=likes_and_posts, known=True, dids=file, host=host, follows_of=(follower,))
    assert await history.estimate(config_of(scene), several, hosts=scene.hosts) == ExitCode.DONE
    users = {row[0] for row in await pg.fetch("SELECT did FROM users")}
    everyone = have | users | {*pds.accounts, accounts[0].did, accounts[1].did, follower, *follows}
    assert f"accounts  {len(everyone):,}\n" in capsys.readouterr().out  # each once
    assert await chosen(scene, collection=likes_and_posts) == ExitCode.DONE
    lists = {row[0] for row in await pg.fetch("SELECT collection FROM fastworker.sweeps WHERE collection <> ''")}
    assert lists == {*likes_and_posts}
    assert await chosen(scene, everybody=True) == ExitCode.DONE
    assert await scene.differences(pg) == "no difference"
    capsys.readouterr()
    assert await history.show(config_of(scene), hosts=scene.hosts) == ExitCode.DONE
    assert "100.0%, " in capsys.readouterr().out
    assert first  # batches of history wait for the live stream, those of repairs do not
    first.clear()
    scene.happen(60, lose=lambda _: True)
    assert await scene.repair() == ExitCode.DONE
    assert await scene.differences(pg) == "no difference"
    assert not first
    told: Any = json.loads(scene.client.get("fastworker:history") or b"")
    assert (told["share"], told["waiting"], told["paused"], told["left_s"]) == (1.0, 0, False, None)
    assert (await history.estimate(config_of(scene), Choice(everybody=True), hosts=scene.hosts)) == ExitCode.DONE
    words = capsys.readouterr().out
    assert f"accounts  {len(accounts):,}\n" in words
    for pds in scene.sim.pdses:
        assert re.search(rf"{pds.url.removeprefix('http://')} +{len(pds.accounts)} +at most 100 +0 s", words)
    assert await history.estimate(config_of(scene), Choice(dids=file), hosts=scene.hosts) == ExitCode.DONE
    words = " ".join(capsys.readouterr().out.split())
    assert "accounts 2 to fetch" in words
    assert f"{scene.sim.directory.url.removeprefix('http://')}" not in words  # of this configuration: plc.directory
    assert "plc.directory 2 at most 100" in words
    at = [("a.test:443", 18), ("b.test:443", 6)]  # whoever is not known is spread over hosts as these are
    await pg.execute("DELETE FROM fastworker.repos")
    for host, count in at:
        await pg.execute(
            "INSERT INTO fastworker.repos (did, host, reason, priority) "
            "SELECT $1 || i, $1, 'backfill', 5 FROM generate_series(1, $2) AS i",
            host, count,
        )  # fmt: skip
    file.write_text("\n".join(f"did:plc:unknown{number}" for number in range(40)))
    assert await history.estimate(config_of(scene), Choice(dids=file), hosts=scene.hosts) == ExitCode.DONE
    words = " ".join(capsys.readouterr().out.split())
    assert "a.test 30 at most 100" in words
    assert "b.test 10 at most 100" in words
    assert "not known yet" not in words


async def test_more_than_before_is_looked_at_again(postgres_url: str, pg: asyncpg.Connection) -> None:
    did = [Wanted("did:plc:a")]

    async def part() -> tuple[Any, ...]:
        row = await pg.fetchrow("SELECT state, since_rev, collections FROM fastworker.repos")
        assert row is not None
        return tuple(row)

    async with open_queue(postgres_url) as queue:
        assert await queue.put(did, "backfill", CHOSEN, part=Part("3k", ("a.b.*",))) == 1
        assert (await queue.claim(1, CHOSEN))[0].part == Part("3k", ("a.b.*",))
        await queue.done("did:plc:a", "3z", 5, 1, 1, 0)
        assert await queue.put(did, "backfill", CHOSEN, part=Part("3l", ("a.b.*",))) == 0
        assert await queue.put(did, "backfill", CHOSEN, part=Part("3l", ("a.c",))) == 1
        assert await part() == ("waiting", "3k", ["a.b.*", "a.c"])
        await queue.claim(1, CHOSEN)
        await queue.done("did:plc:a", "3z", 5, 1, 1, 0)
        assert await queue.put(did, "operator", 0) == 1
        assert await part() == ("waiting", None, None)
        await queue.claim(1, CHOSEN)
        await queue.done("did:plc:a", "3z", 5, 1, 1, 0)
        assert await queue.put(did, "backfill", CHOSEN, part=Part("3k", None)) == 0


async def test_history_that_is_paused_waits_and_repairs_do_not(scene: Scene, pg: asyncpg.Connection) -> None:
    assert await history.pause(config_of(scene), is_paused=True, hosts=scene.hosts) == ExitCode.DONE
    async with open_queue(scene.config.database_url or "") as queue:
        await queue.put([Wanted("did:plc:a")], "backfill", CHOSEN)
        await queue.put([Wanted("did:plc:b")], "operator", 0)
        assert [one.did for one in await queue.claim(5, CHOSEN)] == ["did:plc:b"]
        assert await history.pause(config_of(scene), is_paused=False, hosts=scene.hosts) == ExitCode.DONE
        assert [one.did for one in await queue.claim(5, CHOSEN)] == ["did:plc:a"]


async def test_live_goes_first(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the load decides, but how old the oldest unfinished entry is: taken is not finished."""
    client, old = scene.client, int(time.time() * 1_000) - 5_000
    client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    for number in range(2):
        client.xadd(STREAM, {"a": "b"}, id=f"{old}-{number}")

    async def a_batch(pace: many.Pace, seconds: float = 0.0) -> float:
        began = time.monotonic()
        async with pace:
            await asyncio.sleep(seconds)
        return time.monotonic() - began

    async with open_redis(scene.config.redis_url, STREAM, client_name="test") as admin:
        pace = many.Pace(many.Live(admin, scene.config), 1.0)
        batch = asyncio.create_task(a_batch(pace))
        client.xreadgroup(GROUP, "one", {STREAM: ">"})
        client.xack(STREAM, GROUP, f"{old}-0")
        await asyncio.sleep(3 * many.LOOK_S)
        assert not batch.done()
        client.xack(STREAM, GROUP, f"{old}-1")
        async with asyncio.timeout(5):
            await batch
        client.xadd(STREAM, {"a": "b"})
        await asyncio.sleep(2 * many.LOOK_S)  # younger than two seconds: nobody waits
        assert await a_batch(pace) < many.LIVE_S
        monkeypatch.setattr(many, "LIVE_S", 0.0)
        monkeypatch.setattr(many, "LIVE_PAUSE_S", 0.5)
        assert 0.5 <= await a_batch(pace) < 5  # nor for ever
        monkeypatch.undo()
        quarter = many.Pace(many.Live(admin, scene.config), 0.25)
        await a_batch(quarter, 0.1)
        assert await a_batch(quarter) >= 0.28


async def test_turns_of_a_host_are_shared(postgres_url: str) -> None:
    async with open_queue(postgres_url) as one, open_queue(postgres_url) as two:
        waits = [await queue.turn("a.test", 0.5) for queue in (one, two, one, two, one, two)]
        assert waits == sorted(waits)
        assert 0.5 < waits[-1] <= 2.5  # one each half second, for both together
        await one.rest("b.test", 60)
        assert await two.turn("b.test", 0.5) > 58


async def test_claims(postgres_url: str, pg: asyncpg.Connection) -> None:
    async with open_queue(postgres_url) as one, open_queue(postgres_url) as two:
        await one.put([Wanted(f"did:plc:a{n}") for n in range(9)], "backfill", CHOSEN, host="a.test")
        await one.put([Wanted("did:plc:b")], "operator", 0, host="b.test")
        first = await one.claim(3, CHOSEN)
        assert "did:plc:b" in {claim.did for claim in first}
        second = await two.claim(8, CHOSEN)
        assert len({claim.did for claim in first + second}) == len(first + second) == 5  # four of one host at most
        assert await two.claim(8, 0) == []
        await one.done(first[0].did, "3k", 5, 1, 1, 0)
        assert await one.put([Wanted(first[0].did)], "backfill", CHOSEN) == 0
        assert await one.put([Wanted(first[0].did, "3z")], "backfill", CHOSEN) == 1
        async with open_queue(postgres_url) as three:
            left = await three.left(CHOSEN)
            assert left.fetching == 4
    async with open_queue(postgres_url) as after:  # whoever had them is gone, and gave them back
        assert (await after.left(CHOSEN)).fetching == 0
        assert len(await after.claim(8, CHOSEN)) >= 4
        await pg.execute("UPDATE fastworker.repos SET owner = 1 WHERE state = 'fetching'")  # a killed process
        async with open_queue(postgres_url) as other:
            assert await other.claim(8, CHOSEN)


@pytest.mark.extended
@pytest.mark.parametrize(("directory", "pds"), [(0.5, 100.0), (100.0, 0.25)], ids=["directory", "hosts"])
async def test_an_estimate_tells_how_long_it_takes(
    scene: Scene,
    worker: Service,
    pg: asyncpg.Connection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    directory: float,
    pds: float,
) -> None:
    """Within a fifth: where the directory allows the least, and where the hosts do, which are known by then."""
    scene.happen(400, lose=lambda _: True)
    plc = scene.sim.directory.url
    config = parse_config(
        {
            "REDIS_URL": scene.config.redis_url,
            "DATABASE_URL": scene.config.database_url or "",
            "FASTWORKER_PLC_URL": plc,
        }
    )

    def rate(host: str) -> float:
        return directory if plc.endswith(host) else pds

    (file := tmp_path / "dids").write_text("\n".join(one.did for one in scene.network.world.accounts()))
    if pds < directory:  # a first time, so that it is known who is where
        assert await chosen(scene, dids=file) == ExitCode.DONE
    async with Hosts(plc, own=scene.sim.own, bounds=Bounds(wait_max_s=30), rate=rate) as hosts:
        capsys.readouterr()
        assert await history.estimate(config, Choice(dids=file), hosts=hosts) == ExitCode.DONE
        told = re.search(r"^time +(\d+) s: ", words := capsys.readouterr().out, re.MULTILINE)
        began = time.monotonic()
        assert await backfill(config, Choice(dids=file, again=True), asyncio.Event(), hosts=hosts) == ExitCode.DONE
    took = time.monotonic() - began
    with capsys.disabled():
        sys.stdout.write(f"\n{words}It took {took:.1f} s.\n")
    assert told is not None, words
    assert 0.8 < float(told[1]) / took < 1.2

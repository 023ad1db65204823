"""What can go wrong at a host, row by row: the rows, the account's status, what is counted, what the host got.

One network, one database, one syncer: each account has a host of its own with a fault of its own. Then everything is
mended, and the tables end equal to the network.
"""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest
import redis as sync_redis
from yarl import URL

from fastworker.config import parse_config
from fastworker.errors import ExitCode
from fastworker.simulator.hosts import Fault, SimHosts, SimPds
from fastworker.simulator.network import Network
from fastworker.simulator.world import Account
from fastworker.store.store import Store
from fastworker.sync import fetch, syncer
from fastworker.sync.hosts import Bounds, Hosts, pds_of
from tests.integration.test_repairs import Scene, worker  # noqa: F401 - a fixture
from tests.integration.test_syncer import note, syncing, told, until
from tests.services import Service

RATE = 5.0
ACCOUNTS = 44
QUICK = Bounds(
    connect_s=15.0, idle_s=6.0, total_s=20.0, window_s=0.2, least_bytes=10_000, bytes_max=4_000_000, wait_max_s=15.0
)


class Row(NamedTuple):
    """`state` and `error`: in `fastworker.repos`. `asked`: requests to the account's host; `documents`: to the
    directory. `spent`: tries. `rests`: the host is left alone. `status`: what `fastworker.accounts` says afterwards."""

    state: str
    error: str
    asked: int
    fault: Fault | None = None
    times: int | None = None
    documents: int = 1
    spent: int = 0
    rests: bool = False
    status: str | None = None
    prepare: Callable[[SimHosts, Account], None] | None = None


def endpoint(url: str) -> Callable[[SimHosts, Account], None]:
    def prepare(sim: SimHosts, account: Account) -> None:
        document = sim.document(account)
        document["service"][0]["serviceEndpoint"] = url.format(port=sim.pds(account).url.rpartition(":")[2])
        sim.documents[account.did] = document

    return prepare


def directory_says(code: int) -> Callable[[SimHosts, Account], None]:
    return lambda sim, account: sim.documents.update({account.did: code})


def another_key(sim: SimHosts, account: Account) -> None:
    """The document shows a key that the account no longer signs with."""
    assert account.key is not None
    sim.keys[account.did] = account.key.multikey
    sim.rotate(account)


def moved(sim: SimHosts, account: Account) -> None:
    """The host that the account has left says `deactivated` of it for ever."""
    old = sim.pds(account)
    sim.moved[account.did] = SPARE
    sim.settle()
    old.fail("deactivated")
    old.accounts[account.did] = account


SPARE = ACCOUNTS
TABLE = {
    "down": Row("waiting", "unreachable", 0, spent=1, rests=True),
    "503": Row("waiting", "unreachable", 1, "unavailable", spent=1, rests=True),
    "no such name": Row(
        "waiting", "unreachable", 0, spent=1, rests=True, prepare=endpoint("https://nowhere.example.com")
    ),
    "no TLS": Row("waiting", "unreachable", 0, spent=1, rests=True, prepare=endpoint("https://127.0.0.1:{port}")),
    "silent": Row("waiting", "unreachable", 1, "silent", spent=1, rests=True),
    "trickle": Row("waiting", "unreachable", 1, "trickle", spent=1, rests=True),
    "429 without headers": Row("waiting", "limited", 1, "limited", rests=True),
    "429 with headers": Row("waiting", "limited", 1, "limited_told", rests=True),
    "429 with retry-after": Row("done", "", 2, "limited_retry_after", times=1),
    "not found": Row("gone", "RepoNotFound", 1, "not_found", documents=2),
    "no document": Row("gone", "answers 404", 0, prepare=directory_says(404)),
    "given up": Row("gone", "answers 410", 0, status="deleted", prepare=directory_says(410)),
    "taken down": Row("gone", "RepoTakendown", 1, "takendown", documents=2, status="takendown"),
    "suspended": Row("gone", "RepoSuspended", 1, "suspended", documents=2, status="suspended"),
    "deactivated": Row("gone", "RepoDeactivated", 1, "deactivated", documents=2, status="deactivated"),
    "moved away": Row("done", "", 0, prepare=moved),
    "truncated": Row("waiting", "bad_car", 3, "truncated", spent=1),
    "cut": Row("waiting", "bad_answer", 3, "cut", spent=1),
    "a missing block": Row("waiting", "bad_car", 3, "missing_block", spent=1),
    "a changed block": Row("waiting", "bad_car", 3, "changed_block", spent=1),
    "a commit meanwhile": Row("waiting", "bad_car", 3, "commit_meanwhile", spent=1),
    "a commit meanwhile, once": Row("done", "", 2, "commit_meanwhile", times=1),
    "not a repository": Row("waiting", "bad_car", 3, "html", spent=1),
    "a wrong key": Row("refused", "bad_signature", 1, "wrong_key", documents=2),
    "a key that is no more": Row("refused", "bad_signature", 1, documents=2, prepare=another_key),
    "another account": Row("refused", "bad_signature", 1, "other_account"),
    "the future": Row("refused", "future_rev", 1, "future_rev"),
    "rolled back": Row("refused", "older than what is stored", 1, "rolled_back"),
    "a bomb": Row("refused", "too_large", 1, "bomb", rests=True),
    "endless": Row("refused", "too_large", 1, "endless", rests=True),
    "to a private address": Row("refused", "private", 1, "redirect_private", rests=True),
    "to plain http": Row("refused", "private", 1, "redirect_plain", rests=True),
    "in a circle": Row("waiting", "bad_answer", 12, "redirect_loop", spent=1),
    "a private name": Row("refused", "private", 0, rests=True, prepare=endpoint("https://inside.example.com")),
    "an address": Row("refused", "private", 0, rests=True, prepare=endpoint("https://10.0.0.1")),
    "blocks in no order": Row("done", "", 1, "unordered"),
    "blocks twice": Row("done", "", 1, "duplicates"),
    "blocks of others": Row("done", "", 1, "foreign"),
    "nothing wrong": Row("done", "", 1),
}


@pytest.fixture
async def scene(redis_url: str, postgres_url: str) -> AsyncIterator[Scene]:
    network = Network(23, accounts=ACCOUNTS, signed=True)
    with contextlib.closing(sync_redis.Redis.from_url(redis_url)) as client:
        async with SimHosts(network.world, count=ACCOUNTS + 1) as sim:
            own = sim.own | {one.url.replace("http", "https") for one in sim.pdses}
            plain = parse_config({"REDIS_URL": redis_url, "DATABASE_URL": postgres_url})
            config = msgspec.structs.replace(plain, fetch_at_once=12)
            async with Hosts(
                sim.directory.url,
                own=own,
                bounds=QUICK,
                rate=lambda host: 500.0 if host in sim.directory.url else RATE,
            ) as hosts:
                yield Scene(network, sim, hosts, config, client)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(_: object, host: str, *__: object) -> list[Any]:
        if host != "inside.example.com":
            raise OSError(f"{host}: Name or service not known")
        return [{"hostname": host, "host": "10.0.0.1", "port": 443, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr("aiohttp.ThreadedResolver.resolve", resolve)
    monkeypatch.setattr(fetch, "TRIES_S", (0.0, 0.01, 0.01))
    monkeypatch.setattr(syncer, "ROUND_S", 0.3)


async def rows_of(pg: asyncpg.Connection, did: str) -> list[Any]:
    return [
        tuple(row)
        for table, author in (("posts", "author_did"), ("likes", "user_did"), ("follows", "follower_did"))
        for row in await pg.fetch(f"SELECT uri, commit_rev FROM {table} WHERE {author} = $1 ORDER BY uri", did)
    ]


async def found_of(scene: Scene, pg: asyncpg.Connection, row: Row, account: Account, pds: SimPds) -> Row:
    """The row as it was; its `error` where that matches."""
    record = await pg.fetchrow(
        "SELECT state, coalesce(error, ''), attempts FROM fastworker.repos WHERE did = $1", account.did
    )
    assert record is not None
    state, error, spent = record
    document = scene.sim.documents.get(account.did, scene.sim.document(account))
    host = pds_of(document) if isinstance(document, dict) else None
    return row._replace(
        state=state,
        error=row.error if row.error in error else error,
        asked=len(pds.asked),
        documents=sum(path == f"/{account.did}" for _, path in scene.sim.directory.asked),
        spent=spent,
        rests=host is not None and URL(host).authority in scene.hosts.resting(),
        status=await pg.fetchval("SELECT status FROM fastworker.accounts WHERE did = $1", account.did),
    )


async def test_each_fault(
    scene: Scene, worker: Service, pg: asyncpg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sim = scene.sim
    scene.happen(1_500, lose=lambda n: n % 3 == 0)
    scene.client.set("fastworker:relay", "sim.test")
    everybody = sorted(scene.network.world.accounts(), key=lambda one: -len(one.live))
    accounts = dict(zip(TABLE, everybody, strict=False))
    assert len(accounts) == len(TABLE)
    dids = [account.did for account in accounts.values()]
    for account in accounts.values():  # no table can hold it, and its siblings do not suffer
        account.status = None
        account.repo.commit([("create", f"app.bsky.feed.like/{scene.network.clock.tid()}", {"$type": "a.b.c"})])
    await scene.finished()
    await pg.execute("UPDATE fastworker.accounts SET active = true, status = NULL WHERE did = ANY($1)", dids)
    before = {name: await rows_of(pg, account.did) for name, account in accounts.items()}
    hosts = {name: sim.pds(account) for name, account in accounts.items()}
    for name, row in TABLE.items():
        hosts[name].fail(row.fault, row.times)
        if row.prepare is not None:
            row.prepare(sim, accounts[name])
    await hosts["down"].stop()
    note(scene, dids)

    async def have_ended() -> bool:
        ended = "SELECT count(*) FROM fastworker.repos WHERE state IN ('done', 'gone', 'refused') OR error IS NOT NULL"
        return bool(await pg.fetchval(ended) == len(TABLE))

    async def is_counted() -> bool:
        return bool(told(scene).get("refused") == sum(row.state == "refused" for row in TABLE.values()))

    async with syncing(scene):
        await until(have_ended)
        await until(is_counted)
    found = {name: await found_of(scene, pg, row, accounts[name], hosts[name]) for name, row in TABLE.items()}
    wrong = [f"{name}: {found[name]}\n  is not {row}" for name, row in TABLE.items() if found[name] != row]
    assert not wrong, "\n".join(wrong)
    await pay(scene)
    for name, row in TABLE.items():
        # A request that this busy process sends late comes nearer to the next one, 0.2 s later: no burst, and on average.
        assert hosts[name].most_in(0.6) <= RATE, name
        assert hosts[name].most_in(3.0) <= 3 * RATE + 1, name
        after = await rows_of(pg, accounts[name].did)
        assert (after != before[name]) == (row.state == "done" or row.status == "deleted"), name
    assert list(tmp_path.iterdir()) == []
    await mend(scene, pg, accounts)
    assert await scene.differences(pg) == "no difference"
    gone = await pg.fetch("SELECT did, status FROM fastworker.accounts WHERE NOT active AND did = ANY($1)", dids)
    assert {tuple(row) for row in gone} == {  # a relay may have said these, which a host cannot take back
        (accounts["taken down"].did, "takendown"),
        (accounts["suspended"].did, "suspended"),
    }


async def pay(scene: Scene) -> None:
    """The records of who was deleted go now, not at the worker's next tick of ten seconds."""
    store = await Store.connect(scene.config.require_database_url("test"))
    try:
        while await store.maintain():
            pass
    finally:
        await store.close()


async def mend(scene: Scene, pg: asyncpg.Connection, accounts: dict[str, Account]) -> None:
    """Every host is well again; who rested is asked by others."""
    sim = scene.sim
    for pds in sim.pdses:
        pds.fail(None)
    sim.documents.clear()
    sim.keys.clear()
    sim.moved[accounts["down"].did] = SPARE
    scene.happen(100)
    await scene.finished()
    for account in accounts.values():
        account.status = None
    await pg.execute("TRUNCATE fastworker.hosts")
    async with Hosts(sim.directory.url, own=sim.own, rate=lambda _: 100.0) as scene.hosts:
        assert await scene.repair() == ExitCode.DONE

"""Handles over a local directory, local well-known files and a local name server, into a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import asyncpg
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from aiohttp import web
from redis.asyncio import Redis

from fastworker.edge.embedded import free_port
from fastworker.event import Identity
from fastworker.law.model import Model
from fastworker.store.rules import Rules
from fastworker.store.store import Store
from fastworker.sync import hosts as client
from fastworker.sync import resolver
from fastworker.sync.hosts import Hosts
from fastworker.sync.identity import BOUNDS, Directory, Unresolved, gather
from fastworker.sync.resolver import ResolverSettings, run_resolver
from fastworker.table.batch import Batch
from tests.property.feeding import clear

ALICE, BOB = "did:plc:" + "a" * 24, "did:plc:" + "b" * 24
NOW = datetime(2026, 11, 1, tzinfo=UTC)


class World:
    """What the servers say; `asked` is what they were asked."""

    def __init__(self) -> None:
        self.documents: dict[str, Any] = {}  # did -> document, or a status
        self.files: dict[str, str] = {}  # host -> atproto-did
        self.records: dict[str, list[str]] = {}  # handle -> TXT
        self.moved: dict[str, str] = {}  # did or host/name -> Location
        self.asked: list[str] = []
        self.hold: asyncio.Event | None = None

    def is_called(self, did: str, *handles: str) -> None:
        self.documents[did] = {"id": did, "alsoKnownAs": [f"at://{handle}" for handle in handles]}

    async def document(self, request: web.Request) -> web.StreamResponse:
        did = request.match_info["did"]
        self.asked.append(did)
        if self.hold is not None:
            await self.hold.wait()
        if did in self.moved:
            return web.Response(status=302, headers={"Location": self.moved[did]})
        found = self.documents.get(did, 404)
        return web.Response(status=found) if isinstance(found, int) else web.json_response(found)

    async def well_known(self, request: web.Request) -> web.StreamResponse:
        host, name = request.match_info["host"], request.match_info["name"]
        self.asked.append(f"{host}/{name}")
        if f"{host}/{name}" in self.moved:
            return web.Response(status=301, headers={"Location": self.moved[f"{host}/{name}"]})
        if name == "did.json":
            found = self.documents.get(f"did:web:{host}", 404)
            return web.Response(status=found) if isinstance(found, int) else web.json_response(found)
        return web.Response(text=self.files[host]) if host in self.files else web.Response(status=404)

    async def secret(self, _request: web.Request) -> web.StreamResponse:
        self.asked.append("secret")
        return web.Response(text=ALICE)


class _Names(asyncio.DatagramProtocol):
    def __init__(self, world: World) -> None:
        self._world = world

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text().rstrip(".")
        self._world.asked.append(f"TXT {name}")
        response = dns.message.make_response(query)
        if texts := self._world.records.get(name.removeprefix("_atproto.")):
            rows = [f'"{text}"' for text in texts]
            response.answer.append(dns.rrset.from_text_list(question.name, 60, "IN", "TXT", rows))
        else:
            response.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(response.to_wire(), address)


@pytest.fixture
async def world() -> AsyncIterator[tuple[World, dict[str, Any]]]:
    world = World()
    app = web.Application()
    app.router.add_get("/plc/{did}", world.document)
    app.router.add_get("/secret", world.secret)
    app.router.add_get("/hosts/{host}/{name}", world.well_known)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Names(world), local_addr=("127.0.0.1", 0)
    )
    yield (
        world,
        {
            "plc_url": f"http://127.0.0.1:{port}/plc",
            "well_known": f"http://127.0.0.1:{port}/hosts/{{host}}",
            "nameserver": ("127.0.0.1", transport.get_extra_info("sockname")[1]),
            "own": frozenset([f"http://127.0.0.1:{port}"]),
            "rate": 500.0,
        },
    )
    transport.close()
    if world.hold is not None:
        world.hold.set()
    await runner.cleanup()


async def mark(store: Store, *events: tuple[str, str | None, int]) -> None:
    """Identity events: (did, handle or none, minutes)."""
    batch = Batch()
    for did, handle, minutes in events:
        batch.put_identity(Identity(minutes, did, handle, None), NOW + timedelta(minutes=minutes))
    await store.write(batch)


@contextlib.asynccontextmanager
async def resolving(url: str, servers: dict[str, Any]) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_resolver(ResolverSettings(url, **servers), stop))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await task


async def until(pg: asyncpg.Connection, question: str, answer: object = 0) -> None:
    async with asyncio.timeout(60):
        while await pg.fetchval(question) != answer:
            await asyncio.sleep(0.02)


PENDING = "SELECT count(*) FROM fastworker.identities WHERE resolve_pending"
HANDLE = "SELECT handle FROM users WHERE did = $1"


@pytest.fixture
async def store(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    monkeypatch.setattr(resolver, "IDLE_S", 0.05)
    monkeypatch.setattr(resolver, "APART_S", 0.0)
    store = await Store.connect(postgres_url)
    yield store
    await store.close()


@pytest.mark.parametrize("by", ["dns", "file"])
async def test_a_handle_that_both_sides_name(by: str, world: Any, store: Store, postgres_url: str, pg: Any) -> None:
    says, servers = world
    web_did = "did:web:bob.test"
    says.is_called(ALICE, "Alice.Test", "other.test")
    says.is_called(web_did, "bob.test")
    for handle, did in (("alice.test", ALICE), ("bob.test", web_did)):
        if by == "dns":
            says.records[handle] = ["v=spf1", f"did={did}"]
        else:
            says.files[handle] = f" {did}\n"
    await mark(store, (ALICE, None, 1), (web_did, None, 1))
    assert await pg.fetchval(HANDLE, ALICE) == "handle.invalid"
    async with resolving(postgres_url, servers):
        await until(pg, PENDING)
    assert await pg.fetchval(HANDLE, ALICE) == "alice.test"
    assert await pg.fetchval(HANDLE, web_did) == "bob.test"
    assert ("alice.test/atproto-did" in says.asked) == (by == "file")
    await mark(store, (ALICE, "older.test", 0))
    assert await pg.fetchval(HANDLE, ALICE) == "alice.test", "an older event beat what was resolved"
    later = Batch()
    later.put_identity(Identity(9, ALICE, "newer.test", None), datetime.now(UTC) + timedelta(seconds=1))
    await store.write(later)
    assert await pg.fetchval(HANDLE, ALICE) == "newer.test"


@pytest.mark.parametrize(
    "case", ["names another", "two records", "no document", "another document", "no handle", "too large", "no host"]
)
async def test_a_handle_that_nobody_vouches_for(
    case: str, world: Any, store: Store, postgres_url: str, pg: Any
) -> None:
    """The mark goes; a real handle is never replaced by handle.invalid."""
    says, servers = world
    says.is_called(ALICE, "alice.test")
    match case:
        case "names another":
            says.records["alice.test"] = [f"did={BOB}"]
        case "two records":
            says.records["alice.test"] = [f"did={ALICE}", f"did={BOB}"]
        case "no document":
            del says.documents[ALICE]
        case "another document":
            says.documents[ALICE]["id"] = BOB
            says.records["alice.test"] = [f"did={ALICE}"]
        case "no handle":
            says.is_called(ALICE)
        case "too large":
            says.records["alice.test"] = [f"did={ALICE}"]
            says.documents[ALICE]["x"] = "y" * 100_000
        case "no host":
            says.is_called(ALICE, "alice.test:8080/path")
    await mark(store, (ALICE, "real.test", 1), (BOB, None, 1))
    await mark(store, (ALICE, None, 2))
    assert await pg.fetchval(PENDING) == 2
    async with resolving(postgres_url, servers):
        await until(pg, PENDING)
    assert await pg.fetchval(HANDLE, ALICE) == "real.test"
    assert await pg.fetchval(HANDLE, BOB) == "handle.invalid"


@pytest.fixture
async def strict(postgres_url: str, store: Store) -> AsyncIterator[Store]:
    """A worker's with the resolver on: what a host only claims is not shown."""
    strict = await Store.connect(postgres_url, rules=Rules(verified_only=True))
    yield strict
    await strict.close()


async def test_a_claim_is_shown_once_both_sides_name_each_other(
    world: Any, strict: Store, postgres_url: str, pg: Any
) -> None:
    says, servers = world
    for did, handle in ((ALICE, "alice.test"), (BOB, "news.test")):
        says.is_called(did, handle)
        says.records[handle] = [f"did={ALICE}"]
    await mark(strict, (ALICE, "alice.test", 1), (BOB, "news.test", 1))
    assert {row[0] for row in await pg.fetch("SELECT handle FROM users")} == {"handle.invalid"}
    async with resolving(postgres_url, servers):
        await until(pg, "SELECT handle FROM users ORDER BY did LIMIT 1", "alice.test")
        await until(pg, "SELECT attempts FROM fastworker.identities ORDER BY did DESC LIMIT 1", 1)
        assert await pg.fetchval(HANDLE, BOB) == "handle.invalid", (
            "its DNS names somebody else; it is asked again later"
        )
        says.is_called(ALICE, "new.test")
        await mark(strict, (ALICE, "new.test", 2))
        await until(pg, "SELECT attempts FROM fastworker.identities ORDER BY did LIMIT 1", 1)
        assert await pg.fetchval(HANDLE, ALICE) == "alice.test", "the verified one stays until then"
        says.records["new.test"] = [f"did={ALICE}"]
        await pg.execute("UPDATE fastworker.identities SET resolve_after = now()")
        await until(pg, "SELECT handle FROM users ORDER BY did LIMIT 1", "new.test")


async def test_a_verified_claim_takes_a_handle(world: Any, strict: Store, postgres_url: str, pg: Any) -> None:
    says, servers = world
    says.is_called(ALICE, "shop.test")
    says.records["shop.test"] = [f"did={ALICE}"]
    async with resolving(postgres_url, servers):
        await mark(strict, (ALICE, "shop.test", 1))
        await until(pg, PENDING)
        assert await pg.fetchval(HANDLE, ALICE) == "shop.test"
        says.is_called(BOB, "shop.test")
        says.records["shop.test"] = [f"did={BOB}"]
        await mark(strict, (BOB, "shop.test", 2))
        await until(pg, PENDING)
    assert await pg.fetchval(HANDLE, BOB) == "shop.test"
    assert await pg.fetchval(HANDLE, ALICE) == "handle.invalid"
    await mark(strict, (ALICE, "shop.test", 3))
    assert await pg.fetchval(HANDLE, ALICE) == "handle.invalid", "a claim takes nothing"
    assert await pg.fetchval(HANDLE, BOB) == "shop.test"


async def test_a_handle_that_an_older_worker_wrote_stays_until_it_is_verified(
    world: Any, strict: Store, postgres_url: str, pg: Any
) -> None:
    says, servers = world
    carol = "did:plc:" + "c" * 24
    for did, handle in ((ALICE, "alice.test"), (carol, "carol.test")):
        await pg.execute("INSERT INTO users (did, handle) VALUES ($1, $2)", did, handle)
    await mark(strict, (BOB, "alice.test", 1), (carol, "new.test", 1))
    assert await pg.fetchval(HANDLE, ALICE) == "alice.test"
    assert await pg.fetchval(HANDLE, BOB) == "handle.invalid"
    assert await pg.fetchval(HANDLE, carol) == "carol.test"
    says.is_called(BOB, "alice.test")
    says.records["alice.test"] = [f"did={BOB}"]
    async with resolving(postgres_url, servers):
        await until(pg, f"SELECT handle FROM users WHERE did = '{BOB}'", "alice.test")
    assert await pg.fetchval(HANDLE, ALICE) == "handle.invalid"


async def test_contested_handles_with_and_without_verification(postgres_url: str, pg: Any) -> None:
    """Whatever comes in whatever order, the resolver on or off: the law's own answer."""
    dids = [ALICE, BOB, "did:plc:" + "c" * 24]
    for seed in range(12):
        r = random.Random(seed)
        verified_only = bool(seed % 2)
        await clear(pg)
        store = await Store.connect(postgres_url, rules=Rules(verified_only=verified_only))
        model = Model(verified_only=verified_only)
        steps = [(r.choice(dids), r.choice(["one.test", "two.test", "three.test"]), n) for n in range(8)]
        for did, handle, n in steps:
            at = NOW + timedelta(minutes=n)
            model.apply({"kind": "identity", "did": did, "handle": handle, "seq": n + 1, "time": at.isoformat()})
        order = [*steps, *r.sample(steps, 3)]
        r.shuffle(order)
        checks = [(r.randrange(len(order)), r.choice(dids), r.choice(["one.test", "two.test"])) for _ in range(3)]
        for turn, step in enumerate(order):
            await mark(store, (step[0], step[1], step[2] + 1))
            for n, (when, did, handle) in enumerate(checks):
                if when == turn and (did in {s[0] for s in order[: turn + 1]}):
                    seen = NOW + timedelta(minutes=2 * n, seconds=30)
                    await pg.execute("UPDATE fastworker.identities SET resolve_pending = true, marked_at = now()")
                    mark_of = await pg.fetchval("SELECT marked_at FROM fastworker.identities WHERE did = $1", did)
                    await store.resolved([(did, handle, seen, mark_of)])
                    model.verify(did, handle, seen.replace(tzinfo=None))
        await store.close()
        shown = {row[0]: row[1] for row in await pg.fetch("SELECT did, handle FROM users")}
        assert shown == {row["did"]: row["handle"] for row in model.tables()["users"]}, seed


async def test_what_fails_is_asked_again_ever_more_rarely(world: Any, store: Store, postgres_url: str, pg: Any) -> None:
    says, servers = world
    dids = ["did:plc:" + letter * 24 for letter in "abcdefghijklmnopqrst"]
    says.documents.update(dict.fromkeys(dids, 500))
    await mark(store, *((did, None, 1) for did in dids))
    async with resolving(postgres_url, servers):
        await until(pg, "SELECT count(*) FROM fastworker.identities WHERE attempts > 0", len(dids))
        await asyncio.sleep(0.3)
    assert await pg.fetchval(PENDING) == len(dids)
    assert 1 <= len(says.asked) <= 4, "a failing directory is left alone: only what was on the way"
    waits = await pg.fetch("SELECT DISTINCT resolve_after > now() + interval '20 seconds' FROM fastworker.identities")
    assert [row[0] for row in waits] == [True]


async def test_an_event_that_comes_meanwhile_wins(world: Any, store: Store, postgres_url: str, pg: Any) -> None:
    says, servers = world
    for did, handle in ((ALICE, "alice.test"), (BOB, "bob.test")):
        says.is_called(did, handle)
        says.records[handle] = [f"did={did}"]
    await mark(store, (ALICE, None, 1), (BOB, None, 1))
    says.hold = asyncio.Event()
    async with resolving(postgres_url, servers):
        async with asyncio.timeout(60):
            while len(says.asked) < 2:
                await asyncio.sleep(0.01)
        await mark(store, (ALICE, "newer.test", 2), (BOB, None, 3))
        says.hold.set()
        await until(pg, PENDING)
    assert await pg.fetchval(HANDLE, ALICE) == "newer.test"
    assert await pg.fetchval(HANDLE, BOB) == "bob.test"
    assert says.asked.count(BOB) == 2, "another event without a handle means another look"


async def test_nothing_is_asked_about_who_forbids_it(world: Any, store: Store, postgres_url: str, pg: Any) -> None:
    says, servers = world
    await mark(store, (ALICE, None, 1), (BOB, None, 1))
    await pg.execute("INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ($1, true)", ALICE)
    async with resolving(postgres_url, servers):
        await until(pg, PENDING, 1)
    assert BOB in says.asked
    assert ALICE not in says.asked


@contextlib.asynccontextmanager
async def asking(servers: dict[str, Any], **others: Any) -> AsyncIterator[Directory]:
    given = {**servers, **others}
    async with Hosts(
        given["plc_url"], own=given["own"], bounds=BOUNDS, rate=lambda _: 500.0, well_known=given["well_known"]
    ) as hosts:
        yield Directory(hosts, nameserver=given["nameserver"])


async def test_failures_hold_nothing_until_a_collection() -> None:
    """The monitor grew by 2 KB a lookup: each failure held its traceback, and so every other failure."""
    dids = [f"did:plc:{letter * 24}" for letter in "abcdefgh"]
    async with Hosts(f"http://127.0.0.1:{free_port()}", bounds=BOUNDS) as hosts:
        found = await gather(Directory(hosts), dids, 8, 0)
    for did in dids:
        error = found[did]
        assert isinstance(error, Unresolved)
        assert error.__traceback__ is None
        assert error.__cause__ is None


async def test_private_hosts_are_not_asked(world: Any) -> None:
    says, servers = world
    says.is_called(ALICE, "alice.test")
    port = servers["plc_url"].split(":")[2].split("/")[0]
    local = {"well_known": f"http://localhost:{port}/hosts/{{host}}"}
    async with asking(servers, **local) as directory:
        with pytest.raises(Unresolved, match="http is not https"):
            await directory.handle_of(ALICE)
    assert "alice.test/atproto-did" not in says.asked
    async with asking(servers, own=servers["own"] | {f"http://localhost:{port}"}, **local) as directory:
        with pytest.raises(Unresolved, match="no public address"):
            await directory.handle_of(ALICE)
    assert "alice.test/atproto-did" not in says.asked, "the name's address is judged, too"
    async with asking(servers) as directory:
        assert await directory.handle_of(ALICE) is None
    assert "alice.test/atproto-did" in says.asked, "it was the host that was refused"


@pytest.mark.parametrize("first", ["the directory", "a host"])
@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("http://localhost:{port}/secret", "not https"),
        ("//localhost:{port}/secret", "not https"),
        ("https://127.0.0.1/secret", "not the name of a public host"),
        ("https://[64:ff9b::7f00:1]/secret", "not the name of a public host"),
        ("https://pds.example.com:{port}/secret", "port"),
        ("https://private.test/secret", "no public address"),
        ("https://u:p@private.test/secret", "user name"),
        ("file:///etc/passwd", "not https"),
        ("https://[::1", "Invalid IPv6 URL"),
    ],
)
async def test_redirects_are_judged_as_hosts_are(
    first: str, to: str, why: str, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the operator's own directory, and also to a name whose addresses are private."""
    says, servers = world
    says.is_called(ALICE, "alice.test")
    port = servers["plc_url"].split(":")[2].split("/")[0]
    says.moved["alice.test/atproto-did" if first == "a host" else ALICE] = to.format(port=port)

    async def resolve(_self: object, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        return [
            {"hostname": host, "host": a, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
            for a in ("127.0.0.1", "169.254.169.254")
        ]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    async with asking(servers) as directory:
        with pytest.raises(Unresolved, match=why):
            await directory.handle_of(ALICE)
    assert "secret" not in says.asked


async def test_redirects_end(world: Any) -> None:
    says, servers = world
    says.moved[ALICE] = f"/plc/{ALICE}"
    async with asking(servers) as directory:
        assert await directory.handle_of(ALICE) is None
    assert len(says.asked) == 1 + client.REDIRECTS_MAX
    says.moved[ALICE] = f"/plc/{BOB}"
    says.documents[BOB] = {"id": ALICE, "alsoKnownAs": ["at://alice.test"]}
    says.records["alice.test"] = [f"did={ALICE}"]
    async with asking(servers) as directory:
        assert await directory.handle_of(ALICE) == "alice.test"


async def test_a_directory_that_limits_us_is_left_in_peace(
    world: Any, store: Store, postgres_url: str, pg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets no further request until the pause is over, and then every handle is verified all the same."""
    monkeypatch.setattr(client, "PARK_S", 0.6)
    says, servers = world
    dids = ["did:plc:" + letter * 24 for letter in "abcdefghij"]
    says.documents.update(dict.fromkeys(dids, 429))
    await mark(store, *((did, None, 1) for did in dids))
    async with resolving(postgres_url, servers):
        async with asyncio.timeout(60):
            while not says.asked:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert len(says.asked) <= 4, "those that were on the way"
        for did in dids:
            handle = f"{did[-1]}.test"
            says.is_called(did, handle)
            says.records[handle] = [f"did={did}"]
        await until(pg, PENDING)
    assert await pg.fetchval("SELECT count(*) FROM users WHERE handle <> 'handle.invalid'") == len(dids)


async def test_no_host_of_handles_gets_more_than_its_rate(world: Any) -> None:
    """Handles below one domain are one server's: they share its turns."""
    says, servers = world
    handles = [f"h{number}.social.test" for number in range(14)]
    says.files.update(dict.fromkeys(handles, ALICE))
    async with Hosts(
        servers["plc_url"], own=servers["own"], bounds=BOUNDS, rate=lambda _: 5.0, well_known=servers["well_known"]
    ) as hosts:
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(hosts.did_of(handle) for handle in handles))
        took = asyncio.get_running_loop().time() - began
    assert took >= 1.7, "five at once, then five a second"
    assert len(says.asked) == len(handles)


async def test_what_was_claimed_before_the_resolver_was_on_is_verified(
    world: Any, store: Store, postgres_url: str, pg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "EARLIER_PIECE", 2)
    says, servers = world
    dids = ["did:plc:" + letter * 24 for letter in "abcde"]
    for did in dids:
        handle = f"{did[-1]}.test"
        says.is_called(did, handle)
        says.records[handle] = [f"did={did}"]
    await mark(store, *((did, f"{did[-1]}.test", 1) for did in dids))  # the resolver is off: shown as claimed
    assert await pg.fetchval(PENDING) == 0
    assert await pg.fetchval("SELECT count(verified_handle) FROM fastworker.identities") == 0
    async with resolving(postgres_url, servers):
        await until(pg, "SELECT count(verified_handle) FROM fastworker.identities", len(dids))
    asked = len(says.asked)
    async with resolving(postgres_url, servers):  # once is enough
        await asyncio.sleep(0.3)
    assert len(says.asked) == asked


@pytest.mark.parametrize("switch", ["on", "off"])
async def test_the_worker_resolves_beside_its_stream(
    switch: str, world: Any, redis_url: str, postgres_url: str, pg: Any
) -> None:
    says, servers = world
    says.is_called(ALICE)
    async with Redis.from_url(redis_url) as redis:
        await redis.xgroup_create("firehose:events", "firehose-processors", id="0", mkstream=True)
        data = f'{{"did":"{ALICE}","handle":null,"time":"2026-11-01T00:00:00Z"}}'
        await redis.xadd("firehose:events", {"type": "identity", "data": data, "seq": "5"})
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fastworker",
            "worker",
            env={
                **os.environ,
                "REDIS_URL": redis_url,
                "DATABASE_URL": postgres_url,
                "FASTWORKER_HTTP_PORT": "off",
                "FASTWORKER_PLC_URL": servers["plc_url"],
                "FASTWORKER_RESOLVE_HANDLES": switch,
                "LOG_LEVEL": "WARNING",
            },
        )
        try:
            await until(pg, "SELECT count(*) FROM fastworker.identities", 1)
            if switch == "on":
                await until(pg, PENDING)
            else:
                await asyncio.sleep(1.0)
                assert await pg.fetchval(PENDING) == 1
            process.terminate()
            async with asyncio.timeout(60):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert bool(says.asked) is (switch == "on")

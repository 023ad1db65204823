"""The client of foreign hosts against simulated ones, fault by fault: what the caller gets, and what the host got."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from yarl import URL

from fastworker.errors import ConfigError
from fastworker.event import proof
from fastworker.event.repository import Repository
from fastworker.simulator import mst
from fastworker.simulator.hosts import Fault, SimHosts, SimPds
from fastworker.simulator.network import Network
from fastworker.simulator.repo import read_car
from fastworker.simulator.world import Account
from fastworker.sync import hosts as edge
from fastworker.sync import many
from fastworker.sync.fetch import NotFetched, Refusal, fetched
from fastworker.sync.hosts import Bounds, HostError, HostFault, Hosts, pds_of, rate_of

BOUNDS = Bounds(
    idle_s=0.4, total_s=5.0, window_s=0.2, least_bytes=10_000, bytes_max=4_000_000, wait_max_s=2.0, connect_s=1.0
)


@pytest.fixture
def network() -> Network:
    network = Network(3, accounts=9, signed=True)
    list(network.frames(400))
    return network


@pytest.fixture
async def sim(network: Network) -> AsyncIterator[SimHosts]:
    async with SimHosts(network.world) as sim:
        yield sim


@pytest.fixture
async def hosts(sim: SimHosts) -> AsyncIterator[Hosts]:
    async with open_hosts(sim) as hosts:
        yield hosts


def open_hosts(sim: SimHosts, *, bounds: Bounds = BOUNDS, rate: float = 500.0) -> Hosts:
    return Hosts(sim.directory.url, own=sim.own, bounds=bounds, rate=lambda _: rate)


def largest(network: Network) -> Account:
    """Of the active ones."""
    return max((one for one in network.world.accounts() if one.status is None), key=lambda one: len(one.live))


@pytest.fixture
def account(network: Network) -> Account:
    return largest(network)


@pytest.fixture
def pds(sim: SimHosts, account: Account) -> SimPds:
    return sim.pds(account)


async def fetch(hosts: Hosts, did: str, folder: Path) -> list[bytes]:
    async with fetched(hosts, did, folder, tries_s=(0.0, 0.01, 0.01)) as repository:
        assert list(folder.iterdir())
        return [f"{held.collection}/{held.rkey}".encode() for held in repository.records()]


async def refused(hosts: Hosts, did: str, folder: Path) -> Refusal:
    with pytest.raises(NotFetched) as caught:
        await fetch(hosts, did, folder)
    assert not list(folder.iterdir())  # nothing is left of what did not do
    return caught.value.refusal


async def test_what_hosts_list(sim: SimHosts, hosts: Hosts, network: Network, account: Account) -> None:
    said = {one.did: (one.status is None, one.status) for one in network.world.accounts()}
    assert set(said.values()) == {(True, None), (False, "deactivated")}
    found, cursor = await hosts.list_repos(sim.relay.url)
    assert ({one.did: (one.active, one.status) for one in found}, cursor) == (said, None)
    assert next(one for one in found if one.did == account.did).rev == account.repo.rev
    known, _ = await hosts.list_hosts(sim.relay.url)
    assert sorted(f"http://{one.hostname}" for one in known) == sorted(pds.url for pds in sim.pdses)
    for one in network.world.accounts():
        status = await hosts.repo_status(sim.relay.url, one.did)  # by a redirect to its PDS
        assert (status.active, status.status, status.rev) == (*said[one.did], one.repo.rev)
    assert pds_of(await hosts.document(account.did)) == sim.pds(account).url


async def test_one_record_and_its_absence(sim: SimHosts, hosts: Hosts, account: Account) -> None:
    key, value = next(mst.items(account.repo.root))
    collection, _, rkey = key.decode().partition("/")
    root, blocks = read_car(await hosts.get_record(sim.pds(account).url, account.did, collection, rkey))
    commit = proof.read_commit(blocks[root])
    assert proof.find(blocks, commit.data, key) == value
    root, blocks = read_car(await hosts.get_record(sim.pds(account).url, account.did, "a.b.c", "none"))
    assert proof.find(blocks, proof.read_commit(blocks[root]).data, b"a.b.c/none") is None


async def test_every_repository_is_fetched_whole(hosts: Hosts, network: Network, tmp_path: Path) -> None:
    for one in network.world.accounts():
        assert await fetch(hosts, one.did, tmp_path) == [key for key, _ in mst.items(one.repo.root)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["unordered", "duplicates", "foreign"])
async def test_what_is_allowed_costs_nothing(
    fault: Fault, hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path
) -> None:
    pds.fail(fault)
    assert len(await fetch(hosts, account.did, tmp_path)) == len(list(mst.items(account.repo.root)))
    assert len(pds.asked) == 1


@pytest.mark.parametrize("fault", ["truncated", "cut", "missing_block", "changed_block", "commit_meanwhile", "html"])
async def test_what_is_not_whole_is_asked_for_again(
    fault: Fault, hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path
) -> None:
    pds.fail(fault, times=2)
    assert len(await fetch(hosts, account.did, tmp_path)) == len(list(mst.items(account.repo.root)))
    assert len(pds.asked) == 3
    pds.fail(fault)
    assert await refused(hosts, account.did, tmp_path) in (Refusal.BAD_CAR, Refusal.BAD_ANSWER)
    assert len(pds.asked) == 6


@pytest.mark.parametrize(
    ("fault", "refusal"),
    [
        ("wrong_key", Refusal.BAD_SIGNATURE),
        ("other_account", Refusal.BAD_SIGNATURE),
        ("future_rev", Refusal.FUTURE_REV),
        ("bomb", Refusal.TOO_LARGE),
        ("endless", Refusal.TOO_LARGE),
        ("trickle", Refusal.UNREACHABLE),
        ("silent", Refusal.UNREACHABLE),
        ("unavailable", Refusal.UNREACHABLE),
        ("redirect_private", Refusal.PRIVATE),
        ("redirect_plain", Refusal.PRIVATE),
        ("redirect_loop", Refusal.BAD_ANSWER),
        ("not_found", Refusal.GONE),
        ("takendown", Refusal.GONE),
        ("suspended", Refusal.GONE),
        ("deactivated", Refusal.GONE),
    ],
)
async def test_what_ends_a_fetch(
    fault: Fault, refusal: Refusal, hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path
) -> None:
    pds.fail(fault)
    started = time.monotonic()
    assert await refused(hosts, account.did, tmp_path) == refusal
    assert time.monotonic() - started < 20
    if refusal in (Refusal.UNREACHABLE, Refusal.PRIVATE, Refusal.TOO_LARGE):  # the host is left alone, the others not
        before = len(pds.asked)
        pds.fail(None)
        assert await refused(hosts, account.did, tmp_path) == Refusal.UNREACHABLE
        assert len(pds.asked) == before


async def test_a_trickle_ends_by_its_speed(sim: SimHosts, pds: SimPds, account: Account, tmp_path: Path) -> None:
    pds.fail("trickle")
    bounds = Bounds(window_s=0.2, least_bytes=10_000)
    async with open_hosts(sim, bounds=bounds) as hosts, asyncio.timeout(20):
        with pytest.raises(HostError, match=r"bytes in 0 s") as caught:
            await hosts.get_repo(pds.url, account.did, tmp_path / "repo.car")
    assert caught.value.fault == HostFault.SLOW


async def test_an_encoding_that_nobody_asked_for(hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path) -> None:
    pds.fail("brotli")
    assert await refused(hosts, account.did, tmp_path) == Refusal.BAD_ANSWER


async def test_a_packed_body_that_ends_early(
    hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its bytes may be there, and only the checksum is not: then the file looks whole."""
    compress = gzip.compress
    monkeypatch.setattr(gzip, "compress", lambda data, level: compress(data, level)[:-4])
    assert await refused(hosts, account.did, tmp_path) == Refusal.BAD_ANSWER
    assert len(pds.asked) == 3


@pytest.mark.parametrize(("remaining", "is_paused"), [("0", True), ("1", False)])
def test_a_host_that_has_nothing_left_is_asked_after_its_reset(remaining: str, is_paused: bool) -> None:
    turns = edge._Turns(8.0, 4, (60.0,))
    turns.told({"ratelimit-remaining": remaining, "ratelimit-reset": str(int(time.time()) + 60)})
    assert turns.is_limited == (turns.parked_until > time.monotonic() + 50) == is_paused


async def test_a_host_that_is_down_is_left_alone_and_its_neighbour_is_not(
    sim: SimHosts, hosts: Hosts, network: Network, tmp_path: Path
) -> None:
    down = sim.pdses[0]
    await down.stop()
    answers = {}
    for one in network.world.accounts():
        try:
            await fetch(hosts, one.did, tmp_path)
            answers[one.did] = "fetched"
        except NotFetched as error:
            answers[one.did] = error.refusal
    for one in network.world.accounts():
        assert answers[one.did] == (Refusal.UNREACHABLE if sim.pds(one) is down else "fetched")
    assert hosts.requests[down.url.removeprefix("http://")] == 1


@pytest.mark.parametrize("fault", ["limited", "limited_told", "limited_retry_after"])
async def test_a_429_pauses_that_host_and_spends_no_try(
    fault: Fault, sim: SimHosts, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "PARK_S", 0.3)
    pds = sim.pds(account)
    pds.window_s = 1.2
    pds.fail(fault, times=1)
    async with open_hosts(sim, bounds=Bounds(wait_max_s=10)) as hosts:
        assert len(await fetch(hosts, account.did, tmp_path)) == len(list(mst.items(account.repo.root)))
        assert len(pds.asked) == 2
        assert pds.asked[1][0] - pds.asked[0][0] >= (0.3 if fault == "limited" else 0.9)


async def test_a_429_that_asks_for_more_than_we_wait(
    hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path
) -> None:
    pds.fail("limited")  # 30 s, and the bounds here have 2
    async with asyncio.timeout(20):
        assert await refused(hosts, account.did, tmp_path) == Refusal.LIMITED
    assert len(pds.asked) == 1


async def test_no_host_gets_more_than_its_rate(sim: SimHosts, account: Account) -> None:
    pds = sim.pds(account)
    async with open_hosts(sim, rate=5.0, bounds=Bounds()) as hosts:
        await asyncio.gather(*(hosts.repo_status(pds.url, account.did) for _ in range(12)))
    assert pds.most_in(0.6) <= 5  # no burst; a request that comes late is nearer to the next one
    assert pds.asked[-1][0] - pds.asked[0][0] >= 1.9
    async with open_hosts(sim, rate=10.0, bounds=Bounds()) as hosts:
        pds.asked.clear()
        await asyncio.gather(  # half of them by way of another host
            *(hosts.repo_status(url, account.did) for url in (pds.url, sim.relay.url) for _ in range(6))
        )
    assert len(pds.asked) == 12
    assert pds.most_in(0.6) <= 10


async def test_headers_slow_us_down(sim: SimHosts, account: Account, tmp_path: Path) -> None:
    """What is left of the window is shared over what is left of its time."""
    pds = sim.pds(account)
    pds.tokens, pds.window_s = 5.0, 3.0
    async with open_hosts(sim, bounds=Bounds()) as hosts:
        for number in range(4):
            await hosts.get_repo(pds.url, account.did, tmp_path / f"{number}")
    assert pds.asked[-1][0] - pds.asked[0][0] > 0.8


async def test_a_rotated_key_is_looked_up_again(sim: SimHosts, hosts: Hosts, account: Account, tmp_path: Path) -> None:
    old = account.key
    assert old is not None
    sim.rotate(account)
    assert await fetch(hosts, account.did, tmp_path)
    sim.keys[account.did] = old.multikey  # a directory that does not know of it
    assert await refused(hosts, account.did, tmp_path) == Refusal.BAD_SIGNATURE
    assert sim.counts[f"/{account.did}"] == 3


async def test_an_account_that_moves_between_document_and_request(
    sim: SimHosts, hosts: Hosts, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = sim.pds(account)
    documents = []
    ask = hosts.document

    async def document(did: str) -> dict[str, Any]:
        documents.append(await ask(did))
        sim.moved[did] = (sim.pdses.index(old) + 1) % 3
        sim.settle()
        return documents[-1]

    monkeypatch.setattr(hosts, "document", document)
    assert await fetch(hosts, account.did, tmp_path)
    assert len(documents) == 2
    assert len(old.asked) == 1


@pytest.mark.parametrize(
    ("document", "refusal"),
    [
        (404, Refusal.GONE),
        (410, Refusal.GONE),
        ({"id": "did:plc:other"}, Refusal.BAD_ANSWER),
        ({"service": []}, Refusal.GONE),
        ({"verificationMethod": []}, Refusal.NO_KEY),
    ],
)
async def test_documents_that_do_not_do(
    document: int | dict[str, Any], refusal: Refusal, sim: SimHosts, hosts: Hosts, account: Account, tmp_path: Path
) -> None:
    sim.documents[account.did] = document if isinstance(document, int) else {**sim.document(account), **document}
    assert await refused(hosts, account.did, tmp_path) == refusal


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:1", "https://127.0.0.1", "https://[::1]", "https://localhost", "https://a.test:444"]
)
async def test_a_document_names_no_private_host(
    endpoint: str, sim: SimHosts, hosts: Hosts, account: Account, tmp_path: Path
) -> None:
    document = sim.document(account)
    document["service"][0]["serviceEndpoint"] = endpoint
    sim.documents[account.did] = document
    assert await refused(hosts, account.did, tmp_path) == Refusal.PRIVATE


async def test_a_name_that_leads_to_a_private_address(sim: SimHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object) -> list[Any]:
        return [{"hostname": "h", "host": "10.0.0.1", "port": 443, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr("aiohttp.ThreadedResolver.resolve", resolve)
    async with open_hosts(sim) as hosts:
        with pytest.raises(HostError) as caught:
            await hosts.list_repos("https://inside.example.com")
    assert caught.value.fault == HostFault.REFUSED


async def test_a_method_that_we_do_not_know(hosts: Hosts) -> None:
    for did in ("did:key:zQ3", "did:web:localhost", "did:web:127.0.0.1", "did:web:a.com%3A444"):
        with pytest.raises(HostError) as caught:
            await hosts.document(did)
        assert caught.value.fault == HostFault.REFUSED


async def test_a_spool_without_room(
    hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def full(_: Path) -> Iterator[IO[bytes]]:
        with Path("/dev/full").open("wb", buffering=0) as file:
            yield file

    monkeypatch.setattr(edge, "_spooling", full)
    with pytest.raises(HostError) as caught:
        await hosts.get_repo(pds.url, account.did, tmp_path / "repo.car")
    assert caught.value.fault == HostFault.NO_SPACE


async def test_a_file_that_is_there_is_never_touched(
    hosts: Hosts, pds: SimPds, account: Account, tmp_path: Path
) -> None:
    (tmp_path / "repo.car").write_text("mine")
    with pytest.raises(FileExistsError):
        await hosts.get_repo(pds.url, account.did, tmp_path / "repo.car")
    assert (tmp_path / "repo.car").read_text() == "mine"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coincurve", None)
    monkeypatch.delitem(sys.modules, "fastworker.sync.keys")
    with pytest.raises(ConfigError, match="pip install 'coincurve"):
        __import__("fastworker.sync.keys")


def test_a_file_is_read_as_it_came(network: Network, tmp_path: Path) -> None:
    from fastworker.simulator.hosts import repository

    one = largest(network)
    (tmp_path / "repo.car").write_bytes(repository(one))
    with Repository(tmp_path / "repo.car") as opened:
        assert len(list(opened.records())) == len(list(mst.items(one.repo.root)))


async def test_requests_that_fail_together_are_one_failure(
    sim: SimHosts, account: Account, pds: SimPds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once were four in a row: one hiccup, and a host was left alone for a day."""
    monkeypatch.setattr(edge, "CLOSED_S", (0.5, 3_600.0))
    async with open_hosts(sim) as hosts:
        pds.hold = asyncio.Event()
        asked = [asyncio.create_task(hosts.repo_status(pds.url, account.did)) for _ in range(4)]
        async with asyncio.timeout(20):
            while len(pds.asked) < 4:
                await asyncio.sleep(0.01)
        pds.status = 503
        pds.hold.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert {one.fault for one in found if isinstance(one, HostError)} == {HostFault.UNREACHABLE}
        pds.status = None
        await asyncio.sleep(0.6)
        assert (await hosts.repo_status(pds.url, account.did)).active


async def test_a_busy_host_keeps_no_other_waiting(
    sim: SimHosts, network: Network, account: Account, pds: SimPds
) -> None:
    """Its waiting requests took the slots of everybody."""
    other = next(one for one in network.world.accounts() if sim.pds(one) is not pds)
    async with open_hosts(sim, bounds=Bounds()) as hosts:
        pds.hold = asyncio.Event()
        asked = [asyncio.create_task(hosts.repo_status(pds.url, account.did)) for _ in range(2 * edge.HOSTS_AT_ONCE)]
        async with asyncio.timeout(20):
            while len(pds.asked) < 4:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            assert (await hosts.repo_status(sim.pds(other).url, other.did)).active
        assert len(pds.asked) <= 4
        pds.hold.set()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_what_waits_sees_that_the_host_wants_rest(sim: SimHosts, account: Account, pds: SimPds) -> None:
    """Twelve callers, four at once: after the first 429 nobody else asks."""
    async with open_hosts(sim, bounds=Bounds(wait_max_s=10.0)) as hosts:
        pds.hold = asyncio.Event()
        asked = [asyncio.create_task(hosts.repo_status(pds.url, account.did)) for _ in range(12)]
        async with asyncio.timeout(20):
            while len(pds.asked) < 4:
                await asyncio.sleep(0.01)
        pds.status = 429
        pds.hold.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
    assert {one.fault for one in found if isinstance(one, HostError)} == {HostFault.LIMITED}
    assert len(pds.asked) == 4


async def test_the_directory_is_never_left_alone_for_a_day(
    sim: SimHosts, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "DIRECTORY_CLOSED_S", (0.05, 0.1))
    sim.documents[account.did] = 503
    async with open_hosts(sim) as hosts:
        for _ in range(5):
            with pytest.raises(HostError):
                await hosts.document(account.did)
            await asyncio.sleep(0.15)
        del sim.documents[account.did]
        assert (await hosts.document(account.did))["id"] == account.did


def test_rates_are_by_the_name_of_the_host() -> None:
    """As the client asks for them: an authority has the port, also that of https."""
    names = {"plc.directory": 10.0, "bsky.social": 8.0, "morel.us-east.host.bsky.network": 8.0, "pds.example.com": 2.0}
    for name, rate in names.items():
        assert rate_of(name) == rate_of(URL(f"https://{name}/xrpc").authority) == rate


def test_two_that_start_at_once_keep_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who clears what killed processes left must not take the folder that another makes at that moment."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = tempfile.mkdtemp

    def overtaken(prefix: str) -> str:
        monkeypatch.setattr(tempfile, "mkdtemp", made)
        folder = made(prefix=prefix)
        with many.spool():
            pass
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", overtaken)
    with many.spool() as folder:
        assert folder.exists()
        with many.spool():
            assert folder.exists()
    assert not list(tmp_path.iterdir())

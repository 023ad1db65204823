"""`fastworker demo --outage`: the relay forgets what happened while the reader was away; the hosts still know it.

The first third of the events is served, then the relay is gone. When it is back it has forgotten the second third, what
it said of accounts and handles too: the reader records a gap. Labels and bookmarks are in no repository, so the relay
still has these. Then `fastworker repair --gap` runs against the simulated hosts, directory and lists.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from fastworker.config import Config, parse_config
from fastworker.errors import ExitCode
from fastworker.law.compare import KEYS, Difference, Tables
from fastworker.law.model import COLUMNS
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import SimFrame, account_frame, identity_frame
from fastworker.sync.hosts import Hosts

ACCOUNTS_MAX: Final = 300
HOSTS: Final = 3
SOME: Final = 10  # accounts
RATE: Final = 1_000.0
_STAYS: Final = ("app.bsky.bookmark.", "com.atproto.label.")
_VERSION: Final = ("commit_seq", "commit_rev", "commit_time")
_LOOK_S: Final = 0.1
_LEAVE_S: Final = 2.0


class Places(msgspec.Struct, frozen=True):
    """Where the directory, the relay's lists and the hosts are."""

    plc_url: str
    relay_url: str
    own: list[str]


def accounts(events: int) -> int:
    """Few enough that fetching everybody takes no longer than the rest."""
    return min(ACCOUNTS_MAX, max(20, events // 20))


def is_forgotten(frame: SimFrame) -> bool:
    event = frame.event
    return event is not None and not any(op["path"].startswith(_STAYS) for op in event.get("ops", ()))


def frames(network: Network, count: int, away: range) -> Iterator[SimFrame]:
    """Before the outage some accounts leave; in the middle of it they come back, and some take another handle. At the
    end everybody is active, so that every host has something to show."""
    for number in range(count):
        if number == away.start - 1:
            yield from _leave(network)
        elif number in (away.start + len(away) // 2, count - 1):
            yield from _come_back(network, renamed=SOME if number in away else 0)
        yield from network.frames(1)


def _leave(network: Network) -> Iterator[SimFrame]:
    for account in network.world.accounts()[:SOME]:
        account.status = "deactivated"
        yield account_frame(network.clock.tick(), account.did, active=False, status=account.status)


def _come_back(network: Network, *, renamed: int) -> Iterator[SimFrame]:
    world = network.world
    for number, account in enumerate(world.accounts()):
        if number < renamed:
            account.handle = f"new-{account.handle}"
            tick = world.clock.tick()
            world.operations.append((tick.time, account.did, account.handle))
            yield identity_frame(tick, account.did, account.handle)
        if account.status is not None:
            account.status = None
            yield account_frame(world.clock.tick(), account.did, active=True)


@asynccontextmanager
async def places_of(network: Network) -> AsyncIterator[Places]:
    from fastworker.simulator.hosts import SimHosts  # noqa: PLC0415 - signs: only `--outage` needs the extra verify

    async with SimHosts(network.world, count=HOSTS) as hosts:
        yield Places(hosts.directory.url, hosts.relay.url.replace("http", "ws"), sorted(hosts.own))


async def sent(relay: SimRelay, count: int, stopping: asyncio.Event) -> None:
    """Wait until the reader has been sent what came before the outage."""
    while True:
        if relay.sent >= count or stopping.is_set():
            return
        await asyncio.sleep(_LOOK_S)


async def until_left(relay: SimRelay) -> None:
    """Wait until the reader has gone: it is stopped at the same moment, and must not see the relay end."""
    ends = time.monotonic() + _LEAVE_S
    while True:
        if not relay.clients or time.monotonic() > ends:
            return
        await asyncio.sleep(0.01)


def back_again(frames: list[bytes], *, port: int, rate: float | None) -> SimRelay:
    """The relay at the same place, which remembers only these."""
    relay = SimRelay(frames[1:], port=port, rate=rate, window=len(frames) + 1, start="oldest", wait_for_client=True)
    relay.emit(frames[0])
    return relay


def settings(places: Places, redis_url: str, database_url: str) -> Config:
    """A repair's. It shows handles as the demo's worker does, which has nobody to verify them."""
    servers = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "RELAY_URL": places.relay_url}
    return parse_config({**servers, "FASTWORKER_RESOLVE_HANDLES": "off"})


async def mend(places: Places, redis_url: str, database_url: str, stopping: asyncio.Event) -> ExitCode:
    config = settings(places, redis_url, database_url)
    from fastworker.commands.repairs import RepairOptions, repair  # noqa: PLC0415 - checks signatures

    async with Hosts(places.plc_url, own=frozenset(places.own), rate=lambda _: RATE) as hosts:
        return await repair(config, RepairOptions((), gap=True), stopping, hosts=hosts)


def compared(tables: Tables, expected: Tables) -> Tables:
    """Without a row's version, which a repaired one has from its snapshot; without users of whom nothing is left in the
    network but a DID in a lost event; without accounts that are active, as everybody is who is not in the table."""
    named = {
        value
        for table, rows in expected.items()
        if table not in ("users", "fastworker.accounts")
        for row in rows
        for value in row.values()
        if isinstance(value, str) and value.startswith("did:")
    }
    plain = {
        table: [{name: value for name, value in row.items() if name not in _VERSION} for row in rows]
        for table, rows in tables.items()
    }
    known = [row for row in plain["users"] if row["did"] in named or row["handle"] != "handle.invalid"]
    inactive = [row for row in plain["fastworker.accounts"] if not row["active"]]
    return {**plain, "users": known, "fastworker.accounts": inactive}


def ratios(expected: Tables, found: Tables, differences: list[Difference]) -> dict[str, float]:
    """Of each table the share of rows, of those that there should be or are, that are as they must be."""
    wrong: dict[str, set[tuple[object, ...]]] = {}
    for one in differences:
        wrong.setdefault(one.table, set()).add(one.key)
    shares = {}
    for table, rows in expected.items():
        columns = KEYS.get(table) or (COLUMNS[table].split()[0],)
        keys = {tuple(row[column] for column in columns) for row in (*rows, *found.get(table, []))}
        if keys:
            shares[table] = 1 - len(wrong.get(table, ())) / len(keys)
    return shares

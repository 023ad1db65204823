"""Who a DID is: its document, DNS and the handle's own file. The only importer of dnspython.

A handle counts when both sides say so: the DID document names it, and it names the DID (atproto.com/specs/handle).
Documents and files come by the one client of foreign hosts (sync/hosts.py), with all its rules.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Final

import dns.asyncresolver
import dns.exception
import dns.resolver

from fastworker.sync.addresses import is_host
from fastworker.sync.hosts import Bounds, HostError, HostFault, Hosts, handle_in

DNS_S: Final = 3.0
VERIFIED_S: Final = 600.0  # a handle's DID is remembered
VERIFIED_MAX: Final = 10_000
BOUNDS: Final = Bounds(idle_s=5.0, total_s=5.0, wait_max_s=30.0)
"""Answers are small; who keeps us waiting is asked again later."""
_SAYS_NO: Final = frozenset((HostFault.NOT_FOUND, HostFault.TOMBSTONED, HostFault.BAD_ANSWER, HostFault.TOO_LARGE))


class Unresolved(Exception):
    """Nobody could say right now; ask again later."""


class Directory:
    """`nameserver` is where tests put their own server."""

    def __init__(self, hosts: Hosts, *, nameserver: tuple[str, int] | None = None) -> None:
        self._hosts = hosts
        self._dns = dns.asyncresolver.Resolver(configure=nameserver is None)
        if nameserver is not None:
            self._dns.nameservers = [nameserver[0]]
            self._dns.port = nameserver[1]
        self._verified: OrderedDict[str, tuple[float, str]] = OrderedDict()

    async def handle_of(self, did: str) -> str | None:
        """The DID's verified handle, lower-cased; None when it has none. Raises Unresolved."""
        if not did.startswith("did:plc:") and not (did.startswith("did:web:") and is_host(did[8:])):
            return None
        try:
            document = await self._hosts.document(did)
        except HostError as error:
            _expect_no(error)
            return None
        handle = handle_in(document) or ""
        return handle if is_host(handle) and await self._did_of(handle, did) == did else None

    async def _did_of(self, handle: str, did: str) -> str | None:
        """The DID that a handle names, by DNS, else by its well-known file. Raises Unresolved.

        Remembered only for `did`: that it names another one may have changed, and then it is taken over.
        """
        now = time.monotonic()
        if (known := self._verified.get(handle)) is not None and known[0] > now and known[1] == did:
            return did
        named = await self._by_dns(handle)
        if named is None:
            try:
                named = await self._hosts.did_of(handle)
            except HostError as error:
                _expect_no(error)
                return None
        if not named.startswith("did:"):
            return None
        self._verified[handle] = (now + VERIFIED_S, named)
        if len(self._verified) > VERIFIED_MAX:
            self._verified.popitem(last=False)
        return named

    async def _by_dns(self, handle: str) -> str | None:
        """None when DNS says nothing, or two things, or cannot be asked: the well-known file decides."""
        try:
            answer = await self._dns.resolve(f"_atproto.{handle}", "TXT", lifetime=DNS_S)
        except (dns.exception.DNSException, OSError):
            return None
        texts = [b"".join(record.strings).decode("ascii", "replace") for record in answer]
        dids = {text[4:].strip() for text in texts if text.startswith("did=")}
        return dids.pop() if len(dids) == 1 else None


def _expect_no(error: HostError) -> None:
    """The host says that there is nothing; else Unresolved."""
    if error.fault not in _SAYS_NO:
        raise Unresolved(str(error)) from None


async def gather(
    directory: Directory, dids: list[str], at_once: int, apart_s: float
) -> dict[str, str | Unresolved | None]:
    """handle_of many: no more than `at_once` at a time, their beginnings `apart_s` seconds apart."""
    found: dict[str, str | Unresolved | None] = {}
    slots = asyncio.Semaphore(at_once)

    async def ask(did: str) -> None:
        async with slots:
            try:
                found[did] = await directory.handle_of(did)
            except Unresolved as error:
                found[did] = Unresolved(*error.args)  # its traceback would hold everything here until a collection

    async with asyncio.TaskGroup() as tasks:
        for did in dids:
            tasks.create_task(ask(did))
            await asyncio.sleep(apart_s)
    return found

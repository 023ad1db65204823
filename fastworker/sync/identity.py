"""Who a DID is: the DID directory, DNS and well-known files. The only importer of dnspython.

A handle counts when both sides say so: the DID document names it, and it names the DID (atproto.com/specs/handle).
Hosts come from the network, so nothing private is asked (sync/addresses.py judges each URL, each redirect and each
address), answers are small, requests are short, and a host that keeps failing is left alone for a while.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections import OrderedDict
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import dns.asyncresolver
import dns.exception
import dns.resolver
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from fastworker.sync.addresses import is_host, is_public, refusal

DOCUMENT_BYTES_MAX: Final = 64 * 1024
DID_BYTES_MAX: Final = 2 * 1024
REQUEST_S: Final = 5.0
DNS_S: Final = 3.0
REDIRECTS_MAX: Final = 3
_REDIRECTS: Final = (301, 302, 303, 307, 308)
VERIFIED_S: Final = 600.0  # a handle's DID is remembered
VERIFIED_MAX: Final = 10_000
FAILURES_MAX: Final = 5  # of one host, in a row
OPEN_S: Final = 30.0  # first pause of a failing host, doubled by each further failure
OPEN_MAX_S: Final = 600.0
HOSTS_MAX: Final = 10_000


class Unresolved(Exception):
    """Nobody could say right now; ask again later."""


class _Document(msgspec.Struct):
    id: str
    alsoKnownAs: list[Any] = []  # noqa: N815 - the document's own name


class Breaker:
    """Leaves a host alone that failed FAILURES_MAX times in a row; one request tries it again after the pause."""

    def __init__(self) -> None:
        self._hosts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # failures, closed until (monotonic)

    def check(self, host: str) -> None:
        """Raises Unresolved while the host is left alone."""
        if (found := self._hosts.get(host)) is not None and time.monotonic() < found[1]:
            raise Unresolved(f"{host} is left alone after {found[0]} failures")

    def failed(self, host: str) -> None:
        failures = self._hosts.pop(host, (0, 0.0))[0] + 1
        wait = min(OPEN_MAX_S, OPEN_S * 2.0 ** (failures - FAILURES_MAX)) if failures >= FAILURES_MAX else 0.0
        self._hosts[host] = (failures, time.monotonic() + wait)
        if len(self._hosts) > HOSTS_MAX:
            self._hosts.popitem(last=False)

    def worked(self, host: str) -> None:
        self._hosts.pop(host, None)


class _PublicOnly(AbstractResolver):
    """The system's names, without addresses that are not public. aiohttp connects to what it is given here."""

    def __init__(self) -> None:
        self._inner = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = [a for a in await self._inner.resolve(host, port, family) if is_public(a["host"])]
        if not found:
            raise OSError(errno.EHOSTUNREACH, f"{host} has no public address")
        return found

    async def close(self) -> None:
        await self._inner.close()


class Directory:
    """An async context manager. `well_known` and `nameserver` are where tests put their own servers.

    The rules for foreign hosts hold for all but the first request to the operator's own directory (or, with
    `allow_private`, to the tests' servers).
    """

    def __init__(
        self,
        plc_url: str,
        *,
        well_known: str = "https://{host}/.well-known",
        nameserver: tuple[str, int] | None = None,
        allow_private: bool = False,
    ) -> None:
        self._plc_url = plc_url.rstrip("/")
        self._well_known = well_known
        self._allow_private = allow_private
        self._dns = dns.asyncresolver.Resolver(configure=nameserver is None)
        if nameserver is not None:
            self._dns.nameservers = [nameserver[0]]
            self._dns.port = nameserver[1]
        self._breaker = Breaker()
        self._verified: OrderedDict[str, tuple[float, str]] = OrderedDict()

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=REQUEST_S)
        self._own = aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())
        connector = aiohttp.TCPConnector(resolver=_PublicOnly(), limit_per_host=2)
        self._foreign = aiohttp.ClientSession(timeout=timeout, connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._own.close()
        await self._foreign.close()

    async def handle_of(self, did: str) -> str | None:
        """The DID's verified handle, lower-cased; None when it has none. Raises Unresolved."""
        if did.startswith("did:plc:"):
            text = await self._get(f"{self._plc_url}/{did}", DOCUMENT_BYTES_MAX, own=True)
        elif did.startswith("did:web:") and is_host(host := did[8:].lower()):
            text = await self._get(f"{self._at(host)}/did.json", DOCUMENT_BYTES_MAX, own=self._allow_private)
        else:
            return None
        try:
            document = msgspec.json.decode(text or b"", type=_Document)
        except (msgspec.MsgspecError, UnicodeError):
            return None
        if document.id != did:
            return None
        names = [name for name in document.alsoKnownAs if isinstance(name, str) and name.startswith("at://")]
        handle = names[0][5:].lower() if names else ""
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
            text = await self._get(f"{self._at(handle)}/atproto-did", DID_BYTES_MAX, own=self._allow_private)
            named = (text or b"").decode("ascii", "replace").strip()
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

    def _at(self, host: str) -> str:
        return self._well_known.format(host=host)

    async def _get(self, text: str, bytes_max: int, *, own: bool) -> bytes | None:
        """The answer's body; None when the host says that there is none. Raises Unresolved."""
        url = URL(text)
        host = url.authority
        self._breaker.check(host)
        try:
            async with asyncio.timeout(REQUEST_S):
                body = await self._follow(url, bytes_max, own=own)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            self._breaker.failed(host)
            raise Unresolved(f"{host}: {str(error) or type(error).__name__}") from error
        except Unresolved:
            self._breaker.failed(host)
            raise
        self._breaker.worked(host)
        return body

    async def _follow(self, url: URL, bytes_max: int, *, own: bool) -> bytes | None:
        """Redirects by hand: each is judged before it is asked, and none of them is our own any more."""
        for _ in range(1 + REDIRECTS_MAX):
            if not own and (why := refusal(url)) is not None:
                raise Unresolved(f"{url.host} is not asked: {why}")
            session = self._own if own else self._foreign
            async with session.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    url, own = url.join(URL(response.headers["Location"])), False
                    continue
                if response.status == 429 or response.status >= 500:
                    raise Unresolved(f"{url.host} answers {response.status}")
                return await _body(response, bytes_max) if response.status == 200 else None
        raise Unresolved(f"{url.host}: more than {REDIRECTS_MAX} redirects")


async def _body(response: aiohttp.ClientResponse, bytes_max: int) -> bytes | None:
    """None when it is too large."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(8_192):
        body += chunk
        if len(body) > bytes_max:
            return None
    return bytes(body)


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

"""Foreign hosts: PDSes, relays, the DID directory. The one client that fetches from them, with every rule in it.

Politeness is by host: evenly spaced turns, few requests at once, what `ratelimit-*` headers say when it is less, a
pause after a 429 with or without a word how long. A host that fails is left alone, for longer and longer. Safety:
every URL is judged before it is asked (sync/addresses.py), each redirect and each address of a name; bodies are bounded
by what they decode to, by time, and by a least speed. Every failure is a HostError, by kind.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol, Self, TypeVar

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

import fastworker
from fastworker.sync.addresses import is_host, is_public, refusal

REDIRECTS_MAX: Final = 3
_REDIRECTS: Final = (301, 302, 303, 307, 308)
JSON_BYTES_MAX: Final = 4 * 1024 * 1024
DOCUMENT_BYTES_MAX: Final = 64 * 1024
RECORD_BYTES_MAX: Final = 4 * 1024 * 1024
NAME_BYTES_MAX: Final = 2 * 1024
PIECE: Final = 1 << 18
HOSTS_AT_ONCE: Final = 32  # requests in all
PARK_S: Final = 30.0  # first pause after a 429 that says nothing, doubled each time
PARK_MAX_S: Final = 600.0
TOLD_MAX_S: Final = 330.0  # longest pause that a host may ask for: its window is 300 s
CLOSED_S: Final = (60.0, 3_600.0, 86_400.0)  # pauses of a host that fails
DIRECTORY_CLOSED_S: Final = (30.0, 60.0, 120.0, 300.0, 600.0)
"""The same of the DID directory: everything needs it, and there is no other."""
REFUSED_S: Final = 86_400.0
HOSTS_MAX: Final = 20_000
_T = TypeVar("_T")


class HostFault(StrEnum):
    """What went wrong, by what is to be done about it. The values are names of metrics."""

    UNREACHABLE = "unreachable"  # DNS, TCP, TLS, 5xx: again later
    SLOW = "slow"  # silent, or slower than anything alive
    LIMITED = "limited"  # it asked us to wait: no attempt is spent
    REFUSED = "refused"  # the address is private or the URL is none that may be asked
    TOO_LARGE = "too_large"
    BAD_ANSWER = "bad_answer"  # not what the protocol says
    NOT_FOUND = "not_found"  # of the repository or record
    TAKENDOWN = "takendown"
    SUSPENDED = "suspended"
    DEACTIVATED = "deactivated"
    TOMBSTONED = "tombstoned"  # the DID was given up, says the directory
    NO_SPACE = "no_space"  # ours: the spool's disk


_NAMES: Final = {
    "RepoNotFound": HostFault.NOT_FOUND,
    "RecordNotFound": HostFault.NOT_FOUND,
    "RepoTakendown": HostFault.TAKENDOWN,
    "RepoSuspended": HostFault.SUSPENDED,
    "RepoDeactivated": HostFault.DEACTIVATED,
}
_BREAKS: Final = frozenset((HostFault.UNREACHABLE, HostFault.SLOW, HostFault.TOO_LARGE))


class HostError(Exception):
    """`wait_s`: how long this host will be left alone."""

    def __init__(self, fault: HostFault, host: str, why: str, wait_s: float = 0.0) -> None:
        super().__init__(f"{host}: {why}")
        self.fault = fault
        self.host = host
        self.why = why
        self.wait_s = wait_s


class NotPublic(OSError):
    """DNS gives no public address."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Of one request. `least_bytes` of the decoded body within each `window_s`, or it is too slow."""

    connect_s: float = 5.0
    idle_s: float = 30.0  # until the first byte, and between two
    total_s: float = 300.0
    window_s: float = 60.0
    least_bytes: int = 64 * 1024 * 60
    bytes_max: int = 1 << 30
    wait_max_s: float = 660.0  # for its turn at a host


class RepoHead(msgspec.Struct, frozen=True):
    """One repository of `listRepos`. Some hosts leave `rev` empty, or do not say whether it is active."""

    did: str
    head: str = ""
    rev: str = ""
    active: bool | None = None
    status: str | None = None


class RepoStatus(msgspec.Struct, frozen=True):
    did: str
    active: bool
    status: str | None = None
    rev: str | None = None


class KnownHost(msgspec.Struct, frozen=True):
    """One host of a relay's `listHosts`."""

    hostname: str
    accountCount: int | None = None  # noqa: N815 - the protocol's own name
    seq: int | None = None
    status: str | None = None


class Operation(msgspec.Struct, frozen=True):
    """One of the directory's log: the DID's document is another one since. `handle`: what it names, if anything."""

    did: str
    at: str  # as the directory writes it
    handle: str | None


class _Logged(msgspec.Struct):
    did: str
    createdAt: str  # noqa: N815 - the directory's own name
    operation: dict[str, Any]


class _Repos(msgspec.Struct):
    repos: list[RepoHead]
    cursor: str | None = None


class _KnownHosts(msgspec.Struct):
    hosts: list[KnownHost]
    cursor: str | None = None


class _Error(msgspec.Struct):
    error: str = ""
    message: str = ""


class SharedTurns(Protocol):
    """Where several processes count what they ask of a host."""

    async def turn(self, host: str, every_s: float) -> float: ...
    async def rest(self, host: str, seconds: float) -> None: ...


class PublicResolver(AbstractResolver):
    """The system's names, without addresses that are not public. aiohttp connects to what it is given here."""

    def __init__(self) -> None:
        self._inner = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = [a for a in await self._inner.resolve(host, port, family) if is_public(a["host"])]
        if not found:
            raise NotPublic(f"{host} has no public address")
        return found

    async def close(self) -> None:
        await self._inner.close()


class _Turns:
    """The limits of requests to one host: evenly spaced turns, slots, pauses."""

    def __init__(self, rate: float, at_once: int, closed_s: tuple[float, ...]) -> None:
        self._closed_s = closed_s
        self.slots = asyncio.Semaphore(at_once)
        self.parked_until = 0.0
        self.is_limited = False  # parked by a 429, not by failures
        self.limits = 0  # 429s in a row
        self.failures = 0
        self._rate_max = self._rate = rate
        self._next_at = 0.0

    @property
    def every_s(self) -> float:
        return 1 / self._rate

    def take(self) -> float:
        """Takes the next turn; in how many seconds it is. Turns are evenly spaced: no second has more than the rate."""
        now = time.monotonic()
        turn = max(self._next_at, now)
        self._next_at = turn + self.every_s
        return turn - now

    def told(self, headers: Any) -> None:
        """Go no faster than the host's own headers say."""
        remaining, reset = _number(headers.get("ratelimit-remaining")), _number(headers.get("ratelimit-reset"))
        if remaining is None or reset is None:
            return
        left_s = min(max(reset - time.time(), 1.0), TOLD_MAX_S)
        # mutant: a host that has nothing left is asked on
        if remaining < 1:
            self.park(left_s, is_limited=True)
        # mutant: headers slow nobody down
        self._rate = min(self._rate_max, max(remaining / left_s, 0.05))

    def limited(self, headers: Any) -> None:
        """A 429. Several at once, of requests that were on the way, are one."""
        if not (self.is_limited and self.parked_until > time.monotonic()):
            self.limits += 1
        told = _number(headers.get("retry-after"))
        if told is None and (reset := _number(headers.get("ratelimit-reset"))) is not None:
            told = reset - time.time()
        pause = min(PARK_S * 2 ** min(self.limits - 1, 10), PARK_MAX_S) if told is None else told
        self.park(min(max(pause, 1.0), PARK_MAX_S if told is None else TOLD_MAX_S), is_limited=True)

    def ended(self, fault: HostFault | None = None) -> None:
        """A request is over. A host that fails is left alone; one that only says no works."""
        if fault == HostFault.REFUSED:
            self.park(REFUSED_S, is_limited=False)
        elif fault in _BREAKS:
            # mutant: requests at once count as failures in a row
            if not (self.failures and self.parked_until > time.monotonic()):
                self.failures += 1
                # mutant: a host that fails is asked on
                self.park(self._closed_s[min(self.failures, len(self._closed_s)) - 1], is_limited=False)
        else:
            self.failures = self.limits = 0

    def park(self, seconds: float, *, is_limited: bool) -> None:
        until = time.monotonic() + seconds
        if until > self.parked_until:
            self.parked_until = until
            self.is_limited = is_limited


def _number(text: str | None) -> float | None:
    try:
        return None if text is None or len(text) > 20 else float(int(text))
    except ValueError:
        return None


class Hosts:
    """An async context manager. `own`: origins (`http://127.0.0.1:1234`) that are not judged: a test's own servers;
    `well_known`: where it has the files of hosts.

    The directory at `plc_url` is the operator's choice, and not judged either; where it redirects to is.
    """

    def __init__(
        self,
        plc_url: str,
        *,
        own: frozenset[str] = frozenset(),
        bounds: Bounds | None = None,
        rate: Callable[[str], float] | None = None,
        at_once: int = 4,
        well_known: str = "https://{host}/.well-known",
    ) -> None:
        self._plc_url = plc_url.rstrip("/")
        self._well_known = well_known
        self._own = own
        self._bounds = bounds or Bounds()
        self._rate = rate or rate_of
        self._at_once = at_once
        self._turns: dict[str, _Turns] = {}
        self._all = asyncio.Semaphore(HOSTS_AT_ONCE)
        self._shared: SharedTurns | None = None
        self.requests: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=PublicResolver(), limit=HOSTS_AT_ONCE),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={
                "User-Agent": f"fastworker/{fastworker.__version__} (indexer of the AT Protocol)",
                "Accept-Encoding": "gzip",
            },
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._bounds.connect_s, sock_read=self._bounds.idle_s
            ),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    def share(self, turns: SharedTurns) -> None:
        """Share the counts of requests with other processes from now on."""
        self._shared = turns

    def origin(self, authority: str) -> str:
        """A host as lists name it, as a URL."""
        plain = f"http://{authority}"
        return plain if plain in self._own else f"https://{authority}"

    def rate(self, authority: str) -> float:
        """Requests a second that this host gets at most."""
        return self._rate(authority)

    def resting(self) -> list[str]:
        """Hosts that are not asked now."""
        now = time.monotonic()
        return sorted(host for host, turns in self._turns.items() if turns.parked_until > now + 1)

    # What is asked: each raises HostError and nothing else of the network's

    async def get_repo(self, host: str, did: str, path: Path) -> int:
        """A whole repository into a new file, which is gone again when this fails. Returns its size.

        FileExistsError where there is one already.
        """
        url = _xrpc(host, "sync.getRepo", did=did)
        size = 0
        with _spooling(path) as file:
            async with self._ask(url, self._bounds.bytes_max) as body:
                async for piece in body:
                    if size >> 23 != (size + len(piece)) >> 23 and _is_full(path.parent, size):
                        raise HostError(HostFault.NO_SPACE, url.authority, f"{path.parent} is nearly full")
                    try:
                        file.write(piece)
                    except OSError as error:
                        raise HostError(HostFault.NO_SPACE, url.authority, f"{path.parent}: {error}") from None
                    size += len(piece)
        return size

    async def get_record(self, host: str, did: str, collection: str, rkey: str) -> bytes:
        """A CAR with the proof that a record is there, or is not."""
        url = _xrpc(host, "sync.getRecord", did=did, collection=collection, rkey=rkey)
        return await self._read(url, RECORD_BYTES_MAX)

    async def list_repos(self, host: str, cursor: str | None = None) -> tuple[list[RepoHead], str | None]:
        page = await self._json(_xrpc(host, "sync.listRepos", limit="1000", cursor=cursor), _Repos)
        return page.repos, page.cursor

    async def list_collection(
        self, relay: str, collection: str, cursor: str | None = None
    ) -> tuple[list[RepoHead], str | None]:
        url = _xrpc(relay, "sync.listReposByCollection", collection=collection, limit="2000", cursor=cursor)
        page = await self._json(url, _Repos)
        return page.repos, page.cursor

    async def list_hosts(self, relay: str, cursor: str | None = None) -> tuple[list[KnownHost], str | None]:
        page = await self._json(_xrpc(relay, "sync.listHosts", limit="1000", cursor=cursor), _KnownHosts)
        return page.hosts, page.cursor

    async def repo_status(self, host: str, did: str) -> RepoStatus:
        return await self._json(_xrpc(host, "sync.getRepoStatus", did=did), RepoStatus)

    async def document(self, did: str) -> dict[str, Any]:
        """The DID's document. NOT_FOUND: it has none. TOMBSTONED: it was given up."""
        if did.startswith("did:plc:"):
            url = URL(f"{self._plc_url}/{did}")
        elif did.startswith("did:web:") and is_host(did[8:]):
            url = self._file(did[8:].lower(), "did.json")
        else:
            raise HostError(HostFault.REFUSED, did, "its method is not did:plc, nor did:web with the name of a host")
        document: dict[str, Any] = await self._json(url, dict[str, Any], DOCUMENT_BYTES_MAX)
        if document.get("id") != did:
            raise HostError(HostFault.BAD_ANSWER, url.authority, "a document of somebody else")
        return document

    async def operations(self, after: str, count: int = 1_000) -> list[Operation]:
        """The next ones of the directory's log after a moment, as it writes moments; `count` where there are more."""
        body = await self._read(URL(f"{self._plc_url}/export").with_query(after=after, count=count), JSON_BYTES_MAX)
        try:
            found = [msgspec.json.decode(line, type=_Logged) for line in body.splitlines() if line]
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise HostError(HostFault.BAD_ANSWER, self._plc_url, f"no log of operations ({error})") from None
        return [Operation(one.did, one.createdAt, handle_in(one.operation)) for one in found]

    async def did_of(self, handle: str) -> str:
        """What a handle's host says in its file `atproto-did`. NOT_FOUND: it has none."""
        if not is_host(handle):
            raise HostError(HostFault.REFUSED, handle[:253], "it is not the name of a public host")
        body = await self._read(self._file(handle, "atproto-did"), NAME_BYTES_MAX, shared_by=domain_of(handle))
        return body.decode("ascii", "replace").strip()

    # How it is asked

    def _file(self, host: str, name: str) -> URL:
        return URL(f"{self._well_known.format(host=host)}/{name}")

    async def _json(self, url: URL, kind: type[_T], bytes_max: int = JSON_BYTES_MAX) -> _T:
        body = await self._read(url, bytes_max)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise HostError(HostFault.BAD_ANSWER, url.authority, f"not the JSON of the protocol ({error})") from None

    async def _read(self, url: URL, bytes_max: int, *, shared_by: str | None = None) -> bytes:
        async with self._ask(url, bytes_max, shared_by) as body:
            return b"".join([piece async for piece in body])

    @asynccontextmanager
    async def _ask(self, url: URL, bytes_max: int, shared_by: str | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """The decoded body of a 200, in pieces. A 429 is waited for, within the bounds.

        `shared_by`: the name under which the turns of several hosts are counted that are probably one.
        """
        deadline = time.monotonic() + self._bounds.wait_max_s
        name = shared_by or url.authority
        while True:
            turns = self._of(name)
            await self._wait(turns, name, deadline)
            # The host's own slots first: who waits for them keeps nobody else waiting.
            async with turns.slots, self._all:
                # mutant: what waits for a slot does not see the pause
                if turns.parked_until > time.monotonic():
                    continue
                try:
                    async with asyncio.timeout(self._bounds.total_s), self._get(url, deadline) as response:
                        turns.told(response.headers)
                        if response.status == 200:
                            yield self._body(response, url.authority, bytes_max)
                            turns.ended()
                            return
                        if response.status != 429:
                            raise await self._refused(response, url.authority)
                        turns.limited(response.headers)
                        if self._shared is not None:
                            await self._shared.rest(name, turns.parked_until - time.monotonic())
                except (HostError, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                    found = error if isinstance(error, HostError) else _fault(error, url.authority)
                    turns.ended(found.fault)
                    raise found from error.__cause__ or error.__context__

    async def _wait(self, turns: _Turns, name: str, deadline: float) -> None:
        """For the end of a pause, and for a turn."""
        while (pause := turns.parked_until - time.monotonic()) > 0:
            if not turns.is_limited:
                raise HostError(HostFault.UNREACHABLE, name, "left alone after it failed", pause)
            # mutant: a pause of any length is waited for
            if time.monotonic() + pause > deadline:
                raise HostError(HostFault.LIMITED, name, f"it wants {pause:.0f} s of rest", pause)
            await asyncio.sleep(pause)
        pause = turns.take()
        if self._shared is not None:
            pause = max(pause, await self._shared.turn(name, turns.every_s))
        if time.monotonic() + pause > deadline:
            raise HostError(HostFault.LIMITED, name, "too many requests wait for it", pause)
        await asyncio.sleep(pause)

    def _of(self, host: str) -> _Turns:
        turns = self._turns.get(host)
        if turns is None:
            if len(self._turns) >= HOSTS_MAX:
                self._turns.pop(next(iter(self._turns)))
            turns = self._turns[host] = _Turns(
                self._rate(host),
                self._at_once,
                DIRECTORY_CLOSED_S if host == URL(self._plc_url).authority else CLOSED_S,
            )
        return turns

    @asynccontextmanager
    async def _get(self, url: URL, deadline: float) -> AsyncIterator[aiohttp.ClientResponse]:
        """Redirects are followed by hand, so that each is judged like the first URL, waits for its turn at the host
        that it leads to, and none leaves https."""
        asked = url
        for _ in range(REDIRECTS_MAX + 1):
            own = (asked.host is not None and str(asked.origin()) in self._own) or (
                asked is url and str(url).startswith(self._plc_url + "/")
            )
            # mutant: where a redirect leads is not judged
            if not own and (why := refusal(asked)) is not None:
                raise HostError(HostFault.REFUSED, url.authority, why)
            # mutant: a redirect takes no turn
            if asked is not url:
                await self._wait(self._of(asked.authority), asked.authority, deadline)
            self.requests[asked.authority] = self.requests.get(asked.authority, 0) + 1
            async with self._session.get(asked, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    yield response
                    return
                asked = _target(asked, response.headers.get("location", ""))
        raise HostError(HostFault.BAD_ANSWER, url.authority, f"more than {REDIRECTS_MAX} redirects")

    async def _refused(self, response: aiohttp.ClientResponse, host: str) -> HostError:
        if response.status >= 500:
            return HostError(HostFault.UNREACHABLE, host, f"it answers {response.status}")
        pieces = [piece async for piece in self._body(response, host, DOCUMENT_BYTES_MAX)]
        try:
            said = msgspec.json.decode(b"".join(pieces), type=_Error)
        except (msgspec.MsgspecError, UnicodeError):
            said = _Error()
        fault = _NAMES.get(said.error)
        if response.status == 410 and host == URL(self._plc_url).authority:
            fault = HostFault.TOMBSTONED
        elif fault is None:
            fault = HostFault.NOT_FOUND if response.status in (404, 410) else HostFault.BAD_ANSWER
        return HostError(fault, host, f"it answers {response.status} {said.error}".rstrip()[:200])

    async def _body(self, response: aiohttp.ClientResponse, host: str, bytes_max: int) -> AsyncIterator[bytes]:
        bounds = self._bounds
        size = in_window = 0
        window_ends = time.monotonic() + bounds.window_s
        async for piece in _decoded(response, host):
            size += len(piece)
            in_window += len(piece)
            # mutant: a bomb is unpacked
            if size > bytes_max:
                raise HostError(HostFault.TOO_LARGE, host, f"more than {bytes_max:,} bytes")
            if time.monotonic() > window_ends:
                # mutant: a trickle is waited for
                if in_window < bounds.least_bytes:
                    raise HostError(HostFault.SLOW, host, f"{in_window:,} bytes in {bounds.window_s:.0f} s")
                in_window, window_ends = 0, time.monotonic() + bounds.window_s
            yield piece


async def _decoded(response: aiohttp.ClientResponse, host: str) -> AsyncIterator[bytes]:
    """The body in pieces of at most PIECE bytes, whatever it is packed into."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        async for chunk in response.content.iter_chunked(PIECE):
            yield chunk
        return
    if encoding != "gzip":
        raise HostError(HostFault.BAD_ANSWER, host, f"encoded as {encoding[:40]}, which nobody asked for")
    packed = zlib.decompressobj(31)
    async for chunk in response.content.iter_chunked(PIECE):
        left = chunk
        while left and not packed.eof:
            try:
                piece = packed.decompress(left, PIECE)
            except zlib.error:
                raise HostError(HostFault.BAD_ANSWER, host, "gzip that does not unpack") from None
            left = packed.unconsumed_tail
            yield piece  # also an empty one: time and speed are looked at
    # mutant: a packed body that ends early
    if not packed.eof:
        raise HostError(HostFault.BAD_ANSWER, host, "gzip that ends early")


def _fault(error: Exception, host: str) -> HostError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NotPublic):
            return HostError(HostFault.REFUSED, host, str(cause))
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, aiohttp.ClientPayloadError):
        return HostError(HostFault.BAD_ANSWER, host, "the body ends early")
    fault = HostFault.SLOW if isinstance(error, TimeoutError) else HostFault.UNREACHABLE
    return HostError(fault, host, str(error)[:200] or type(error).__name__)


def _target(asked: URL, location: str) -> URL:
    """Where a redirect leads; whether it may be asked is judged like the first URL."""
    try:
        return asked.join(URL(location))
    except ValueError as error:
        raise HostError(HostFault.REFUSED, asked.authority, f"a redirect that is no URL ({error})") from None


def without_port(authority: str) -> str:
    """A host as people name it: an authority of yarl's has the port of https, too."""
    return authority.removesuffix(":443")


def rate_of(host: str) -> float:
    """Requests per second: 3,000 in five minutes is what Bluesky's own hosts stand, of which we take 80 %."""
    host = without_port(host)
    if host == "plc.directory":
        return 10.0
    return 8.0 if host == "bsky.social" or host.endswith(".host.bsky.network") else 2.0


def domain_of(handle: str) -> str:
    """Its last two labels: handles below one domain are served by one server, as those of bsky.social are."""
    return ".".join(handle.rsplit(".", 2)[-2:])


def handle_in(document: dict[str, Any]) -> str | None:
    """The handle that a DID document, or an operation of the directory, names: a claim."""
    named = document.get("alsoKnownAs")
    for name in named if type(named) is list else ():
        if isinstance(name, str) and name.startswith("at://"):
            return name[5:].lower()
    return None


def pds_of(document: dict[str, Any]) -> str | None:
    """The account's host as its DID document names it: an origin."""
    services = document.get("service")
    for service in services if type(services) is list else ():
        if type(service) is dict and service.get("id") in ("#atproto_pds", f"{document.get('id')}#atproto_pds"):
            endpoint = service.get("serviceEndpoint")
            try:
                return str(URL(endpoint).origin()) if type(endpoint) is str else None
            except ValueError:
                return None
    return None


def _xrpc(host: str, method: str, **parameters: str | None) -> URL:
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        return URL(host) / f"xrpc/com.atproto.{method}" % given
    except ValueError:
        raise HostError(HostFault.REFUSED, host[:200], "it is no URL") from None


@contextmanager
def _spooling(path: Path) -> Iterator[IO[bytes]]:
    """A new file, which is gone again when the block fails. What was there before is never touched."""
    with path.open("xb", buffering=0) as file:
        try:
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _is_full(folder: Path, written: int) -> bool:
    """Whether less is free than has been written: the file may double before anyone looks again."""
    return shutil.disk_usage(folder).free < max(written, 64 << 20)

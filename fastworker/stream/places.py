"""One server to be found among several, and the URLs that name them: `SCHEME+KIND://[user:password@]host[:port],host.../PATH[?option=...]`."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from redis.asyncio.connection import parse_url
from redis.asyncio.sentinel import SentinelConnectionPool

from fastworker.stream.quick import close_idle


class _Asked(Protocol):
    async def aclose(self) -> None: ...


class FoundPool(SentinelConnectionPool):
    """Connections to the server that others name; they are asked at each new one.

    The connections to them are closed with these, and open again when they are needed.
    """

    sentinel_manager: _Asked
    service_name: str
    what: ClassVar[str]
    """What is found; `{}` is its name."""
    nobody: ClassVar[str]
    """Why it is not."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        if not inuse_connections:  # the library's own, where the master has another address
            await close_idle(self)
            return
        await super().disconnect()
        await self.sentinel_manager.aclose()

    @property
    def place(self) -> str:
        """The server that was found last, and as what."""
        address = f"{self.master_address[0]}:{self.master_address[1]}, " if self.master_address else ""
        return address + self.what.format(self.service_name)


class Places(NamedTuple):
    hosts: list[tuple[str, int]]
    name: str  # what the path begins with
    options: dict[str, Any]  # of a connection to a server, as redis-py names them


def split(url: str, port: int) -> Places:
    """Of a URL that urls.redis accepted; `port` where a host has none. ValueError for a bad option."""
    scheme, rest = url.split("://", 1)
    scheme = scheme.partition("+")[0]
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    user, at, hosts = authority.rpartition("@")
    name, _, database = path.partition("/")
    options: dict[str, Any] = dict(parse_url(f"{scheme}://{user}{at}host/{database}?{query}"))
    for word in ("host", "port", "connection_class"):
        options.pop(word, None)
    if scheme == "rediss":
        options["ssl"] = True
    places = [urlsplit(f"//{host}") for host in hosts.split(",")]
    return Places([(one.hostname or "", one.port or port) for one in places], unquote(name), options)

"""URLs of Redis that name several servers: `SCHEME+KIND://[user:password@]host[:port],host.../PATH[?option=...]`."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from redis.asyncio.connection import parse_url


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

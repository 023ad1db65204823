"""Redis behind Sentinel: who is the master is asked at each new connection.

URL: `redis+sentinel://[user:password@]host[:26379],host,.../MASTER[/DATABASE]`; user and password are of the servers,
`?sentinel_username=` and `?sentinel_password=` of the Sentinels. `rediss+sentinel://` is TLS to all of them.
"""

from __future__ import annotations

from typing import Any, Final

from redis.asyncio import ConnectionPool
from redis.asyncio.sentinel import Sentinel

from fastworker.stream.places import FoundPool, split

PORT: Final = 26_379
ANSWER_S: Final = 1.0
"""That a Sentinel may take: the next one is asked then."""


class MasterPool(FoundPool):
    what = "the master {} of Sentinel"
    nobody = "no Sentinel can be reached that knows a master of this name which is up"


def master_pool(url: str, options: dict[str, Any]) -> ConnectionPool:
    """Of a URL that urls.redis accepted. `options`: of each connection to a server. ValueError for a bad option."""
    found = split(url, PORT)
    told = found.options
    sentinels = {name.removeprefix("sentinel_"): told.pop(name) for name in list(told) if name.startswith("sentinel_")}
    sentinels |= {name: value for name, value in told.items() if name.startswith("ssl")}
    waits = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S, "retry": options["retry"]}
    manager = Sentinel(found.hosts, sentinel_kwargs={"protocol": options["protocol"], **waits, **sentinels})
    return MasterPool(found.name, manager, **{**told, **options})  # type: ignore[no-untyped-call]

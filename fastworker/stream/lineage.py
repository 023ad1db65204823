"""Which history of Redis the connections speak to.

A replica that takes the master's place, and a server that starts again from its disk, may not know what was done
last: an ack, a read. `master_replid` of INFO tells one history from another (Redis's docs, replication). It is asked
at each new connection: the client opens one without a word where no command was under way when the old one was lost.
"""

from __future__ import annotations

import contextlib
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import ResponseError


class Lineage:
    """`changes`: how often it was another history than at the connection before. Not for what INFO is refused to."""

    def __init__(self) -> None:
        self.changes = 0
        self._id = ""

    def meet(self, told: bytes) -> None:
        """`told`: the section `replication` of INFO."""
        for line in told.decode(errors="replace").splitlines():
            name, _, found = line.partition(":")
            if name == "master_replid" and found:
                self.changes += bool(self._id) and found != self._id
                self._id = found


def follow_lineage(pool: ConnectionPool) -> None:
    """From now on each new connection of the pool asks."""
    lineage = Lineage()

    class Asking(pool.connection_class):  # type: ignore[name-defined, misc]  # plain, TLS, a socket's, Sentinel's
        of = lineage

        async def on_connect_check_health(self, check_health: bool = True) -> None:
            await super().on_connect_check_health(check_health)
            await self.send_command("INFO", "replication", check_health=False)
            with contextlib.suppress(ResponseError):  # a server that keeps it to itself
                lineage.meet(await self.read_response())

    pool.connection_class = Asking


def lineage_of(redis: Redis) -> Lineage:
    """Of the client's pool. One that does not ask is taken to have one history."""
    found: Any = getattr(redis.connection_pool.connection_class, "of", None)
    return found if isinstance(found, Lineage) else Lineage()

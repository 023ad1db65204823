"""Which history of Redis the connections speak to.

A replica that takes the master's place, and a server that starts again from its disk, may not know what was done
last: an ack, a read. `master_replid` of INFO tells one history from another (Redis's docs, replication). It is asked
at each new connection: the client opens one without a word where no command was under way when the old one was lost.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, Final

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import ResponseError

_REPLID: Final = re.compile(rb"^master_replid:(\w+)", re.MULTILINE)


class Lineage:
    """`changes`: how often a connection found another history than the one made before it, or than itself before: one
    may lead to the old master for a while when another leads to the new one. Nothing where INFO is refused."""

    def __init__(self) -> None:
        self.changes = 0
        self._id = ""

    def meet(self, found: str, before: str) -> bool:
        """Whether it is another one."""
        is_other = any(one and one != found for one in (self._id, before))
        self.changes += is_other
        self._id = found
        return is_other


def follow_lineage(pool: ConnectionPool) -> None:
    """From now on each new connection of the pool asks."""
    lineage = Lineage()

    class Asking(pool.connection_class):  # type: ignore[name-defined, misc]  # plain, TLS, a socket's, Sentinel's
        of = lineage
        replid = ""

        async def on_connect_check_health(self, check_health: bool = True) -> None:
            await super().on_connect_check_health(check_health)
            await self.send_command("INFO", "replication", check_health=False)
            with contextlib.suppress(ResponseError):  # a server that keeps it to itself
                told = await self.read_response()
                if found := _REPLID.search(told):
                    before, self.replid = self.replid, found[1].decode()
                    if lineage.meet(self.replid, before):
                        # mutant: an idle connection still leads to the old master
                        await pool.disconnect(inuse_connections=False)

    pool.connection_class = Asking


def lineage_of(redis: Redis) -> Lineage:
    """Of the client's pool. One that does not ask is taken to have one history."""
    found: Any = getattr(redis.connection_pool.connection_class, "of", None)
    return found if isinstance(found, Lineage) else Lineage()

"""Which history of Redis the connections speak to.

A replica that takes the master's place, and a server that starts again from its disk, may not know what was done
last: an ack, a read. `master_replid` of INFO tells one history from another (Redis's docs, replication). It is asked
at each new connection: the client opens one without a word where no command was under way when the old one was lost.

A command that was made up for one history is not sent to another, and a reply from one that others have left is not
believed: both fail as on a connection that is lost, and are made up again.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, Final

from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import ResponseError

from fastworker.stream.places import FoundPool
from fastworker.stream.quick import Quick, close_idle

_REPLID: Final = re.compile(rb"^master_replid:(\w+)", re.MULTILINE)
_OTHER: Final = "it is another server than before, or was started again"


class Lineage:
    """`changes`: how often a connection found another history than the one before it; none where INFO is refused."""

    def __init__(self) -> None:
        self.changes = 0
        self.newest = ""  # as the connection says that was made last

    def meet(self, found: str) -> bool:
        """Whether it is another one."""
        is_other = self.newest not in ("", found)
        self.changes += is_other
        self.newest = found
        return is_other


def follow_lineage(pool: ConnectionPool) -> None:
    """From now on each new connection of the pool asks."""
    lineage = Lineage()

    class Asking(Quick, pool.connection_class):  # type: ignore[name-defined, misc]  # plain, TLS, a socket's, Sentinel's
        of = lineage
        replid = ""  # while it is being made, too: what a login says is believed

        async def on_connect_check_health(self, check_health: bool = True) -> None:
            self.replid = ""
            await super().on_connect_check_health(check_health)
            await self.send_command("INFO", "replication", check_health=False)
            with contextlib.suppress(ResponseError):  # a server that keeps it to itself
                told = await self.read_response()
                # mutant: a replica is taken for the master
                if b"\nrole:slave" in told and isinstance(pool, FoundPool):
                    raise LostConnection("it is no master any more")
                if found := _REPLID.search(told):
                    self.replid = found[1].decode()
                    if lineage.meet(self.replid):
                        # mutant: an idle connection still leads to the old master
                        await close_idle(pool)
                        # mutant: what was made up for the old master is sent to the new one
                        raise LostConnection(_OTHER)

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            if self.replid != lineage.newest and self.replid:
                await self._leave()
            await super().send_packed_command(command, check_health)

        async def read_response(self, *args: Any, **options: Any) -> Any:
            reply = await super().read_response(*args, **options)
            if self.replid != lineage.newest and self.replid:
                await self._leave()
            return reply

        async def _leave(self) -> None:
            await self.disconnect(nowait=True)
            # mutant: the old master is believed
            raise LostConnection(_OTHER)

    ensure = pool.ensure_connection

    async def ensure_connection(connection: Any) -> None:
        changes = lineage.changes
        await ensure(connection)
        # mutant: what waited for its connection is sent to whom another one has met
        if lineage.changes != changes:
            raise LostConnection(_OTHER)

    pool.connection_class = Asking
    pool.ensure_connection = ensure_connection  # type: ignore[method-assign]


def lineage_of(redis: Redis) -> Lineage:
    """Of the client's pool. One that does not ask is taken to have one history."""
    found: Any = getattr(redis.connection_pool.connection_class, "of", None)
    return found if isinstance(found, Lineage) else Lineage()

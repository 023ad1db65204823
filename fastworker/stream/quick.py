"""Commands to Redis at a lower price than the client library's.

For asyncio it packs arguments in Python, one by one, makes a task for each sending, and keeps telemetry that nobody
reads, of the pool, too: together more than the sending and the reading of a small command
(docs/lab/2026-11-30-cheaper-commands.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio import ConnectionPool, Redis
from redis.connection import HiredisRespSerializer
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import TimeoutError as SendingTimedOut

_WAITS_FROM: Final = 65_536
"""Bytes that the socket did not take yet. Below it nobody waits for them, so that nothing has to time the waiting."""
_serializer: Final = HiredisRespSerializer()


class QuickRedis(Redis):
    """A command is sent once: that a failed one is repeated is the callers' business."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        pool = self.connection_pool
        connection = pool.get_available_connection()
        try:
            await pool.ensure_connection(connection)
            await connection.send_command(*args)
            return await self.parse_response(connection, args[0], **options)
        finally:
            await pool.release(connection)


async def close_idle(pool: ConnectionPool) -> None:
    """Idle connections are closed, and new ones are made when they are needed.

    The library closes them while they stand in the pool: who takes one meanwhile finds it closed under his hands.
    """
    in_pool: list[Any] = vars(pool)["_available_connections"]
    idle = list(in_pool)
    # mutant: a connection is taken while it is closed
    in_pool.clear()
    for connection in idle:
        await connection.disconnect(nowait=True)


class Quick:
    """Beside a class of the library's connections."""

    _writer: Any
    is_connected: bool
    next_health_check: float
    socket_timeout: float | None
    connect_check_health: Callable[..., Awaitable[None]]
    check_health: Callable[[], Awaitable[None]]
    disconnect: Callable[..., Awaitable[None]]

    def pack_command(self, *args: Any) -> list[bytes]:
        # The library looks at every argument first. It is left what it splits (a name of two words), alters or refuses.
        if isinstance(args[0], str) and " " not in args[0]:
            with contextlib.suppress(TypeError):
                return [pack_command(args)]
        packed: list[bytes] = _serializer.pack(*args)
        return packed

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if check_health and time.monotonic() > self.next_health_check:
            await self.check_health()
        try:
            self._writer.writelines([command] if isinstance(command, bytes) else command)
            if self._writer.transport.get_write_buffer_size() >= _WAITS_FROM:
                # not the library's wait_for, which swallows a cancellation on Python 3.11
                async with asyncio.timeout(self.socket_timeout):
                    await self._writer.drain()
        except BaseException as error:
            await self.disconnect(nowait=True)  # a part of the command may have gone
            if isinstance(error, TimeoutError):
                raise SendingTimedOut("Timeout writing to socket") from None
            if isinstance(error, OSError):
                raise ConnectionLost(f"Error while writing to socket: {error}") from error
            raise  # uvloop's RuntimeError, of a socket that is closed, too

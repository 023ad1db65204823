"""Replies of Redis that are larger than their reader can hold.

XREADGROUP is told how many entries to hand out, never how many bytes. A reply that grows beyond what its caller allows
ends its connection instead of filling the memory; the entries in it stay pending, and are read again in smaller pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from redis.asyncio.connection import DefaultParser
from redis.exceptions import ConnectionError as ConnectionLost

_bytes_max: ContextVar[int | None] = ContextVar("reply_bytes_max", default=None)


class ReplyTooLarge(ConnectionLost):
    """The connection was closed while the reply came; the server has done what was asked."""


@contextmanager
def reply_of_at_most(bytes_max: int) -> Iterator[None]:
    """The replies that this task waits for inside have at most so many bytes, and what one read of a socket adds."""
    before = _bytes_max.set(bytes_max)
    try:
        yield
    finally:
        _bytes_max.reset(before)


class BoundedParser(DefaultParser):  # type: ignore[valid-type,misc]  # hiredis's, whose base has no types
    """hiredis's parser, which counts the bytes of the reply that it waits for."""

    _come = 0

    async def read_response(self, *args: bool, **kwargs: bool) -> object:
        self._come = 0
        return await super().read_response(*args, **kwargs)

    async def read_from_socket(self) -> bool:
        buffer = await self._stream.read(self._read_size)
        if not buffer:
            raise ConnectionLost("Connection closed by server.")
        self._come += len(buffer)
        bytes_max = _bytes_max.get()
        if bytes_max is not None and self._come > bytes_max:
            raise ReplyTooLarge(f"a reply has more than {bytes_max} bytes")
        self._reader.feed(buffer)
        return True

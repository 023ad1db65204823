"""A TCP proxy that can be told to misbehave: cut, delay, swallow, refuse. For rehearsing faults of the network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self

PIECE = 65_536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: the peer gets a reset, not an orderly end


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes bytes on to `target`, a host and port or a socket's path.

    target: where new connections lead. refusing: new connections are reset at once.
    delay_s: how long each piece is held in both directions.
    cut_after: number of bytes, counted over all connections from now on, after which the connection that carried the
    last of them is reset; then None again.
    cut_at: the connection that next asks for something with this text in it is reset, before the request went through
    or, with `cut_reply`, when its reply comes; then None again.
    """

    def __init__(self, target: tuple[str, int] | str) -> None:
        self.target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self.port = 0
        self.connections = 0  # ever
        self.delay_s = 0.0
        self.refusing = False
        self.cut_after: int | None = None
        self.cut_at: bytes | None = None
        self.cut_reply = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._writers):
            _reset(writer)

    def hold(self) -> None:
        """Pass nothing on, and tell nobody: what is sent meanwhile arrives after `release`, if its connection lives."""
        self._passing.clear()

    def release(self) -> None:
        self._passing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            _reset(writer)
            return
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._passing.wait()
            if isinstance(self.target, str):
                far_reader, far_writer = await asyncio.open_unix_connection(self.target)
            else:
                far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            _reset(writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        else:
            self._writers |= {writer, far_writer}
            try:
                link = _Link(writer)
                await asyncio.gather(
                    self._pump(reader, far_writer, link, asks=True), self._pump(far_reader, writer, link, asks=False)
                )
            except asyncio.CancelledError:
                pass
            finally:
                for one in (writer, far_writer):
                    self._writers.discard(one)
                    with contextlib.suppress(AttributeError):  # asyncio's, of a transport that is closed by now
                        one.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link, *, asks: bool
    ) -> None:
        try:
            while data := await reader.read(PIECE):
                if asks and self.cut_at is not None and self.cut_at in data:
                    self.cut_at = None
                    link.is_doomed = True
                    if not self.cut_reply:
                        _reset(link.client)
                        break
                elif link.is_doomed and not asks:
                    _reset(link.client)
                    break
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._passing.wait()
                if self.cut_after is not None:
                    if self.cut_after <= len(data):
                        writer.write(data[: self.cut_after])
                        self.cut_after = None
                        await asyncio.sleep(0)
                        _reset(writer)
                        break
                    self.cut_after -= len(data)
                writer.write(data)
                await writer.drain()
        except (OSError, RuntimeError):  # uvloop's, when the other side was reset meanwhile
            pass
        finally:
            writer.close()


class _Link:
    """One client's connection."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.is_doomed = False  # its next reply is not passed on


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):  # ValueError: uvloop's, of a socket that is closed
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()

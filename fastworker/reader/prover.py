"""Processes that prove commits for the reader (`FASTWORKER_VERIFY_PROCESSES`): pieces of frames in, proofs out.

The reader decodes, looks up the keys and keeps the chain; a prover gets (multikey, frame) and says what signature and
tree say. Each process answers in the order it was asked, over one socket pair; the reader puts the pieces of a chunk
together in the chunk's order, and the cursor stays behind them as ever. A prover that dies is replaced and asked again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import sys
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import msgspec

from fastworker.event.frame import open_frame
from fastworker.reader.prove import Proof, prove

log = logging.getLogger(__name__)

PIECE: Final = 64
TRIES: Final = 3
_LENGTH: Final = 4
_READ_MAX: Final = 1 << 26

Asked = tuple[str, bytes]
"""(multikey, frame)."""

_encode = msgspec.msgpack.Encoder().encode
_asked: Final = msgspec.msgpack.Decoder(list[Asked])
_proofs: Final = msgspec.msgpack.Decoder(list[Proof])


class Prover:
    """One process, its end of the socket pair, and who waits for answers, the oldest first."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[list[Proof]]] = deque()
        self._starting = asyncio.Lock()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def prove(self, asked: Sequence[Asked]) -> list[Proof]:
        for number in itertools.count(1):
            try:
                return await self._ask(asked)
            except ConnectionError as error:
                if number == TRIES:
                    raise
                log.warning("A prover ended (%s): another one is started", error)
        raise AssertionError

    async def _ask(self, asked: Sequence[Asked]) -> list[Proof]:
        async with self._starting:
            if self._writer is None:
                await self._start()
        assert self._writer is not None
        body = _encode(asked)
        answer: asyncio.Future[list[Proof]] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._writer.write(len(body).to_bytes(_LENGTH, "big") + body)
        await self._writer.drain()
        return await answer

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            words = (
                sys.executable,
                "-m",
                "fastworker.reader.prover",
                str(theirs.fileno()),
                "full" if self._full else "",
            )
            self._process = await asyncio.create_subprocess_exec(*words, pass_fds=(theirs.fileno(),))
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=_READ_MAX)
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(_LENGTH), "big")
                proofs = _proofs.decode(await reader.readexactly(size))
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_result(proofs)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._ended()

    async def _ended(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        code = None if self._process is None else await self._process.wait()
        while self._waiting:
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(ConnectionResetError(f"exit code {code}"))

    async def close(self) -> None:
        """Its end of the pair closes, and so it ends."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        await self._ended()


class Provers:
    """An async context manager: so many processes."""

    def __init__(self, processes: int, *, full: bool) -> None:
        self._provers = [Prover(full=full) for _ in range(processes)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for prover in self._provers:
            await prover.close()

    async def prove(self, asked: Sequence[Asked]) -> list[Proof]:
        """In the order of what was asked."""
        pieces = [asked[start : start + PIECE] for start in range(0, len(asked), PIECE)]
        answers = await asyncio.gather(*(self._least().prove(piece) for piece in pieces))
        return [proof for answer in answers for proof in answer]

    def _least(self) -> Prover:
        self._provers.append(self._provers.pop(0))  # in turn, where as many wait
        return min(self._provers, key=lambda prover: prover.waiting)


def serve(connection: socket.socket, *, full: bool) -> None:
    """A prover's life: until the reader closes its end."""
    with connection, connection.makefile("rb") as questions:
        while len(head := questions.read(_LENGTH)) == _LENGTH:
            body = questions.read(int.from_bytes(head, "big"))
            proofs = [prove(open_frame(frame)[1], multikey, full=full) for multikey, frame in _asked.decode(body)]
            answer = _encode(proofs)
            connection.sendall(len(answer).to_bytes(_LENGTH, "big") + answer)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), full=sys.argv[2] == "full")

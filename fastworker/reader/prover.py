"""Processes that prove commits for the reader (`FASTWORKER_VERIFY_PROCESSES`): pieces of frames in, proofs out.

The reader decodes, looks up the keys and keeps the chain; a prover gets (multikey, frame) and says what signature and
tree say. Each process answers in the order it was asked, over one socket pair; the reader puts the pieces of a chunk
together in the chunk's order, and the cursor stays behind them as ever. A prover that stops answering is killed, and
one that ends is replaced and asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from fastworker.together import together

log = logging.getLogger(__name__)

PIECE: Final = 64
TRIES: Final = 3
START_S: Final = 60.0
ANSWER_S: Final = 60.0  # without any answer while some are waited for
END_S: Final = 5.0
_LENGTH: Final = 4
_READ_MAX: Final = 1 << 26

Asked = tuple[str, bytes]
"""(multikey, frame)."""

_encode = msgspec.msgpack.Encoder().encode
_asked: Final = msgspec.msgpack.Decoder(list[Asked])
_proofs: Final = msgspec.msgpack.Decoder(list[Proof])


class _Process:
    """One life of a prover: the process, our end of the socket pair, and who waits for answers, the oldest first."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._writer = writer
        self._answers = 0
        self.waiting: deque[asyncio.Future[list[Proof]]] = deque()
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def start(cls, *, full: bool) -> Self:
        ours, theirs = socket.socketpair()
        try:
            async with asyncio.timeout(START_S):
                with theirs:
                    words = (
                        sys.executable,
                        "-m",
                        "fastworker.reader.prover",
                        str(theirs.fileno()),
                        "full" if full else "",
                    )
                    process = await asyncio.create_subprocess_exec(*words, pass_fds=(theirs.fileno(),))
                return cls(process, *await asyncio.open_connection(sock=ours, limit=_READ_MAX))
        except BaseException:
            ours.close()  # the process ends by it
            raise

    @property
    def is_over(self) -> bool:
        return self._writer.is_closing()

    async def ask(self, asked: Sequence[Asked]) -> list[Proof]:
        """ConnectionError when it ends before it answers. One that answers nobody for ANSWER_S is killed."""
        body = _encode(asked)
        answer: asyncio.Future[list[Proof]] = asyncio.get_running_loop().create_future()
        self.waiting.append(answer)
        self._writer.write(len(body).to_bytes(_LENGTH, "big") + body)
        while not answer.done():
            before = self._answers
            await asyncio.wait((answer,), timeout=ANSWER_S)
            if self._answers == before and not answer.done():
                log.warning("A prover has not answered for %g s and is killed", ANSWER_S)
                self._kill()
        return answer.result()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(_LENGTH), "big")
                proofs = _proofs.decode(await reader.readexactly(size))
                self._answers += 1
                self.waiting.popleft().set_result(proofs)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            self._writer.close()
        try:
            async with asyncio.timeout(END_S):
                code = await self._process.wait()
        except TimeoutError:
            self._kill()
            code = await self._process.wait()
        while self.waiting:
            answer = self.waiting.popleft()
            answer.set_exception(ConnectionResetError(f"exit code {code}"))
            answer.exception()  # who asked may be gone

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Nobody waits for it any more."""
        self._kill()
        await asyncio.wait((self._reading,))


class Prover:
    """A process that proves, and another one after it has ended."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self._process: _Process | None = None
        self._starting = asyncio.Lock()

    @property
    def waiting(self) -> int:
        return 0 if self._process is None else len(self._process.waiting)

    async def prove(self, asked: Sequence[Asked]) -> list[Proof]:
        for number in itertools.count(1):
            try:
                process = await self._alive()
                return await process.ask(asked)
            except (ConnectionError, TimeoutError) as error:
                if number == TRIES:
                    raise
                log.warning("A prover ended (%s): another one is started", error)
        raise AssertionError

    async def _alive(self) -> _Process:
        async with self._starting:
            if self._process is None or self._process.is_over:
                await self.close()
                self._process = await _Process.start(full=self._full)
            return self._process

    async def close(self) -> None:
        if self._process is not None:
            await self._process.close()
            self._process = None


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
        answers = await together(*(self._least().prove(piece) for piece in pieces))
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

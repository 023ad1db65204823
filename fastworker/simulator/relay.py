"""A relay on a real WebSocket: simulated or recorded frames at `com.atproto.sync.subscribeRepos`.

Cursor rules are the protocol's (event-stream specification): none, the live tip; inside the window, a replay of every
seq >= cursor; before the window, `#info` OutdatedCursor and then the whole window; 0, the whole window; beyond what was
sent, an error frame FutureCursor and the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Literal, NamedTuple, Self

import libipld
from aiohttp import ClientConnectionError, WSCloseCode, web

from fastworker.simulator.repo import SimFrame, error_frame, info_frame

PATH = "/xrpc/com.atproto.sync.subscribeRepos"
_PULL_COUNT = 16
"""Frames made at a time when a client waits for them: a few milliseconds of work."""


class Fault(NamedTuple):
    """What the next connection meets. `status` other than 101 refuses it; otherwise `then` happens after `frames`.

    drop: the connection is reset. torn: half of the next frame, then the end. silence: nothing more comes.
    too_slow: the error frame ConsumerTooSlow, then the end. close: an orderly close without a reason.
    """

    status: int = 101
    headers: dict[str, str] | None = None
    frames: int = 0
    then: Literal["drop", "torn", "silence", "too_slow", "close"] = "drop"


class SimRelay:
    """Serves `source` (SimFrames, or messages as bytes; text as str) to any number of clients.

    `rate` None: frames are taken from the source as the fastest client asks for them. Otherwise `rate` frames a second
    in real time, whether anyone listens or not; `wait_for_client` starts the clock with the first client.
    `start` says what a client without a cursor gets: the live tip, or the oldest frame of the window.
    `window` is the number of frames kept for replay (and up to a quarter more); a client that falls behind it is told
    ConsumerTooSlow.
    At the end of the source the sockets stay open and quiet.
    """

    def __init__(
        self,
        source: Iterable[SimFrame | bytes | str] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        rate: float | None = None,
        window: int = 50_000,
        start: Literal["tip", "oldest"] = "tip",
        wait_for_client: bool = False,
    ) -> None:
        self._source: Iterator[SimFrame | bytes | str] = iter(source)
        self._host = host
        self.port = port
        self._rate = rate
        self._window = window
        self._start = start
        self._wait_for_client = wait_for_client
        self._frames: list[bytes | str] = []
        self._seqs: list[int] = []  # the highest seq up to each frame: a repeated frame does not go back
        self._first = 0  # the number of _frames[0], counted from the first frame ever
        self._news = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._closing = False
        self._producer: asyncio.Task[None] | None = None
        self._clients: dict[web.WebSocketResponse, web.Request] = {}
        self._runner: web.AppRunner | None = None
        self.faults: deque[Fault] = deque()
        self.connections = 0
        """Accepted WebSockets, ever."""
        self.cursors: list[int | None] = []
        """What each accepted connection asked for."""
        self.sent = 0
        """Frames handed to sockets, all clients together."""
        self.exhausted = False
        """The source is at its end."""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get(PATH, self._subscribe)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        if self._rate is not None and not self._wait_for_client:
            self._producer = asyncio.create_task(self._produce(self._rate))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._tell()
        self._flowing.set()
        if self._producer is not None:
            self._producer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._producer
        for client in list(self._clients):
            await client.close(code=WSCloseCode.GOING_AWAY)
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        """`ws://host:port`, as RELAY_URL takes it."""
        return f"ws://{self._host}:{self.port}"

    @property
    def head(self) -> int | None:
        """The last seq that went out."""
        return self._seqs[-1] if self._seqs else None

    @property
    def clients(self) -> int:
        return len(self._clients)

    async def connected(self, count: int = 1) -> None:
        """Until `count` clients are connected: what is emitted from then on reaches them."""
        while len(self._clients) < count:
            await self._news.wait()

    def emit(self, *frames: SimFrame | bytes | str) -> None:
        """Sends frames now, besides the source."""
        for frame in frames:
            self._append(frame)
        self._tell()

    def pause(self) -> None:
        """Silence on every socket; the connections stay."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def drop_clients(self) -> None:
        """Resets every connection."""
        for request in list(self._clients.values()):
            _abort(request)

    def _append(self, frame: SimFrame | bytes | str) -> None:
        data, seq = (frame.data, frame.seq) if isinstance(frame, SimFrame) else (frame, _seq_of(frame))
        highest = self._seqs[-1] if self._seqs else 0
        self._frames.append(data)
        self._seqs.append(highest if seq is None else max(highest, seq))
        if len(self._frames) >= self._window + max(self._window // 4, 1):  # at once, a few at a time would cost more
            surplus = len(self._frames) - self._window
            del self._frames[:surplus], self._seqs[:surplus]
            self._first += surplus

    def _pull(self, count: int) -> bool:
        """Takes up to `count` frames from the source; False at its end."""
        for _ in range(count):
            try:
                self._append(next(self._source))
            except StopIteration:
                self.exhausted = True
                return False
        return True

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _produce(self, rate: float) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        made = 0
        while True:
            due = int((loop.time() - started) * rate) - made
            if due > 0:
                if not self._pull(min(due, 256)):
                    self._tell()
                    return
                made += min(due, 256)
                self._tell()
            await asyncio.sleep(0 if due > 256 else min(0.05, max(0.002, 1 / rate)))

    def _position(self, cursor: int | None) -> tuple[int, bytes | None]:
        """(number of the first frame to send, what to say before it)."""
        oldest = max(0, len(self._frames) - self._window)
        if cursor is None:
            return self._first + (oldest if self._start == "oldest" else len(self._frames)), None
        while self._rate is None and self._start == "oldest" and (self.head or 0) < cursor and self._pull(1):
            pass  # the source is the history: a relay that was started again still has it
        if self.head is not None and cursor > self.head:
            return -1, error_frame("FutureCursor", "Cursor in the future.")
        at = max(oldest, bisect_left(self._seqs, cursor))
        if self._seqs and 0 < cursor < self._seqs[oldest]:
            return self._first + at, info_frame("OutdatedCursor", "Requested cursor exceeded limit.").data
        return self._first + at, None

    async def _subscribe(self, request: web.Request) -> web.StreamResponse:
        fault = self.faults.popleft() if self.faults else None
        if fault is not None and fault.status != 101:
            return web.Response(status=fault.status, headers=fault.headers, text="refused")
        try:
            cursor = int(request.query["cursor"]) if "cursor" in request.query else None
        except ValueError:
            return web.json_response({"error": "InvalidRequest", "message": "cursor must be an integer"}, status=400)
        socket = web.WebSocketResponse(compress=False, timeout=1.0, max_msg_size=1 << 16)
        await socket.prepare(request)
        self.connections += 1
        self.cursors.append(cursor)
        at, greeting = self._position(cursor)
        self._clients[socket] = request
        self._tell()
        if self._producer is None and self._rate is not None:
            self._producer = asyncio.create_task(self._produce(self._rate))
        sender = asyncio.create_task(self._send(request, socket, at, greeting, fault))
        try:
            async for _ in socket:  # answers pings and sees the client's close
                pass
        finally:
            del self._clients[socket]
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError, ClientConnectionError):
                await sender
        return socket

    async def _send(
        self,
        request: web.Request,
        socket: web.WebSocketResponse,
        at: int,
        greeting: bytes | None,
        fault: Fault | None,
    ) -> None:
        if greeting is not None:
            await socket.send_bytes(greeting)
        if at < 0:
            await socket.close()
            return
        left = -1 if fault is None else fault.frames
        while not self._closing:
            if not self._flowing.is_set():
                await self._flowing.wait()
            index = at - self._first
            if index < 0:
                await socket.send_bytes(error_frame("ConsumerTooSlow", "Stream consumer too slow."))
                await socket.close()
                return
            if index >= len(self._frames):
                if self._rate is not None or self.exhausted:
                    await self._news.wait()
                else:
                    self._pull(_PULL_COUNT)
                    self._tell()
                    await asyncio.sleep(0)  # generation must not keep the other clients waiting
                continue
            frame = self._frames[index]
            if left == 0 and fault is not None:
                await self._fail(request, socket, fault, frame)
                return
            if isinstance(frame, str):
                await socket.send_str(frame)
            else:
                await socket.send_bytes(frame)
            at += 1
            left -= 1
            self.sent += 1

    async def _fail(
        self, request: web.Request, socket: web.WebSocketResponse, fault: Fault, frame: bytes | str
    ) -> None:
        if fault.then == "silence":
            await asyncio.get_running_loop().create_future()
        elif fault.then == "too_slow":
            await socket.send_bytes(error_frame("ConsumerTooSlow", "Stream consumer too slow."))
            await socket.close()
        elif fault.then == "close":
            await socket.close()
        elif fault.then == "torn" and request.transport is not None:
            raw = frame.encode() if isinstance(frame, str) else frame
            request.transport.write(b"\x82\x7e" + min(len(raw), 0xFFFF).to_bytes(2, "big") + raw[: len(raw) // 2])
            request.transport.close()
        else:
            _abort(request)


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _seq_of(message: bytes | str) -> int | None:
    if isinstance(message, str):
        return None
    try:
        _, payload = libipld.decode_dag_cbor_multi(message)
        seq = payload["seq"]
    except (ValueError, TypeError, KeyError):
        return None
    return seq if isinstance(seq, int) else None


async def serve(
    source: Iterable[SimFrame | bytes | str],
    stopping: asyncio.Event,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    rate: float | None = None,
    window: int = 50_000,
    start: Literal["tip", "oldest"] = "tip",
    wait_for_client: bool = False,
    on_ready: Callable[[SimRelay], None] | None = None,
) -> SimRelay:
    """Serves until `stopping` is set: the body of `fastworker relay`. Returns the relay for its counters."""
    relay = SimRelay(
        source, host=host, port=port, rate=rate, window=window, start=start, wait_for_client=wait_for_client
    )
    async with relay:
        if on_ready is not None:
            on_ready(relay)
        await stopping.wait()
    return relay

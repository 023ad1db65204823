"""The relay's side of the reader: one WebSocket to `com.atproto.sync.subscribeRepos`, as bytes.

Knows addresses, handshakes and closes; what the bytes mean is `event/`'s business, when to try again is
`run/`'s. A redirect is followed (ten at most) and ends at another host: that host numbers the events, so
`Subscription.host` is the one whose sequence the cursor belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
import msgspec
from yarl import URL

from fastworker.errors import ConfigError, words_of
from fastworker.redact import redact

PATH: Final = "/xrpc/com.atproto.sync.subscribeRepos"
FRAME_MAX: Final = 16 * 1024 * 1024
"""Bytes of the largest frame that is received at all. The protocol's 5 MB are checked by the decoder, which can
count and skip a frame; beyond this the connection ends, because the bytes would have to be held."""
CONNECT_TIMEOUT_S: Final = 10.0
"""Longest wait for name, TCP and TLS, and again for the answer to the handshake."""
HANDSHAKE_S: Final = 30.0
"""Longest wait for an open connection in all: redirects, and an answer that comes byte by byte."""
CLOSE_TIMEOUT_S: Final = 1.0
"""Longest wait for a connection to close in all: a relay may go on sending instead of answering."""
RETRY_AFTER_MAX_S: Final = 900.0
_SCHEMES: Final = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


class RelayRefused(Exception):
    """No connection was made. `at_least`: seconds that the relay (or its answer) asks us to stay away. `silent`: it let
    us wait to the end."""

    def __init__(self, detail: str, at_least: float = 0.0, *, silent: bool = False) -> None:
        super().__init__(detail)
        self.at_least = at_least
        self.silent = silent


class RelayLost(Exception):
    """The connection ended. `oversized`: because of a frame beyond `FRAME_MAX`, which will come again."""

    def __init__(self, detail: str, *, oversized: bool = False, silent: bool = False) -> None:
        super().__init__(detail)
        self.oversized = oversized
        self.silent = silent


class RelayAddress(msgspec.Struct, frozen=True):
    """`host` (with a port that is not the default) names the sequence space that cursors belong to."""

    host: str
    url: str

    @classmethod
    def parse(cls, text: str) -> RelayAddress:
        """`bsky.network`, `wss://bsky.network`, or the whole endpoint; TLS unless `ws://` says otherwise."""
        text = text.strip()
        try:
            url = URL(text if "://" in text else f"wss://{text}")
            scheme, port = _SCHEMES[url.scheme], url.port
        except (ValueError, KeyError):
            raise ConfigError(f"{redact(text)!r} is not a relay: give a host, or a ws:// or wss:// URL") from None
        if not url.host:
            raise ConfigError(f"{redact(text)!r} is not a relay: it names no host")
        url = url.with_scheme(scheme).with_fragment(None)
        if url.path in ("", "/"):
            url = url.with_path(PATH)
        return cls(_host_of(url.with_port(port)), str(url))


class Subscription:
    """An open connection. `host` is where redirects ended."""

    def __init__(
        self, session: aiohttp.ClientSession, socket_: aiohttp.ClientWebSocketResponse, address: RelayAddress
    ) -> None:
        self._session = session
        self._socket = socket_
        self.address = address

    @property
    def host(self) -> str:
        return self.address.host

    async def receive(self) -> bytes:
        """The next frame. Waits without a bound of its own: silence is for the caller's watchdog to judge."""
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            return message.data  # type: ignore[no-any-return]
        if message.type is aiohttp.WSMsgType.TEXT:  # not a frame of this protocol: the decoder says so
            text: str = message.data
            return text.encode("utf-8", "surrogatepass")
        code = self._socket.close_code
        if code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            raise RelayLost(f"a frame exceeds {FRAME_MAX:,} bytes", oversized=True)
        raise RelayLost(f"the relay closed the connection (code {code}{_reason(message)})")

    async def close(self) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._socket.close()
        await self._session.close()


async def subscribe(relay: RelayAddress, cursor: int | None) -> Subscription:
    """Connect; with a cursor the relay replays from that seq, inclusive; without, the stream begins at its tip."""
    url = URL(relay.url)
    if cursor is not None:
        url = url.update_query(cursor=str(cursor))
    answered = url

    async def request_ended(_session: object, _context: object, params: aiohttp.TraceRequestEndParams) -> None:
        nonlocal answered
        answered = params.response.url

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(request_ended)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(socket_factory=_kept_alive),
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=CONNECT_TIMEOUT_S),
        trace_configs=[trace],
    )
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            connection = await session.ws_connect(
                url,
                max_msg_size=FRAME_MAX,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                headers={"User-Agent": "fastworker"},
            )
        end = RelayAddress.parse(str(answered.without_query_params("cursor")))
        if url.scheme == "wss" and not end.url.startswith("wss:"):
            raise RelayRefused(f"{relay.host} redirects to {end.host} without TLS")  # noqa: TRY301
    except aiohttp.WSServerHandshakeError as error:
        await session.close()
        raise RelayRefused(_status_text(error), _at_least(error)) from None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        await session.close()
        slow = isinstance(error, TimeoutError) and not str(error)
        raise RelayRefused(
            f"no open connection within {HANDSHAKE_S:.0f} s" if slow else redact(_words(error)),
            silent=isinstance(error, TimeoutError),
        ) from None
    except BaseException:
        await session.close()
        raise
    return Subscription(session, connection, end)


def _words(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        why = words_of(error.os_error, "SSL_CERT_FILE")
        return f"cannot connect to {error.host}:{error.port}: {why}"
    return str(error) or type(error).__name__


def _kept_alive(address: aiohttp.AddrInfoType) -> socket.socket:
    """A peer that vanished without a word is noticed by the kernel in about a minute, however quiet the stream."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _host_of(url: URL) -> str:
    host = (url.host or "").lower().rstrip(".")
    return host if url.is_default_port() or url.port is None else f"{host}:{url.port}"


def _reason(message: aiohttp.WSMessage) -> str:
    return f": {message.extra}" if message.extra else ""


def _status_text(error: aiohttp.WSServerHandshakeError) -> str:
    if error.status == 501:
        return "the relay does not serve subscribeRepos (501): is RELAY_URL right?"
    return f"the relay answered {error.status} instead of opening a WebSocket"


def _at_least(error: aiohttp.WSServerHandshakeError) -> float:
    """Seconds to stay away: Retry-After as seconds or a date; 501 will not mend itself soon; other 4xx neither."""
    asked = (error.headers.get("Retry-After", "") if error.headers else "").strip()
    if asked.isdecimal():
        return min(float(asked), RETRY_AFTER_MAX_S)
    if asked:
        with contextlib.suppress(ValueError, TypeError):
            until = parsedate_to_datetime(asked)
            return min(max((until - datetime.now(until.tzinfo or UTC)).total_seconds(), 0.0), RETRY_AFTER_MAX_S)
    if error.status == 501:
        return RETRY_AFTER_MAX_S
    if error.status == 429:
        return 30.0
    return 10.0 if 400 <= error.status < 500 else 0.0

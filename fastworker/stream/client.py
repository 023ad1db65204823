"""One way to reach Redis, shared by reader, worker and monitor: explicit timeouts, no hidden retries, typed errors.

The client never repeats a command by itself: a repeated XADD would double an entry, and only the caller
knows what may be done again. `translating` turns the client's many errors into the one that callers act on:
`StreamUnavailable`, wait and try again. What only an operator can change is waited for, too: a service that is at work
goes on by itself when it is mended. Where it begins, or a command runs, the same error ends it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError
from redis.backoff import NoBackoff

from fastworker.errors import ConfigError, StreamUnavailable, words_of
from fastworker.redact import redact
from fastworker.stream.bounded import BoundedParser
from fastworker.stream.cluster import SlotPool, slot_pool
from fastworker.stream.keys import STREAM
from fastworker.stream.lineage import follow_lineage
from fastworker.stream.places import FoundPool
from fastworker.stream.quick import QuickRedis, close_idle
from fastworker.stream.scripts import command_at
from fastworker.stream.sentinel import master_pool

__all__ = ["Redis", "connect", "error_code", "translate", "translating"]  # Redis: for annotations elsewhere

CONNECT_TIMEOUT_S: Final = 5.0
SOCKET_TIMEOUT_S: Final = 10.0
"""Longest wait for one reply; a blocking read must block for less."""
HEALTH_CHECK_S: Final = 15.0
"""A connection that was idle for longer is pinged before it is used."""

_KINDS: Final = ("sentinel", "cluster")  # of servers that one URL names together
_SCHEMES: Final = ("redis://", "rediss://", "unix://", *(f"redis{s}+{kind}://" for s in ("", "s") for kind in _KINDS))

# Error codes, and what they mean to an operator.
_STATES: Final = {
    "LOADING": "is loading its data",
    "READONLY": "is a read-only replica",
    "MASTERDOWN": "is a replica that has lost its master",
    "OOM": "is out of memory (maxmemory reached)",
    "MISCONF": "refuses writes because it cannot save to disk",
    "NOREPLICAS": "refuses writes because too few replicas are connected",
    "BUSY": "is busy with a script",
    "TRYAGAIN": "asks to try again",
    "UNBLOCKED": "ended a blocked read: the stream was deleted or replaced",  # 7.0; newer ones name what is wrong
    "CLUSTERDOWN": "is in a cluster that is down",
    "NOAUTH": "asks for a password",
    "WRONGPASS": "refuses the user name or password",
}
# Those where the server's own words say more.
_REFUSALS: Final = {
    "NOPERM": "the user lacks a permission that `fastworker grants` prints",
    "WRONGTYPE": "a key has the wrong type",
    "MOVED": "it is a node of a cluster, which REDIS_URL=redis+cluster://host,host means",
    "ASK": "it is a node of a cluster, which REDIS_URL=redis+cluster://host,host means",
    "CROSSSLOT": "it is a node of a cluster, which REDIS_URL=redis+cluster://host,host means",
}
_MOVING: Final = ("MOVED", "ASK")
_CLASS_CODES: Final[tuple[tuple[type[exceptions.RedisError], str], ...]] = (
    # The client strips the code from the messages of these classes.
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.MovedError, "MOVED"),
    (exceptions.AskError, "ASK"),
    (exceptions.ClusterCrossSlotError, "CROSSSLOT"),
    (exceptions.AuthenticationError, "WRONGPASS"),
)
# Redis 6.2 wraps what a command in a script answered: `Error running script (...): @user_script: 1: -OOM ...`;
# newer ones lead with the code. The client's pipelines wrap once more.
_CODE: Final = re.compile(r"""(?:^|@user_script: ?\d+: |caused error: (?:\(['"])?)-?([A-Z]{3,})\b""")
_FORBIDDEN: Final = re.compile(r"permissions to run the '([^']+)' command")
# What a script is told that does what its user may not: without a code of its own (from 7.0, then 6.2).
_IN_LINE: Final = re.compile(r"call to f_([0-9a-f]{40})\): @user_script:(\d+):")
_NOPERM_IN_SCRIPT: Final = re.compile(r"^ACL failure in script|The user executing the script can't ")


def connect(
    url: str,
    *,
    stream_key: str = STREAM,
    client_name: str = "fastworker",
    socket_timeout: float = SOCKET_TIMEOUT_S,
    max_connections: int | None = None,
) -> Redis:
    """A client for `redis://`, `rediss://` (verified), `unix://`, the master that Sentinel names, or the node of a
    cluster that has `stream_key`; the first command connects.

    Replies are bytes, in the RESP2 shapes on every server. `max_connections` None: no ceiling.
    """
    if not url.startswith(_SCHEMES):
        raise ConfigError(
            f"{redact(url)!r} is not a Redis URL: it must start with redis://, rediss://, unix://, "
            "redis+sentinel:// or redis+cluster://"
        )
    options: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": HEALTH_CHECK_S,
        "client_name": client_name,
        "parser_class": BoundedParser,
        "retry": Retry(NoBackoff(), 0),
    }
    if not url.startswith("unix://"):
        options["socket_keepalive"] = True
    if max_connections is not None:
        options["max_connections"] = max_connections
    pool: ConnectionPool
    try:
        if "+sentinel://" in url:
            pool = master_pool(url, options)
        elif "+cluster://" in url:
            pool = slots = slot_pool(url, stream_key, options)
            slots.connect = lambda key: connect(
                url,
                stream_key=key,
                client_name=client_name,
                socket_timeout=socket_timeout,
                max_connections=max_connections,
            )
        else:
            pool = ConnectionPool.from_url(url, **options)
    except (ValueError, TypeError):  # its text may quote a piece of the password
        raise ConfigError(f"{redact(url)!r} is not a Redis URL: its port or an option cannot be read") from None
    pool.connection_kwargs["decode_responses"] = False  # whatever the URL's options say
    follow_lineage(pool)
    return QuickRedis.from_pool(pool)


def error_code(error: exceptions.RedisError) -> str:
    """The server's code (`OOM`, `NOGROUP`, ...), also through a script; empty when there is none."""
    for kind, code in _CLASS_CODES:
        if isinstance(error, kind):
            return code
    text = str(error)
    if _NOPERM_IN_SCRIPT.search(text):
        return "NOPERM"
    found = _CODE.search(text)
    return found[1] if found else ""


def _place_of(redis: Redis) -> str:
    """Where the server is, without user and password."""
    pool = redis.connection_pool
    if isinstance(pool, FoundPool):
        return pool.place
    told = pool.connection_kwargs
    return str(told.get("path") or f"{told.get('host', 'localhost')}:{told.get('port', 6379)}")


def _of_several(error: Exception, redis: Redis) -> Exception | None:
    """What an error means where the server was to be found among several."""
    pool = redis.connection_pool
    if isinstance(pool, FoundPool):
        if isinstance(error, MasterNotFoundError):
            return StreamUnavailable(f"Redis at {pool.place}: {pool.nobody}")
        if isinstance(error, exceptions.RedisError) and isinstance(pool, SlotPool) and error_code(error) in _MOVING:
            return StreamUnavailable(f"Redis at {pool.place}: the slot moves to another node")
    return None


def _forbidden(text: str) -> str | None:
    """The command that the user may not run; of a script of ours on Redis 6.2, that of its line."""
    if found := _FORBIDDEN.search(text):
        return found[1].upper()
    found = _IN_LINE.search(text)
    return command_at(found[1], int(found[2])) if found else None


def translate(error: Exception, place: str = "") -> Exception:
    """What `error` means to a caller: `StreamUnavailable`, or the error itself (ours to fix)."""
    code = error_code(error) if isinstance(error, exceptions.RedisError) else ""
    at = f" at {place}" if place else ""
    if code in _STATES:
        return StreamUnavailable(f"Redis{at} {_STATES[code]}")
    if code in _REFUSALS:
        name, why = _forbidden(str(error)), _REFUSALS[code]
        what = f"refuses {name}: {why}" if name else f"cannot be used: {why} ({redact(str(error))})"
        return StreamUnavailable(f"Redis{at} {what}")
    if isinstance(error, exceptions.ResponseError) and str(error).lower().startswith("unknown command"):
        return StreamUnavailable(
            f"this server lacks a command that is needed ({redact(str(error))[:60]}): REDIS_URL must name a Redis or "
            "Valkey, 6.2 or newer, not Sentinel's port (26379 as a rule) or a proxy"
        )
    if code == "NOGROUP" or (isinstance(error, exceptions.ResponseError) and "no such key" in str(error).lower()):
        # Between two commands: whoever needs stream or group finds out at the next attempt, and makes it.
        return StreamUnavailable(f"Redis{at} has no such stream or group: somebody removed it at this moment")
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return StreamUnavailable("Redis did not answer in time")
    if isinstance(error, RuntimeError):
        return StreamUnavailable("Redis cannot be reached: the connection was closed while it was used")
    if isinstance(error, exceptions.ConnectionError | OSError):
        return StreamUnavailable(
            f"Redis cannot be reached: {redact(words_of(error, '?ssl_ca_certs=FILE in REDIS_URL'))}"
        )
    return error


@asynccontextmanager
async def translating(redis: Redis) -> AsyncIterator[None]:
    """Run Redis commands with their errors translated.

    After READONLY or MOVED the idle connections are closed, so that the next attempt finds the new master.
    A cancellation is never lost in here: the client library's own sending swallows one on Python 3.11 (ours does not,
    quick.py), and a loop of commands would go on for ever.
    """
    task = asyncio.current_task()
    assert task is not None
    cancellations = task.cancelling()
    try:
        yield
        if task.cancelling() > cancellations:
            raise asyncio.CancelledError
    except (exceptions.RedisError, OSError, RuntimeError) as error:
        if task.cancelling() > cancellations:
            raise asyncio.CancelledError from error
        if isinstance(error, RuntimeError) and "handler is closed" not in str(error):  # uvloop's, of a lost socket
            raise
        if isinstance(error, exceptions.RedisError) and error_code(error) in ("READONLY", *_MOVING):
            await close_idle(redis.connection_pool)
        translated = _of_several(error, redis) or translate(error, _place_of(redis))
        if translated is error:
            raise
        raise translated from error

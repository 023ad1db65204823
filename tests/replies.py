"""Redis' replies with their types.

redis-py's stubs allow every shape of every protocol; `connect` gets the shapes of RESP2, in bytes. A test says which
reply it expects, and fails here when it gets another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = dict[bytes, bytes]


def entries(reply: object) -> list[tuple[bytes, Fields]]:
    """Of XRANGE and XREVRANGE: id and fields of each entry."""
    assert isinstance(reply, list)
    return [(raw(entry_id), fields) for entry_id, fields in reply]


def read(reply: object) -> list[tuple[bytes, Fields]]:
    """Of XREADGROUP on one stream; nothing when the wait was in vain."""
    assert isinstance(reply, list)
    return entries(reply[0][1]) if reply else []


def raw(reply: object) -> bytes:
    """A key's value, or an entry's id."""
    assert isinstance(reply, bytes)
    return reply


def text(reply: object) -> str:
    return raw(reply).decode()


def number(reply: object) -> int:
    """A count, or a value that is a number."""
    return reply if isinstance(reply, int) else int(raw(reply))


def counts(reply: object) -> dict[str, int]:
    """Of HGETALL on a hash of counters."""
    assert isinstance(reply, dict)
    return {text(name): number(value) for name, value in reply.items()}


def to_add(fields: Mapping[bytes, bytes] | Mapping[str, str]) -> dict[Any, Any]:
    """For XADD, whose stub takes only a dict of everything that can be encoded."""
    return dict(fields)

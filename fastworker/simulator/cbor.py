"""DAG-CBOR and CIDs for the simulator, in both directions, over lexicon JSON.

A value is lexicon JSON: links are `{"$link": "bafy..."}`, byte strings `{"$bytes": "<base64>"}`. The encoder and the
decoder are our own, so that nothing of what is under test also makes the answer, and so that what no well-behaved
encoder makes (lone surrogates) can be made. libipld does the same encoding thirty times faster: `encode_record` uses
it where it is exact, and the unit tests hold the two against each other.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from typing import Any

import libipld

DAG_CBOR = b"\x01\x71\x12\x20"
"""CIDv1, dag-cbor, sha-256 of 32 bytes: the prefix of every CID in a repository."""
RAW = b"\x01\x55\x12\x20"
"""The same with codec raw: blobs."""
LINK = b"\xd8\x2a\x58\x25\x00"
"""CBOR of a link to a 36-byte CID: tag 42, byte string of 37, multibase identity prefix."""


class DecodeError(ValueError):
    """Not DAG-CBOR as this module writes it."""


def cid_of(block: bytes, prefix: bytes = DAG_CBOR) -> bytes:
    return prefix + hashlib.sha256(block).digest()


def cid_text(cid: bytes) -> str:
    """Base32 multibase. libipld's is twenty times faster than base64.b32encode; a test compares them."""
    return str(libipld.encode_cid(cid))


def cid_bytes(text: str) -> bytes:
    """Raises ValueError where `text` is not base32 multibase."""
    base, raw = libipld.decode_multibase(text)
    if base != "b":
        raise ValueError(f"not a base32 CID: {text!r}")
    return bytes(raw)


def head(major: int, count: int) -> bytes:
    """The initial bytes of an item: major type 0..7 and its argument, in the shortest form."""
    top = major << 5
    if count < 24:
        return bytes((top | count,))
    if count < 0x100:
        return bytes((top | 24, count))
    if count < 0x10000:
        return bytes((top | 25,)) + count.to_bytes(2, "big")
    if count < 0x1_0000_0000:
        return bytes((top | 26,)) + count.to_bytes(4, "big")
    return bytes((top | 27,)) + count.to_bytes(8, "big")


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return (_TEXT_HEADS[len(raw)] if len(raw) < 512 else head(3, len(raw))) + raw


_TEXT_HEADS = [head(3, count) for count in range(512)]


def link(cid: bytes) -> bytes:
    return LINK + cid if len(cid) == 36 else b"\xd8\x2a" + head(2, len(cid) + 1) + b"\x00" + cid


def encode(value: Any) -> bytes:
    """Canonical DAG-CBOR. Lone surrogates pass through as (invalid) UTF-8."""
    if value is None:
        return b"\xf6"
    if value is True:
        return b"\xf5"
    if value is False:
        return b"\xf4"
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return head(0, value) if value >= 0 else head(1, -1 - value)
    if isinstance(value, float):
        return b"\xfb" + struct.pack(">d", value)
    if isinstance(value, bytes):
        return head(2, len(value)) + value
    if isinstance(value, list | tuple):
        return head(4, len(value)) + b"".join(map(encode, value))
    if not isinstance(value, dict):
        raise TypeError(f"no DAG-CBOR for {type(value).__name__}")
    if (single := _single(value)) is not None:
        is_link, raw = single
        return link(raw) if is_link else head(2, len(raw)) + raw
    pairs = sorted((text(key), encode(item)) for key, item in value.items())
    return head(5, len(pairs)) + b"".join(key + item for key, item in pairs)


def encode_record(record: Any) -> bytes:
    """`encode`, by libipld where it can: it has no byte strings that look like CIDs, no -0.0, no surrogates."""
    try:
        return libipld.encode_dag_cbor(_for_libipld(record))
    except ValueError:
        return encode(record)


def _single(value: dict[str, Any]) -> tuple[bool, bytes] | None:
    """`(is a link, bytes)` where the object is a link or a byte string of lexicon JSON."""
    if len(value) != 1:
        return None
    ((key, item),) = value.items()
    try:
        if key == "$link":
            return True, cid_bytes(item)
        if key == "$bytes":
            return False, base64.b64decode(item + "=" * (-len(item) % 4), validate=True)
    except (AttributeError, TypeError, ValueError):  # an ordinary object with a strange key
        return None
    return None


def _for_libipld(value: Any) -> Any:
    kind = type(value)
    if kind is dict:
        if len(value) == 1 and (single := _single(value)) is not None:
            is_link, raw = single
            if not is_link or len(raw) != 36:
                raise ValueError("libipld would guess")
            return raw
        return {k: _for_libipld(v) if type(v) in _LOOKED_INTO else v for k, v in value.items()}
    if kind is float and value == 0:
        raise ValueError("libipld loses the sign of -0.0")
    return [_for_libipld(v) for v in value] if kind is list else value


_LOOKED_INTO = (dict, list, float)


def decode(data: bytes) -> Any:
    """One DAG-CBOR item as lexicon JSON, exact about links and byte strings. Raises DecodeError."""
    try:
        value, end = _item(data, 0)
    except (ValueError, IndexError, RecursionError, struct.error) as error:
        raise DecodeError(str(error)) from error
    if end != len(data):
        raise DecodeError(f"{len(data) - end} bytes after the item")
    return value


def _argument(data: bytes, at: int) -> tuple[int, int]:
    low = data[at] & 31
    if low < 24:
        return low, at + 1
    if low > 27:
        raise DecodeError(f"argument {low} at {at}")
    size = 1 << (low - 24)
    if at + 1 + size > len(data):
        raise DecodeError("truncated")
    return int.from_bytes(data[at + 1 : at + 1 + size], "big"), at + 1 + size


def _bytes(data: bytes, at: int) -> tuple[bytes, int]:
    size, at = _argument(data, at)
    if at + size > len(data):
        raise DecodeError("truncated")
    return data[at : at + size], at + size


def _item(data: bytes, at: int) -> tuple[Any, int]:
    major = data[at] >> 5
    if major == 0:
        return _argument(data, at)
    if major == 1:
        value, at = _argument(data, at)
        return -1 - value, at
    if major == 2:
        raw, at = _bytes(data, at)
        return {"$bytes": base64.b64encode(raw).decode().rstrip("=")}, at
    if major == 3:
        raw, at = _bytes(data, at)
        return raw.decode(), at
    if major == 4:
        count, at = _argument(data, at)
        items = []
        for _ in range(count):
            item, at = _item(data, at)
            items.append(item)
        return items, at
    if major == 5:
        count, at = _argument(data, at)
        members: dict[str, Any] = {}
        for _ in range(count):
            if data[at] >> 5 != 3:
                raise DecodeError(f"a map key that is not text at {at}")
            key, at = _bytes(data, at)
            members[key.decode()], at = _item(data, at)
        return members, at
    if major == 6:
        tag, at = _argument(data, at)
        if tag != 42 or data[at] >> 5 != 2:
            raise DecodeError(f"tag {tag} at {at}")
        raw, at = _bytes(data, at)
        return {"$link": cid_text(raw[1:])}, at
    if data[at] == 0xFB:
        (number,) = struct.unpack(">d", data[at + 1 : at + 9])
        return number, at + 9
    if data[at] not in _SIMPLE:
        raise DecodeError(f"simple value {data[at]:#x} at {at}")
    return _SIMPLE[data[at]], at + 1


_SIMPLE = {0xF4: False, 0xF5: True, 0xF6: None}

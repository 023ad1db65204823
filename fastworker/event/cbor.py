"""A second DAG-CBOR decoder: slow, exact about links, and tolerant where a record may be saved.

libipld is the decoder of the hot path. This one is for what libipld refuses or cannot tell:
it keeps links apart from byte strings, accepts text that is not UTF-8 (lone surrogates are seen
daily on the network), unsorted and repeated keys (the last one counts), every float and `undefined`.
All else that DAG-CBOR forbids is refused here too.
"""

from __future__ import annotations

import struct
from typing import Any

from fastworker.errors import InvalidEvent, Reason

DEPTH_MAX = 128
"""Containers within containers. The protocol says 32, the deepest real record seen has 17, orjson writes 254."""

VALUES_MAX = 100_000
"""Of all records of a commit. Large ones have some thousands; 2 MB can hold 2 million, which take ten seconds and
half a gigabyte to decode and to write as JSON."""

_ARRAY, _MAP = 4, 5
_HEADS = bytes(range(0x81, 0xA0)) + bytes(range(0xA1, 0xC0))  # arrays and maps that are not empty


class Link(bytes):
    """The raw bytes of a CID, without the multibase prefix: what libipld gives as plain `bytes`."""

    __slots__ = ()


def decode(data: bytes) -> Any:
    """One value that fills `data`. Raises InvalidEvent (BAD_CBOR, TOO_DEEP)."""
    value, position = _value(data, 0, 0)
    if position != len(data):
        raise InvalidEvent(Reason.BAD_CBOR, "bytes after the value")
    return value


def decode_sequence(data: bytes, count_max: int) -> list[Any]:
    """Values one after the other, at most `count_max`."""
    values: list[Any] = []
    position = 0
    while position < len(data):
        if len(values) == count_max:
            raise InvalidEvent(Reason.BAD_CBOR, f"more than {count_max} values")
        value, position = _value(data, position, 0)
        values.append(value)
    return values


def check_depth(block: bytes) -> None:
    """Refuse nesting that would cost seconds to decode or could not be written as JSON. Raises InvalidEvent (TOO_DEEP).

    libipld goes as deep as the Python stack happens to allow, and a container that only claims its
    length costs memory for all of it at each level: 1 MB of such heads takes it seconds. Bytes that
    may be heads of containers are counted first, which settles nearly every record without a walk.
    """
    if len(block) - len(block.translate(None, _HEADS)) < DEPTH_MAX:  # the innermost may be empty and is not counted
        return
    pending: list[int] = []  # of each open container: how many values it still wants
    position = 0
    end = len(block)
    while position < end:
        major, argument, position = _head(block, position)
        if major in (_ARRAY, _MAP):
            pending.append(argument << (major == _MAP))
            if len(pending) > DEPTH_MAX:
                raise InvalidEvent(Reason.TOO_DEEP, f"more than {DEPTH_MAX} levels")
        elif major == 6:
            continue  # a tag: its value follows
        else:
            if major in (2, 3):
                position += argument
            if pending:
                pending[-1] -= 1
        while pending and not pending[-1]:
            pending.pop()
            if pending:
                pending[-1] -= 1


def count_values(block: bytes, most: int) -> int:
    """How many values and keys are in a block, containers among them; counted no further than one beyond `most`."""
    count, position, end = 0, 0, len(block)
    while position < end and count <= most:
        major, argument, position = _head(block, position)
        if major != 6:  # a tag: its value follows
            count += 1
            if major in (2, 3):
                position += argument
    return count


def _head(data: bytes, position: int) -> tuple[int, int, int]:
    """Major type, argument, and where the content starts."""
    try:
        first = data[position]
        major, info = first >> 5, first & 31
        if info < 24:
            return major, info, position + 1
        if info > 27:
            raise InvalidEvent(Reason.BAD_CBOR, "indefinite length")
        size = 1 << (info - 24)
        stop = position + 1 + size
        if stop > len(data):
            raise InvalidEvent(Reason.BAD_CBOR, "ends inside a value")
        return major, int.from_bytes(data[position + 1 : stop], "big"), stop
    except IndexError:
        raise InvalidEvent(Reason.BAD_CBOR, "ends inside a value") from None


def _value(data: bytes, position: int, depth: int) -> tuple[Any, int]:
    start = position
    major, argument, position = _head(data, position)
    if major == 0:
        return argument, position
    if major == 1:
        return -1 - argument, position
    if major in (2, 3):
        stop = position + argument
        if stop > len(data):
            raise InvalidEvent(Reason.BAD_CBOR, "ends inside a value")
        content = data[position:stop]
        return (content if major == 2 else _text(content)), stop
    if major in (_ARRAY, _MAP):
        if depth == DEPTH_MAX:
            raise InvalidEvent(Reason.TOO_DEEP, f"more than {DEPTH_MAX} levels")
        if argument > len(data) - position:
            raise InvalidEvent(Reason.BAD_CBOR, "ends inside a value")
        if major == _ARRAY:
            array = []
            for _ in range(argument):
                value, position = _value(data, position, depth + 1)
                array.append(value)
            return array, position
        mapping = {}
        for _ in range(argument):
            key, position = _value(data, position, depth + 1)
            if type(key) is not str:
                raise InvalidEvent(Reason.BAD_CBOR, "a key that is not text")
            mapping[key], position = _value(data, position, depth + 1)
        return mapping, position
    if major == 6:
        content, stop = _value(data, position, DEPTH_MAX)
        if argument != 42 or type(content) is not bytes or content[:1] != b"\0" or len(content) < 2:
            raise InvalidEvent(Reason.BAD_CBOR, f"tag {argument}")
        return Link(content[1:]), stop
    return _simple(data, start, position)


def _simple(data: bytes, start: int, stop: int) -> tuple[Any, int]:
    match data[start] & 31:
        case 20:
            return False, stop
        case 21:
            return True, stop
        case 22 | 23:  # null, undefined
            return None, stop
        case 25:
            return struct.unpack_from(">e", data, start + 1)[0], stop
        case 26:
            return struct.unpack_from(">f", data, start + 1)[0], stop
        case 27:
            return struct.unpack_from(">d", data, start + 1)[0], stop
        case _:
            raise InvalidEvent(Reason.BAD_CBOR, "unknown simple value")


def _text(content: bytes) -> str:
    """Lone surrogates stay, to be cleaned where text is written as those from JSON are; other damage becomes U+FFFD."""
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return content.decode("utf-8", "replace")

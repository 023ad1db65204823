"""Records: decoding what is stored, and writing it as lexicon JSON that PostgreSQL accepts.

libipld gives links and byte strings alike as `bytes`. Which of the two a value is follows from the
block: a link stands there behind tag 42, a byte string behind its own length. When that does not
decide, or there are many of them (each is searched for in the whole block), or the JSON is not what
jsonb takes (NUL, lone surrogates) or what orjson writes (integers beyond 64 bits), the slow path
decodes the block again exactly and cleans every value.
"""

from __future__ import annotations

import json
import math
import re
from binascii import b2a_base64
from collections.abc import Sequence
from typing import Any

import libipld
import orjson

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Op, Record
from fastworker.event.cbor import DEPTH_MAX, VALUES_MAX, Link, check_depth, count_values, decode
from fastworker.event.syntax import reads_as_identifier

TOO_MANY_VALUES = f"more than {VALUES_MAX:,} values in a commit"
SEARCHES_MAX = 16  # of one block for links; a post has up to four blobs

_dirty = re.compile("[\0\ud800-\udfff]")
_hex_cid = re.compile(r"01(?:55|71)1220[0-9a-f]{64}", re.ASCII).fullmatch


def load_record(op: Op) -> Record:
    """The record of a create or update. Raises InvalidEvent (BAD_CBOR, TOO_DEEP, BAD_RECORD).

    Links and byte strings in it are `bytes` or, from JSON, `{"$link"}` and `{"$bytes"}`: see `link_text`, `json_text`.
    Text may hold NUL or lone surrogates: see `clean_text`.
    """
    block = op.block
    if block is None:
        if op.record is None:
            raise InvalidEvent(Reason.BAD_RECORD, "no record")
        return op.record
    check_depth(block)
    try:
        record = libipld.decode_dag_cbor(block)
    except (ValueError, RecursionError, MemoryError):
        record = decode(block)
    if type(record) is not dict:
        raise InvalidEvent(Reason.BAD_RECORD, "not an object")
    return record


def too_heavy(ops: Sequence[Op]) -> Sequence[int]:
    """Which ops of a commit, by their place, hold more values than may be decoded at a stretch. The first ones may.

    A value takes a byte at least, which settles nearly every commit. Records from JSON are bounded when they are read.
    """
    if len(ops) == 1 and ((block := ops[0].block) is None or len(block) <= VALUES_MAX):
        return ()
    if sum([len(op.block) for op in ops if op.block is not None]) <= VALUES_MAX:
        return ()
    heavy = []
    left = VALUES_MAX
    for place, op in enumerate(ops):
        if op.block is None:
            continue
        try:
            count = count_values(op.block, left)
        except InvalidEvent:  # decoding it tells more
            continue
        if count > left:
            heavy.append(place)
        else:
            left -= count
    return heavy


def json_text(value: Any, op: Op, lost: list[str] | None = None) -> str:
    """Lexicon JSON of `op`'s record or of a part of it, as jsonb accepts it. Raises InvalidEvent (TOO_DEEP).

    A URI, DID or CID that jsonb does not take is left out with its member: cleaned, it would name something else. It
    is told in `lost`.
    """
    lost = [] if lost is None else lost
    try:
        text = _fast_json(value, op.block)
    except TypeError:
        return _slow_json(value, op.block, lost).decode()
    return (_slow_json(value, op.block, lost) if b"\\u0000" in text else text).decode()


def json_bytes(value: Any, block: bytes | None) -> bytes:
    """Lexicon JSON for a stream or a person, every character as it is; `block` is what the value was decoded from.

    Cleaned here, an identifier with a NUL would become another identifier on a JSON stream, and none on the others.
    """
    try:
        return _fast_json(value, block)
    except TypeError:
        return _slow_json(value, block, None)


def _fast_json(value: Any, block: bytes | None) -> bytes:
    return orjson.dumps(value) if block is None else orjson.dumps(value, _lexicon_json(block))


def link_text(value: Any, op: Op) -> str | None:  # noqa: ARG001 the caller need not know that a blob's ref is never ambiguous
    """The CID (base32 text) that a blob's `ref` or another link names, None when it names none. Text is as it came.

    Takes raw CID bytes (DAG-CBOR), `{"$link": text}` (lexicon JSON), text, and the lower-case hex of
    the predecessor's reader.
    """
    if type(value) is dict:
        value = value.get("$link")
    if isinstance(value, bytes):
        return cid_text(value)
    if type(value) is not str or not value:
        return None
    return hex_cid_text(value) or value


def hex_cid_text(text: str) -> str | None:
    """Base32 text of a CID that is written as hex, as the predecessor's reader does; None for other text."""
    return cid_text(bytes.fromhex(text)) if _hex_cid(text) else None


def cid_text(cid: bytes) -> str | None:
    """Base32 text of a CID's raw bytes, None when they are not a CID."""
    try:
        return str(libipld.encode_cid(cid))
    except ValueError:
        return None


def clean_text(text: str) -> str:
    """Without NUL, which PostgreSQL cannot store, and lone surrogates, which UTF-8 cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return _dirty.sub("", text)
    return text.replace("\0", "") if "\0" in text else text


def nesting_exceeds(value: Any, levels: int) -> bool:
    """Whether containers nest deeper than that. Links and byte strings are no containers: in DAG-CBOR they are none."""
    if type(value) is dict:
        if len(value) == 1 and type(value.get("$link", value.get("$bytes"))) is str:
            return False
        return not levels or any(nesting_exceeds(inner, levels - 1) for inner in value.values())
    if type(value) is list:
        return not levels or any(nesting_exceeds(inner, levels - 1) for inner in value)
    return False


def values_within(value: Any, most: int) -> int:
    """How many values and keys are in it, as `count_values` does; counted no further than one beyond `most`."""
    count = 0
    pending = [value]
    while pending and count <= most:
        inner = pending.pop()
        count += 1
        if type(inner) is list:
            pending += inner[: most + 1 - count]
        elif type(inner) is dict and not (len(inner) == 1 and type(inner.get("$link", inner.get("$bytes"))) is str):
            count += len(inner)
            pending += list(inner.values())[: most + 1]
    return count


def _lexicon_json(block: bytes) -> Any:
    """The hook for orjson, called for each `bytes` in the value. Raising sends us to the slow path."""
    left = SEARCHES_MAX

    def hook(value: bytes) -> dict[str, str] | None:
        nonlocal left
        left -= 1
        if type(value) is not bytes or left < 0:
            raise TypeError
        is_link = b"\xd8\x2a" + _byte_string(b"\0" + value) in block
        if is_link == (_byte_string(value) in block):
            raise TypeError
        return _link(value) if is_link else _bytes(value)

    return hook


def _byte_string(content: bytes) -> bytes:
    """DAG-CBOR of a byte string."""
    size = len(content)
    if size < 24:
        return bytes((0x40 + size,)) + content
    if size < 256:
        return bytes((0x58, size)) + content
    if size < 65536:
        return b"\x59" + size.to_bytes(2, "big") + content
    return b"\x5a" + size.to_bytes(4, "big") + content


def _link(cid: bytes) -> dict[str, str] | None:
    text = cid_text(cid)
    return None if text is None else {"$link": text}


def _bytes(content: bytes) -> dict[str, str]:
    return {"$bytes": b2a_base64(content, newline=False).rstrip(b"=").decode()}


def _slow_json(value: Any, block: bytes | None, lost: list[str] | None) -> bytes:
    """Cleaned where `lost` is given: what was left out is noted there."""
    if nesting_exceeds(value, DEPTH_MAX):
        raise InvalidEvent(Reason.TOO_DEEP, f"more than {DEPTH_MAX} levels")
    links: set[bytes] = set()
    if block is not None:
        record = decode(block)
        contents: set[bytes] = set()
        _collect(record, links, contents)
        if not links.isdisjoint(contents):  # the same bytes as a link and as a byte string: only their place tells
            value = next((part for part in (record, *record.values()) if part == value), value)
            links -= contents
    plain = _plain(value, links, lost)
    return json.dumps(plain, ensure_ascii=lost is None, allow_nan=False, separators=(",", ":")).encode()


def _collect(tree: Any, links: set[bytes], contents: set[bytes]) -> None:
    if isinstance(tree, bytes):
        (links if type(tree) is Link else contents).add(bytes(tree))
    elif type(tree) is dict:
        for inner in tree.values():
            _collect(inner, links, contents)
    elif type(tree) is list:
        for inner in tree:
            _collect(inner, links, contents)


_LEFT_OUT = object()


def _plain(value: Any, links: set[bytes], lost: list[str] | None) -> Any:
    """What JSON can hold, and jsonb where `lost` is given. `links`: links wherever they stand."""
    if type(value) is str:
        if lost is None or (text := clean_text(value)) == value:
            return value
        if not reads_as_identifier(text):
            return text
        lost.append(text)
        return _LEFT_OUT
    if isinstance(value, bytes):
        return _link(value) if type(value) is Link or value in links else _bytes(value)
    if type(value) is dict:
        # When cleaning makes two keys the same, the one that was clean wins: it sorts first, so it comes last here.
        return {
            key if lost is None else clean_text(key): plain
            for key in sorted(value, reverse=True)
            if (plain := _plain(value[key], links, lost)) is not _LEFT_OUT
        }
    if type(value) is list:
        return [plain for inner in value if (plain := _plain(inner, links, lost)) is not _LEFT_OUT]
    if type(value) is int and not -(2**63) <= value < 2**64:
        # What orjson reads such a number as: so that a record is the same whichever form of the stream it came by.
        value = float(value) if value.bit_length() <= 1023 else math.inf
    if type(value) is float and not math.isfinite(value):
        return None
    return value

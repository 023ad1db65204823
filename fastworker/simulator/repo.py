"""Repositories that grow, and the frames of their commits: true CIDs, true proofs, a true `prevData` chain.

The layouts are written out byte by byte (not through a CBOR encoder of maps): fast, and independent of the code under
test. Without a key (simulator/keys.py) signatures are 64 bytes that look random.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from fastworker.simulator import mst
from fastworker.simulator.cbor import LINK, DecodeError, cid_bytes, cid_of, cid_text, decode, encode_record, head, text

START_TIME = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=517_000) - timedelta(days=1)
"""Yesterday, the same in all processes of a run: what commits say of their time is believed for four days, and a relay
that sends faster than it happened must not arrive in the future."""
START_SEQ = 31_527_015_322


class SimFrame(NamedTuple):
    """`data`: one WebSocket message. `event`: the same as a neutral dict, None for what no table can hold.

    Neutral events: `{"kind": "commit", "seq", "repo", "rev", "time", "ops": [{"action", "path", "cid", "record"}]}`
    with records as lexicon JSON (`cid` None for a delete; no `record` where the frame lacks its block),
    `{"kind": "identity", "seq", "did", "handle", "time"}`,
    `{"kind": "account", "seq", "did", "active", "status", "time"}`, `{"kind": "sync", "seq", "did", "rev", "time"}`.
    `seq` is None only for `#info`.
    """

    data: bytes
    event: dict[str, Any] | None
    seq: int | None


class Block(NamedTuple):
    """A record given as its block. `record` is what the tables must hold of it; None: the block is unusable."""

    data: bytes
    record: Any


class Lost(NamedTuple):
    """A record that the repository has, and whose block the frame lacks (or carries as other bytes)."""

    record: Any
    instead: bytes | None = None


Write = tuple[str, str, Any]
"""(action, path, record): record is lexicon JSON, a Block or a Lost; None for a delete."""


class Signer(Protocol):
    def sign(self, message: bytes) -> bytes: ...


class Tick(NamedTuple):
    seq: int
    rev: str
    time: str


_DIGITS = "234567abcdefghijklmnopqrstuvwxyz"
_PAIRS = [a + b for a in _DIGITS for b in _DIGITS]


def tid(microseconds: int, clock_id: int = 0) -> str:
    """The 13-character sortable identifier of a moment."""
    value = microseconds << 10 | clock_id
    pairs = _PAIRS
    return (
        _DIGITS[value >> 60]
        + pairs[value >> 50 & 1023]
        + pairs[value >> 40 & 1023]
        + pairs[value >> 30 & 1023]
        + pairs[value >> 20 & 1023]
        + pairs[value >> 10 & 1023]
        + pairs[value & 1023]
    )


class Clock:
    """The relay's seq and the world's time: every tick is one event later, every TID one microsecond."""

    def __init__(
        self, start_seq: int = START_SEQ, start_time: datetime = START_TIME, *, gap_us: int = 2_400, clock_id: int = 21
    ) -> None:
        self.seq = start_seq - 1
        self.now_us = int(start_time.timestamp() * 1_000_000)
        self._gap_us = gap_us
        self._clock_id = clock_id

    def tick(self) -> Tick:
        self.seq += 1
        self.now_us += self._gap_us
        return Tick(self.seq, tid(self.now_us, self._clock_id), self.iso())

    def tid(self) -> str:
        self.now_us += 1
        return tid(self.now_us, self._clock_id)

    def iso(self, shift_us: int = 0) -> str:
        """The clock's moment as the network writes it, `2026-07-04T14:38:07.517Z`."""
        second, rest = divmod(self.now_us + shift_us, 1_000_000)
        return f"{_second_text(second)}{rest // 1000:03}Z"


class LiveClock(Clock):
    """Time as it is: what is made with it is dated now, at any rate, for as long as it runs."""

    def __init__(self, start_seq: int = START_SEQ) -> None:
        super().__init__(start_seq, datetime.now(UTC), gap_us=1)

    def tick(self) -> Tick:
        self.now_us = max(self.now_us, time.time_ns() // 1000)
        return super().tick()


@lru_cache(64)
def _second_text(second: int) -> str:
    return f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}."


class Repo:
    """One account's repository. `root` may be a tree that other accounts share.

    With a key its commits are really signed, and it keeps its records, so that it can be exported whole.
    """

    def __init__(
        self, did: str, clock: Clock | None = None, *, root: mst.Node = mst.EMPTY, key: Signer | None = None
    ) -> None:
        self.did = did
        self.key = key
        self.records: dict[bytes, bytes] = {}  # by CID; what is deleted stays
        self.clock = clock or Clock()
        self.root = root
        self.rev: str | None = None

    def holds(self, path: str) -> bool:
        return mst.get(self.root, path.encode()) is not None

    def commit(self, writes: Sequence[Write]) -> SimFrame:
        """One commit. Lenient where a PDS is not: creating twice, or deleting what is not there, is done as asked."""
        tick = self.clock.tick()
        before = mst.seal(self.root)
        root = self.root
        ops: list[bytes] = []
        neutral: list[dict[str, Any]] = []
        records: dict[bytes, bytes] = {}
        keys: dict[bytes, None] = {}
        for action, path, record in writes:
            key = path.encode()
            keys[key] = None
            present = mst.get(root, key)
            op: dict[str, Any] = {"action": action, "path": path, "cid": None}
            cid = None
            if action == "delete":
                if present is not None:
                    root = mst.remove(root, key)
            else:
                if isinstance(record, Block):
                    block, value = record
                    carried: bytes | None = block
                    if value is not None:
                        op["record"] = value
                elif isinstance(record, Lost):
                    block, carried = encode_record(record.record), record.instead
                else:
                    carried = block = encode_record(record)
                    op["record"] = record
                cid = cid_of(block)
                root = mst.put(root, key, cid)
                op["cid"] = cid_text(cid)
                if self.key is not None:
                    self.records[cid] = block
                if carried is not None:
                    records[cid] = carried
            ops.append(op_bytes(action, path, cid, present))
            neutral.append(op)
        self.root = root
        data_cid, blocks = mst.blocks(root, keys)
        since, self.rev = self.rev, tick.rev
        commit = commit_block(self.did, tick.rev, data_cid, self.key)
        commit_cid = cid_of(commit)
        car = car_bytes(commit_cid, {commit_cid: commit, **blocks, **records})
        frame = commit_frame(tick, self.did, since=since, commit=commit_cid, car=car, ops=ops, prev_data=before)
        event = {
            "kind": "commit",
            "seq": tick.seq,
            "repo": self.did,
            "rev": tick.rev,
            "time": tick.time,
            "ops": neutral,
        }
        return SimFrame(frame, event, tick.seq)

    def sync(self) -> SimFrame:
        """`#sync`: the present state, without saying how it came about."""
        tick = self.clock.tick()
        self.rev = tick.rev
        commit = commit_block(self.did, tick.rev, mst.seal(self.root), self.key)
        commit_cid = cid_of(commit)
        car = car_bytes(commit_cid, {commit_cid: commit})
        members = (text(self.did), text(tick.rev), head(0, tick.seq), text(tick.time), head(2, len(car)) + car)
        data = _HEADERS["sync"] + b"\xa5" + _members(("did", "rev", "seq", "time", "blocks"), members)
        event = {"kind": "sync", "seq": tick.seq, "did": self.did, "rev": tick.rev, "time": tick.time}
        return SimFrame(data, event, tick.seq)

    def export(self) -> tuple[bytes, dict[bytes, bytes]]:
        """(CID of the commit, blocks): what `getRepo` sends. Needs a key; rev is that of the last commit."""
        if self.rev is None:
            self.rev = self.clock.tid()
        data = mst.seal(self.root)
        commit = commit_block(self.did, self.rev, data, self.key)
        commit_cid = cid_of(commit)
        blocks = {commit_cid: commit, **mst.all_blocks(self.root)}
        for _, cid in mst.items(self.root):
            blocks[cid] = self.records[cid]
        return commit_cid, blocks


def frame_header(kind: str) -> bytes:
    """`{"t": "#<kind>", "op": 1}`."""
    return b"\xa2at" + text("#" + kind) + b"bop\x01"


_HEADERS = {kind: frame_header(kind) for kind in ("commit", "sync", "identity", "account", "info")}


def _members(names: Iterable[str], values: Iterable[bytes]) -> bytes:
    return b"".join(text(name) + value for name, value in zip(names, values, strict=True))


def op_bytes(action: str, path: str, cid: bytes | None, prev: bytes | None) -> bytes:
    """One op; `prev` (the record that it replaces or deletes) is left out of a create."""
    return (
        (b"\xa3ccid" if prev is None else b"\xa4ccid")
        + (b"\xf6" if cid is None else LINK + cid)
        + b"dpath"
        + text(path)
        + (b"" if prev is None else b"dprev" + LINK + prev)
        + b"faction"
        + text(action)
    )


def commit_block(did: str, rev: str, data: bytes, key: Signer | None = None) -> bytes:
    """The signed commit. Without a key the signature is the SHA-512 of the rest: as long, and as random to the eye."""
    rest = b"ddata" + LINK + data + b"dprev\xf6gversion\x03"
    start = b"cdid" + text(did) + b"crev" + text(rev)
    signature = hashlib.sha512(start + rest).digest() if key is None else key.sign(b"\xa5" + start + rest)
    return b"\xa6" + start + b"csigX@" + signature + rest


def commit_frame(
    tick: Tick,
    did: str,
    *,
    since: str | None,
    commit: bytes,
    car: bytes,
    ops: Sequence[bytes],
    prev_data: bytes | None,
) -> bytes:
    """A `#commit` message of these parts, members in canonical order."""
    return b"".join(
        (
            _HEADERS["commit"],
            b"\xab" if prev_data is None else b"\xac",
            b"cops",
            head(4, len(ops)),
            *ops,
            b"crev",
            text(tick.rev),
            b"cseq",
            head(0, tick.seq),
            b"drepo",
            text(did),
            b"dtime",
            text(tick.time),
            b"eblobs\x80esince",
            b"\xf6" if since is None else text(since),
            b"fblocks",
            head(2, len(car)),
            car,
            b"fcommit" + LINK + commit,
            b"frebase\xf4ftooBig\xf4",
            b"" if prev_data is None else b"hprevData" + LINK + prev_data,
        )
    )


def varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_CAR_HEADER = b"\x3a\xa2eroots\x81" + LINK
_VARINTS = [varint(value) for value in range(16_384)]


def car_bytes(root: bytes, blocks: dict[bytes, bytes]) -> bytes:
    """CAR v1: the header with one root, then the blocks in the order of the dict."""
    parts = [_CAR_HEADER, root, b"gversion\x01"]
    for cid, block in blocks.items():
        size = len(cid) + len(block)
        parts += (_VARINTS[size] if size < 16_384 else varint(size), cid, block)
    return b"".join(parts)


def read_car(car: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """(root, blocks by CID) of a CAR v1. Raises ValueError where it is not one, or a block is not what its CID says."""
    at = 0
    root = b""
    blocks: dict[bytes, bytes] = {}
    while at < len(car):
        size = shift = 0
        while True:
            byte = car[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        section = car[at : at + size]
        at += size
        if len(section) != size:
            raise ValueError("truncated CAR")
        if not root:
            root = section[section.index(LINK) + len(LINK) :][:36]
            continue
        cid, block = section[:36], section[36:]
        if cid_of(block, cid[:4]) != cid:
            raise ValueError(f"block {cid_text(cid)} has other bytes")
        blocks[cid] = block
    return root, blocks


def read_tree(blocks: dict[bytes, bytes], root: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, record CID) of the repository whose MST root is given, in key order. Written without `mst`."""
    node = decode(blocks[root])
    if node["l"] is not None:
        yield from read_tree(blocks, _cid(node["l"]))
    key = b""
    for entry in node["e"]:
        key = key[: entry["p"]] + _plain(entry["k"])
        yield key.decode(), _cid(entry["v"])
        if entry["t"] is not None:
            yield from read_tree(blocks, _cid(entry["t"]))


def _cid(link: dict[str, str]) -> bytes:
    return cid_bytes(link["$link"])


def _plain(value: dict[str, str]) -> bytes:
    digits = value["$bytes"]
    return base64.b64decode(digits + "=" * (-len(digits) % 4))


def identity_frame(tick: Tick, did: str, handle: str | None) -> SimFrame:
    names, values = ["did", "seq", "time"], [text(did), head(0, tick.seq), text(tick.time)]
    if handle is not None:
        names.append("handle")
        values.append(text(handle))
    data = _HEADERS["identity"] + head(5, len(names)) + _members(names, values)
    return SimFrame(
        data, {"kind": "identity", "seq": tick.seq, "did": did, "handle": handle, "time": tick.time}, tick.seq
    )


def account_frame(tick: Tick, did: str, *, active: bool, status: str | None = None) -> SimFrame:
    names, values = ["did", "seq", "time"], [text(did), head(0, tick.seq), text(tick.time)]
    names.append("active")
    values.append(b"\xf5" if active else b"\xf4")
    if status is not None:
        names.append("status")
        values.append(text(status))
    data = _HEADERS["account"] + head(5, len(names)) + _members(names, values)
    event = {
        "kind": "account",
        "seq": tick.seq,
        "did": did,
        "active": active,
        "status": status,
        "time": tick.time,
    }
    return SimFrame(data, event, tick.seq)


def info_frame(name: str, message: str | None = None) -> SimFrame:
    """`#info` has no seq."""
    names, values = ["name"], [text(name)]
    if message is not None:
        names.append("message")
        values.append(text(message))
    return SimFrame(_HEADERS["info"] + head(5, len(names)) + _members(names, values), None, None)


def error_frame(error: str, message: str | None = None) -> bytes:
    """`{"op": -1}` and what went wrong; the relay closes after it."""
    body = {"error": error} | ({} if message is None else {"message": message})
    return b"\xa1bop\x20" + encode_record(body)


def unknown_frame(tick: Tick, kind: str = "future") -> SimFrame:
    """A kind that nobody knows yet; its seq counts all the same."""
    data = frame_header(kind) + b"\xa2" + _members(("seq", "novel"), (head(0, tick.seq), text("thing")))
    return SimFrame(data, None, tick.seq)


def repo_to_frames(car: bytes, clock: Clock | None = None) -> Iterator[SimFrame]:
    """A whole repository as the commits that would have made it: one create per record, blocks as they are."""
    root, blocks = read_car(car)
    commit = decode(blocks[root])
    repo = Repo(commit["did"], clock)
    for path, cid in read_tree(blocks, _cid(commit["data"])):
        block = blocks[cid]
        try:
            record = decode(block)
        except DecodeError:
            record = None
        yield repo.commit([("create", path, Block(block, record))])

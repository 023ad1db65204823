"""Messages that no relay should send, each with a name that says what is wrong with it.

Most are a good commit of three likes with one thing broken, so that a test can ask for the siblings: `good_likes()`
says which paths a reader may still find.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from fastworker.simulator import mst
from fastworker.simulator.cbor import DAG_CBOR, RAW, cid_of, encode, head, link, text
from fastworker.simulator.repo import (
    START_SEQ,
    Clock,
    Repo,
    SimFrame,
    Tick,
    Write,
    account_frame,
    car_bytes,
    commit_block,
    commit_frame,
    error_frame,
    frame_header,
    identity_frame,
    info_frame,
    op_bytes,
    tid,
    varint,
)

DID = "did:plc:hostilehostilehostileho2"
_AUTHOR = "did:plc:ewvi7nxzyoun6zhxrhs64oiz"
_TICK = Tick(START_SEQ, "3mptbypluud2a", "2026-07-04T14:38:07.517Z")
_DATE = "2026-07-04T14:38:07.000Z"
_NOTHING = object()


def good_likes() -> list[Write]:
    """The three ops of the commit that is broken; the middle one is the one that suffers."""
    cid = "bafyreidrm3k6s3p3x7lq5nxzseavd76snd2eppqhmjs7ie2w2iih5sg4ka"
    writes: list[Write] = []
    for number in range(3):
        subject = {"uri": f"at://{_AUTHOR}/app.bsky.feed.post/3mptbyplj5d2{number + 2}", "cid": cid}
        record = {"$type": "app.bsky.feed.like", "subject": subject, "createdAt": _DATE}
        writes.append(("create", f"app.bsky.feed.like/3mptbypluud2{'abc'[number]}", record))
    return writes


def hostile_frames(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(name, message), more than 2,000 of them (22 MB); the same for the same seed."""
    yield from _shapes()
    yield from _headers()
    yield from _payloads()
    yield from _ops()
    yield from _cars()
    yield from _records()
    yield from _other_kinds()
    yield from _damage(random.Random(f"hostile {seed}"))


def _good() -> SimFrame:
    return Repo(DID, Clock()).commit(good_likes())


def _like_blocks() -> list[tuple[str, bytes, bytes]]:
    """(path, cid, block) of the good likes."""
    return [(path, cid_of(block), block) for _, path, record in good_likes() for block in [encode(record)]]


def _commit(**changed: Any) -> bytes:
    """A commit with some of its members replaced: by encoded bytes, or left out (`_NOTHING`)."""
    likes = _like_blocks()
    block = commit_block(DID, _TICK.rev, mst.seal(mst.EMPTY))
    root = cid_of(block)
    car = car_bytes(root, {root: block} | {cid: data for _, cid, data in likes})
    ops = [op_bytes("create", path, cid, None) for path, cid, _ in likes]
    members: dict[str, Any] = {
        "ops": head(4, len(ops)) + b"".join(ops),
        "rev": text(_TICK.rev),
        "seq": head(0, _TICK.seq),
        "repo": text(DID),
        "time": text(_TICK.time),
        "blobs": b"\x80",
        "since": b"\xf6",
        "blocks": head(2, len(car)) + car,
        "commit": link(root),
        "rebase": b"\xf4",
        "tooBig": b"\xf4",
        "prevData": link(root),
    }
    kept = {name: value for name, value in (members | changed).items() if value is not _NOTHING}
    order = sorted(kept, key=lambda name: (len(name), name))
    return frame_header("commit") + head(5, len(kept)) + b"".join(text(name) + kept[name] for name in order)


def _with_ops(*ops: bytes) -> bytes:
    return _commit(ops=head(4, len(ops)) + b"".join(ops))


def _with_car(car: bytes) -> bytes:
    return _commit(blocks=head(2, len(car)) + car)


def _shapes() -> Iterator[tuple[str, bytes]]:
    good = _good().data
    header = frame_header("commit")
    yield "empty message", b""
    yield "header alone", header
    yield "payload alone", good[len(header) :]
    yield "header twice", header + header
    yield "three objects", good + b"\xa0"
    yield "trailing zero", good + b"\x00"
    yield "trailing break", good + b"\xff"
    yield "two messages in one", good + good
    yield "text", b"hello"
    yield "JSON", b'{"op":1,"t":"#commit"}{"seq":1}'
    yield "zeros", bytes(4_096)
    yield "ones", b"\xff" * 4_096
    yield "a map that claims 2^63 members", header + b"\xbb\x7f" + b"\xff" * 7
    yield "an array that claims 2^32 items", header + b"\x9a\xff\xff\xff\xff"
    yield "bytes that claim 2^63", header + b"\x5b\x7f" + b"\xff" * 7
    yield "text that claims 2^63", header + b"\x7b\x7f" + b"\xff" * 7
    for depth in (40, 1_000, 100_000):
        yield f"payload of {depth} nested arrays", header + b"\x81" * depth + b"\x80"
        yield f"payload of {depth} nested maps", header + b"\xa1aa" * depth + b"\xa0"
    yield "5 MB of bytes", _commit(novel=head(2, 5_300_000) + bytes(5_300_000))
    yield "5 MB of a name", header + b"\xa1" + text("x" * 5_300_000) + b"\x01"
    for name, item in _VALUES.items():
        yield f"payload is {name}", header + item


_VALUES = {
    "null": b"\xf6",
    "true": b"\xf5",
    "undefined": b"\xf7",
    "zero": b"\x00",
    "one": b"\x01",
    "minus one": b"\x20",
    "2^64-1": b"\x1b" + b"\xff" * 8,
    "-2^64": b"\x3b" + b"\xff" * 8,
    "a float": b"\xfb\x3f\xf8" + bytes(6),
    "NaN": b"\xfb\x7f\xf8" + bytes(6),
    "a half float": b"\xf9\x3e\x00",
    "empty text": b"\x60",
    "a text": text("text"),
    "a text with NUL": text("a\0b"),
    "a lone surrogate": text("\ud800"),
    "text that is not UTF-8": b"\x62\xc3\x28",
    "a long text": text("x" * 100_000),
    "empty bytes": b"\x40",
    "bytes": head(2, 5) + b"bytes",
    "bytes like a CID": head(2, 36) + DAG_CBOR + bytes(32),
    "a link": link(DAG_CBOR + bytes(32)),
    "a short link": link(DAG_CBOR),
    "an empty link": b"\xd8\x2a\x40",
    "a link without its prefix": b"\xd8\x2a" + head(2, 36) + DAG_CBOR + bytes(32),
    "a link that is text": b"\xd8\x2a" + text("bafy"),
    "a date tag": b"\xc1\x1a\x68\x00\x00\x00",
    "an empty array": b"\x80",
    "an array of null": b"\x81\xf6",
    "an endless array": b"\x9f\x01\xff",
    "an empty map": b"\xa0",
    "a map": b"\xa1aa\x01",
    "an endless map": b"\xbfaa\x01\xff",
    "a map with a number as key": b"\xa1\x01\x02",
    "a map with a key twice": b"\xa2aa\x01aa\x02",
    "a map out of order": b"\xa2ab\x01aa\x02",
    "a number in long form": b"\x18\x01",
    "a reserved argument": b"\x1c",
    "a break": b"\xff",
}


def _headers() -> Iterator[tuple[str, bytes]]:
    body = _good().data[len(frame_header("commit")) :]
    for name, item in _VALUES.items():
        yield f"header is {name}", item + body
        if name != "one":
            yield f"op is {name}", b"\xa2at" + text("#commit") + b"bop" + item + body
        yield f"t is {name}", b"\xa2at" + item + b"bop\x01" + body
    yield "header without op", b"\xa1at" + text("#commit") + body
    yield "header without t", b"\xa1bop\x01" + body
    yield "header with more", b"\xa3at" + text("#commit") + b"bop\x01cnew\x01" + body
    for kind in ("commits", "Commit", "labels", "", "handle", "migrate", "tombstone", "x" * 10_000):
        yield f"kind #{kind[:20]}", frame_header(kind) + body
    yield "kind without #", b"\xa2at" + text("commit") + b"bop\x01" + body


def _payloads() -> Iterator[tuple[str, bytes]]:
    names = ("ops", "rev", "seq", "repo", "time", "blobs", "since", "blocks", "commit", "rebase", "tooBig", "prevData")
    for member in names:
        yield f"commit without {member}", _commit(**{member: _NOTHING})
        for name, item in _VALUES.items():
            yield f"{member} is {name}", _commit(**{member: item})
    for seq in (0, 2**53 - 1, 2**53, 2**63, 2**64 - 1):
        yield f"seq {seq}", _commit(seq=head(0, seq))
    for did in (
        "did:",
        "did:plc:",
        "did:plc:x y",
        "DID:plc:abc",
        "at://" + DID,
        "did:plc:" + "a" * 3_000,
        "did:web:é",
        "x",
    ):
        yield f"repo {did[:24]}", _commit(repo=text(did))
    for rev in ("", "3mptbypluud2", "3mptbypluud2aa", "0000000000000", "zzzzzzzzzzzzz", tid(2**53), "3MPTBYPLUUD2A"):
        yield f"rev {rev!r}", _commit(rev=text(rev))
    for time in ("", "yesterday", "0000-01-01T00:00:00Z", "2026-07-04T14:38:07+99:00", "2026-07-04T14:38:07.517Z" * 50):
        yield f"time {time[:24]!r}", _commit(time=text(time))
    yield "tooBig", _commit(tooBig=b"\xf5", blocks=b"\x40", ops=b"\x80")
    yield "rebase", _commit(rebase=b"\xf5")
    yield "a member nobody knows", _commit(novelty=b"\xa1aa\x01")


def _ops() -> Iterator[tuple[str, bytes]]:
    likes = _like_blocks()
    first, last = (op_bytes("create", path, cid, None) for path, cid, _ in (likes[0], likes[2]))
    path, cid, _ = likes[1]
    yield "no ops", _with_ops()
    yield "201 ops", _with_ops(*[op_bytes("delete", f"app.bsky.feed.like/{tid(n)}", None, None) for n in range(201)])
    yield "5000 ops", _with_ops(*[op_bytes("delete", f"app.bsky.feed.like/{tid(n)}", None, None) for n in range(5_000)])
    yield "one op three times", _with_ops(first, first, first)
    for name, item in _VALUES.items():
        yield f"an op is {name}", _with_ops(first, item, last)
        for member in ("cid", "path", "action"):
            parts = {"cid": link(cid), "path": text(path), "action": text("create")} | {member: item}
            op = b"\xa3" + b"".join(text(key) + value for key, value in parts.items())
            yield f"{member} of an op is {name}", _with_ops(first, op, last)
    for member in ("cid", "path", "action"):
        parts = {"cid": link(cid), "path": text(path), "action": text("create")}
        del parts[member]
        op = b"\xa2" + b"".join(text(key) + value for key, value in parts.items())
        yield f"an op without {member}", _with_ops(first, op, last)
    for action in ("upsert", "", "CREATE", "delete ", "x" * 1_000):
        yield f"action {action[:12]!r}", _with_ops(first, op_bytes(action, path, cid, None), last)
    for odd in _PATHS:
        yield f"path {odd[:40]!r}", _with_ops(first, op_bytes("create", odd, cid, None), last)
        yield f"delete of path {odd[:40]!r}", _with_ops(first, op_bytes("delete", odd, None, cid), last)
    yield "create without a CID", _with_ops(first, op_bytes("create", path, None, None), last)
    yield "delete with a CID", _with_ops(first, op_bytes("delete", path, cid, cid), last)
    for name, odd_cid in {
        "raw": RAW + cid[4:],
        "identity": b"\x01\x71\x00\x04abcd",
        "sha-512": b"\x01\x71\x13\x40" + bytes(64),
        "version 0": b"\x12\x20" + cid[4:],
        "version 2": b"\x02" + cid[1:],
        "cut": cid[:-1],
        "long": cid + b"\x00",
        "empty": b"",
    }.items():
        op = b"\xa3ccid" + link(odd_cid) + b"dpath" + text(path) + b"faction" + text("create")
        yield f"an op with a {name} CID", _with_ops(first, op, last)


_PATHS = (
    "", "/", "//", "app.bsky.feed.like", "app.bsky.feed.like/", "/3k1", "app.bsky.feed.like/a/b",
    "app.bsky.feed.like/.",
    "app.bsky.feed.like/..", "app.bsky.feed.like/has space", "app.bsky.feed.like/é", "app.bsky.feed.like/a\0b",
    "app.bsky.feed.like/" + "r" * 513, "nodots/3k1", "a.b/3k1", "app..like/3k1", ".bsky.feed/3k1", "9app.bsky.feed/3k1",
    "app.bsky.feed.like\0/3k1", "app.bsky.feed." + "x" * 400 + "/3k1", "at://x/app.bsky.feed.like/3k1", "\ud800/3k1",
    "../../../etc/passwd", "app.bsky.feed.like/3k1?x", "app.bsky.feed.like/%00", "app.bsky.feed.like/3k1#x",
)  # fmt: skip


def _cars() -> Iterator[tuple[str, bytes]]:
    likes = _like_blocks()
    commit = commit_block(DID, _TICK.rev, mst.seal(mst.EMPTY))
    root = cid_of(commit)
    blocks = {root: commit} | {cid: data for _, cid, data in likes}
    car = car_bytes(root, blocks)
    header_size = 1 + car[0]
    rest = car[header_size:]
    middle = likes[1][1]
    yield "empty CAR", _with_car(b"")
    yield "CAR without blocks", _with_car(car[:header_size])
    yield "CAR without its header", _with_car(rest)
    yield "CAR of noise", _with_car(random.Random(5).randbytes(500))
    for step in range(1, 33):
        at = len(car) * step // 33
        yield f"CAR cut at {at}", _with_car(car[:at])
    for name, start in {
        "version 2": car[: header_size - 1] + b"\x02",
        "no roots": b"\x11\xa2eroots\x80gversion\x01",
        "two roots": b"\x63\xa2eroots\x82" + link(root) * 2 + b"gversion\x01",
        "null": b"\x01\xf6",
        "zero length": b"\x00",
        "a length of 2^63": varint(2**63),
        "a length beyond the end": varint(1_000_000) + car[1:header_size],
        "a length of eleven bytes": b"\x80" * 10 + b"\x01",
        "a root that is another": car[:header_size].replace(root, middle),
    }.items():
        yield f"CAR header: {name}", _with_car(start + rest)
    for name, section in {
        "zero length": b"\x00",
        "shorter than a CID": b"\x05abcde",
        "length beyond the end": varint(10_000_000) + middle,
        "length of 2^63": varint(2**63) + middle,
        "overlong varint": b"\x80" * 12 + b"\x00",
        "unfinished varint": b"\xff",
        "CID of version 0": varint(34 + 2) + b"\x12\x20" + middle[4:] + b"\xa1\xa1",
        "CID of version 9": varint(38) + b"\x09" + middle[1:] + b"\xa1\xa1",
        "CID with a digest of 2^40 bytes": varint(20) + b"\x01\x71\x12" + varint(2**40) + bytes(11),
        "identity CID": varint(9) + b"\x01\x71\x00\x03abcxy",
        "a stray block": varint(36 + 3) + DAG_CBOR + bytes(32) + b"abc",
    }.items():
        yield f"CAR section first: {name}", _with_car(car[:header_size] + section + rest)
        yield f"CAR section last: {name}", _with_car(car + section)
    yield "a block is missing", _with_car(car_bytes(root, {c: b for c, b in blocks.items() if c != middle}))
    yield "every record is missing", _with_car(car_bytes(root, {root: commit}))
    yield "the commit block is missing", _with_car(car_bytes(root, {c: b for c, b in blocks.items() if c != root}))
    yield "a block has another's bytes", _with_car(car_bytes(root, blocks | {middle: likes[0][2]}))
    yield "a block has one bit flipped", _with_car(car_bytes(root, blocks | {middle: _flip(likes[1][2], 77)}))
    yield "a block is empty", _with_car(car_bytes(root, blocks | {middle: b""}))
    one = varint(36 + len(likes[1][2])) + middle
    yield "a block twice, wrong first", _with_car(car[:header_size] + one + bytes(len(likes[1][2])) + rest)
    yield "a block twice, wrong last", _with_car(car + one + bytes(len(likes[1][2])))
    yield "blocks in reverse", _with_car(car_bytes(root, dict(reversed(blocks.items()))))
    yield "10,000 stray blocks", _with_car(car + (varint(37) + DAG_CBOR + bytes(32) + b"\xa0") * 10_000)
    yield "blocks beyond 2 MB", _with_car(car + varint(36 + 2_100_000) + DAG_CBOR + bytes(32) + bytes(2_100_000))


def _flip(data: bytes, bit: int) -> bytes:
    at = bit // 8
    return data[:at] + bytes((data[at] ^ 1 << bit % 8,)) + data[at + 1 :]


def _records() -> Iterator[tuple[str, bytes]]:
    """The middle record is another block, under its true CID."""
    good = good_likes()[1][2]
    for name, item in _VALUES.items():
        yield f"record is {name}", _with_record(item)
        for member in ("subject", "createdAt", "$type", "via"):
            yield f"{member} of a record is {name}", _with_record(_record(good, member, item))
        yield f"extra member of a record is {name}", _with_record(_record(good, "extra", item))
        subject = _record(good["subject"], "uri", item)
        yield f"uri of a subject is {name}", _with_record(_record(good, "subject", subject))
    block = encode(good)
    for at in range(0, len(block), 12):
        yield f"record cut at {at}", _with_record(block[:at])
    yield "record with a tail", _with_record(block + b"\x00")
    for depth in (31, 33, 200, 5_000, 60_000):
        yield f"record {depth} arrays deep", _with_record(_record(good, "extra", b"\x81" * depth + b"\x80"))
        yield f"record {depth} maps deep", _with_record(_record(good, "extra", b"\xa1aa" * depth + b"\xa0"))
    yield "record of 1 MB", _with_record(_record(good, "extra", text("x" * 1_050_000)))
    yield "record with 140,000 items", _with_record(_record(good, "extra", head(4, 140_000) + b"\x00" * 140_000))
    yield "record with a 9 KB key", _with_record(_record(good, "k" * 9_000, b"\x01"))
    yield "record with a NUL key", _with_record(_record(good, "a\0b", b"\x01"))


def _record(record: dict[str, Any], member: str, item: bytes) -> bytes:
    """The map with one member replaced or added, in canonical order."""
    parts = {text(key): encode(value) for key, value in record.items()} | {text(member): item}
    return head(5, len(parts)) + b"".join(key + parts[key] for key in sorted(parts))


def _with_record(block: bytes) -> bytes:
    likes = _like_blocks()
    path, _, _ = likes[1]
    likes[1] = (path, cid_of(block), block)
    commit = commit_block(DID, _TICK.rev, mst.seal(mst.EMPTY))
    root = cid_of(commit)
    car = car_bytes(root, {root: commit} | {cid: data for _, cid, data in likes})
    ops = [op_bytes("create", path, cid, None) for path, cid, _ in likes]
    return commit_frame(_TICK, DID, since=None, commit=root, car=car, ops=ops, prev_data=root)


def _other_kinds() -> Iterator[tuple[str, bytes]]:
    good = {
        "identity": identity_frame(_TICK, DID, "some.test").data,
        "account": account_frame(_TICK, DID, active=False, status="takendown").data,
        "sync": Repo(DID, Clock()).sync().data,
        "info": info_frame("OutdatedCursor", "message").data,
    }
    members = {
        "identity": ("did", "seq", "time", "handle"),
        "account": ("did", "seq", "time", "active", "status"),
        "sync": ("did", "rev", "seq", "time", "blocks"),
        "info": ("name", "message"),
    }
    values = {
        "did": text(DID), "seq": head(0, _TICK.seq), "time": text(_TICK.time), "handle": text("some.test"),
        "active": b"\xf5", "status": text("takendown"), "rev": text(_TICK.rev), "blocks": b"\x40", "name": text("Name"),
        "message": text("message"),
    }  # fmt: skip
    for kind, names in members.items():
        for cut in range(1, 8):
            at = len(good[kind]) * cut // 8
            yield f"{kind} cut at {at}", good[kind][:at]
        for member in names:
            for value_name, item in [("missing", None), *_VALUES.items()]:
                parts = {name: item if name == member else values[name] for name in names}
                kept = {name: value for name, value in parts.items() if value is not None}
                body = head(5, len(kept)) + b"".join(text(name) + value for name, value in kept.items())
                yield f"{member} of {kind} is {value_name}", frame_header(kind) + body
    for handle in ("", "handle.invalid", "UPPER.Test", DID, "no-dots", "a" * 300 + ".test", "a\0b.test", "é.test"):
        yield f"handle {handle[:20]!r}", identity_frame(_TICK, DID, handle).data
    for status in ("", "novel", "x" * 5_000, "a\0b"):
        yield f"status {status[:20]!r}", account_frame(_TICK, DID, active=True, status=status).data
    yield "unknown error", error_frame("SomethingElse", "message")
    yield "error without message", error_frame("ConsumerTooSlow")
    yield "error with a kind", b"\xa2at" + text("#info") + b"bop\x20" + encode({"error": "ConsumerTooSlow"})
    for name, item in _VALUES.items():
        yield f"error is {name}", b"\xa1bop\x20\xa1" + text("error") + item
        yield f"error payload is {name}", b"\xa1bop\x20" + item


def _damage(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    good = _good().data
    for step in range(1, 60):
        at = len(good) * step // 60
        yield f"cut at {at}", good[:at]
    for bit in sorted({int(rng.random() * len(good) * 8) for _ in range(200)}):
        yield f"bit {bit} flipped", _flip(good, bit)
    for _ in range(60):
        at, size = int(rng.random() * len(good)), 1 + int(rng.random() * 40)
        yield f"{size} bytes gone at {at}", good[:at] + good[at + size :]
        noise = rng.getrandbits(8 * size).to_bytes(size, "big")
        yield f"{size} bytes of noise at {at}", good[:at] + noise + good[at + size :]

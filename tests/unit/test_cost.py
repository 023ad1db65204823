"""What a record costs grows no faster than its bytes, whatever is in it: one post must not hold up everybody's.

The search: each member of each lexicon that is mapped, and the objects in it, filled with each hostile value, in both
forms, through what the reader and the worker do with a record. Twice the bytes may cost twice the time. Most cases cost
too little to measure, so a long one is tried first; only what takes longer than any linear case is measured in earnest.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import libipld
import pytest

from fastworker.errors import InvalidEvent
from fastworker.event import Commit, Op
from fastworker.event import record as event_record
from fastworker.event.cbor import Link
from fastworker.event.entry import decode_entry, encode_json
from fastworker.event.frame import decode_frame
from fastworker.process.board import Heartbeats
from fastworker.simulator.repo import Repo
from fastworker.table import derive
from fastworker.table.batch import Limits
from fastworker.table.dates import parse_date
from fastworker.table.derive import Effects
from fastworker.table.mapper import map_commit
from fastworker.worker import pipeline, turn
from fastworker.worker.limits import DeadLetterLimit

REPO = "did:plc:" + "a" * 24
POST = f"at://{REPO}/app.bsky.feed.post/3kabcdefghij2"
CID = "bafyreidrm3k6s3p3x7lq5nxzseavd76snd2eppqhmjs7ie2w2iih5sg4ka"
ENTRY_MS = 1_767_225_600_000
SMALL = 3_000  # bytes of a value, about; the square of four times that is a quarter of a second
TIMES = 4
CHEAP_S = 0.05  # nothing linear takes so long for 12 kB, on any machine that could run the tests
GROWTH_MAX = 2.5 * TIMES  # quadratic is 16

TEXTS: dict[str, Callable[[int], str]] = {
    "letters": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "date-spaces": lambda n: "2024-01-01" + " " * n + "x",
    "date-spaces-2": lambda n: " " * (n // 2) + "2024-01-01T00:00:00" + " " * (n // 2) + "x",
    "date-digits": lambda n: "2024-01-01T00:00:00." + "1" * n + "x",
    "digits": lambda n: "1" * n,
    "did-colons": lambda n: "did:plc:" + ":" * n,
    "did-percents": lambda n: "did:plc:" + "%" * n,
    "uri": lambda n: f"at://{REPO}/" + "/" * n + "\0",
    "uri-of-colons": lambda n: "at://did:plc:" + ":" * n + "/ ",
    "post-uri": lambda n: POST + "/" * n,
    "handle": lambda n: "a." * (n // 2) + "-",
    "hex": lambda n: "01711220" + "0" * n,
    "nul": lambda n: "\0" * n,
    "nuls": lambda n: "a\0" * (n // 2),
    "surrogates": lambda n: "\ud800" * (n // 3),
    "url": lambda n: "https://" + "a" * n + "\0",
    "base32": lambda n: "b" + "a" * n + "\0",
    "type": lambda n: "app.bsky.embed.record" * (n // 21),
}


def _deep(n: int, levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return [value] * (n // (levels + 1))


def _numbered(n: int, width: int) -> list[bytes]:
    return [number.to_bytes(width, "big") for number in range(n // (width + 1))]


def _links(n: int) -> list[bytes]:
    return [b"\x01\x71\x12\x20" + number.to_bytes(32, "big") for number in range(n // 41)]


VALUES: dict[str, Callable[[int], Any]] = {
    **TEXTS,
    "bytes": lambda n: _numbered(n, 3),
    "long-bytes": lambda n: [b"x" * n],
    "links": _links,
    "links-as-bytes": lambda n: [*(Link(link) for link in _links(n // 2)), *_links(n // 2)],
    "empty-arrays": lambda n: [[]] * n,
    "deep": lambda n: _deep(n // 3, 60),
    "keys": lambda n: {f"k{number}": 0 for number in range(n // 8)},
    "dirty-keys": lambda n: {f"k\0{number}": "\0" for number in range(n // 10)},
    "numbers": lambda n: list(range(n // 3)),
    "nulls": lambda n: [None] * n,
    "one-object": lambda n: {"$type": "app.bsky.embed.recordWithMedia", "media": {"$type": "x", "y": "z" * n}},
    "images": lambda n: {"$type": "app.bsky.embed.images", "images": [{"image": "b", "alt": ""}] * (n // 18)},
    "bad-images": lambda n: {"$type": "app.bsky.embed.images", "images": [{"image": "\0"}] * (n // 18)},
    "facets": lambda n: [
        {"features": [{"$type": "app.bsky.richtext.facet#mention", "did": f"did:plc:{number}"}]}
        for number in range(n // 70)
    ],
    "features": lambda n: [
        {"features": [{"$type": "app.bsky.richtext.facet#mention", "did": f"did:plc: {m}"} for m in range(n // 60)]}
    ],
    "uris": lambda n: [f"{POST}{number}\0" for number in range(n // 80)],
    "rules": lambda n: [{"$type": "app.bsky.feed.threadgate#listRule", "list": POST}] * (n // 120),
    "feeds": lambda n: [{"uri": POST}] * (n // 80),
    "typed": lambda n: [{"py_type": "app.bsky.feed.post", "created_at": None, "x_y": 1}] * (n // 40),
}

MEMBERS = {
    "app.bsky.feed.post": "text createdAt langs embed facets tags reply labels $type",
    "app.bsky.feed.like": "subject createdAt via",
    "app.bsky.graph.follow": "subject createdAt",
    "app.bsky.bookmark": "subject createdAt",
    "app.bsky.graph.list": "name purpose description avatar createdAt",
    "app.bsky.graph.listitem": "list subject createdAt",
    "app.bsky.graph.listblock": "subject createdAt",
    "app.bsky.feed.generator": "did displayName description avatar createdAt",
    "app.bsky.graph.starterpack": "name description list feeds createdAt",
    "app.bsky.labeler.service": "policies createdAt",
    "com.atproto.label.label": "src uri did val neg cts",
    "app.bsky.graph.verification": "subject handle verifiedAt createdAt",
    "app.bsky.feed.threadgate": "post allow hiddenReplies createdAt",
    "app.bsky.feed.postgate": "post embeddingRules detachedEmbeddingUris createdAt",
    "app.bsky.actor.profile": "displayName description avatar banner pinnedPost createdAt",
    "com.example.thing": "createdAt any",
}
# Where the mapper reads inside a member; each gets the value too.
INSIDE: dict[tuple[str, str], list[Callable[[Any], Any]]] = {
    ("app.bsky.feed.post", "reply"): [lambda v: {"parent": {"uri": v, "cid": v}, "root": {"uri": v}}],
    ("app.bsky.feed.post", "embed"): [
        lambda v: {"$type": "app.bsky.embed.record", "record": {"uri": v, "cid": v}},
        lambda v: {
            "$type": "app.bsky.embed.recordWithMedia",
            "record": {"record": {"uri": POST, "cid": v}},
            "media": {"$type": "app.bsky.embed.images", "images": [{"image": {"ref": v}}]},
        },
        lambda v: {"$type": "app.bsky.embed.external", "external": {"uri": v, "thumb": {"ref": v}}},
        lambda v: {"$type": "app.bsky.embed.video", "video": {"ref": v}, "thumbnail": {"cid": v}},
        lambda v: {"$type": "app.bsky.embed.images", "images": v},
    ],
    ("app.bsky.feed.post", "facets"): [
        lambda v: [{"features": [{"$type": "app.bsky.richtext.facet#mention", "did": v}]}],
        lambda v: [{"features": [{"$type": "app.bsky.richtext.facet#link", "uri": v}]}],
        lambda v: [{"features": v}],
    ],
    ("app.bsky.feed.like", "subject"): [lambda v: {"uri": v, "cid": CID}, lambda v: {"uri": POST, "cid": v}],
    ("app.bsky.feed.like", "via"): [lambda v: {"uri": v, "cid": v}],
    ("app.bsky.bookmark", "subject"): [lambda v: {"uri": v}],
    ("app.bsky.graph.starterpack", "feeds"): [lambda v: [{"uri": v}]],
    ("app.bsky.labeler.service", "policies"): [lambda v: {"labelValues": v}],
    ("app.bsky.feed.threadgate", "allow"): [lambda v: [{"$type": "app.bsky.feed.threadgate#listRule", "list": v}]],
    ("app.bsky.actor.profile", "pinnedPost"): [lambda v: {"uri": POST, "cid": v}],
    ("app.bsky.actor.profile", "avatar"): [lambda v: {"$type": "blob", "ref": v}],
}
WHOLE: dict[str, dict[str, Any]] = {  # what a record needs, to get as far as its other members
    "app.bsky.feed.like": {"subject": {"uri": POST, "cid": CID}},
    "app.bsky.graph.follow": {"subject": REPO},
    "app.bsky.bookmark": {"subject": {"uri": POST}},
    "app.bsky.graph.list": {"name": "n", "purpose": "p"},
    "app.bsky.graph.listitem": {"list": f"at://{REPO}/app.bsky.graph.list/l", "subject": REPO},
    "app.bsky.graph.listblock": {"subject": POST},
    "app.bsky.feed.generator": {"did": REPO, "displayName": "n"},
    "app.bsky.graph.starterpack": {"name": "n"},
    "com.atproto.label.label": {"uri": POST, "val": "v"},
    "app.bsky.graph.verification": {"subject": REPO, "handle": "a.test"},
}
SLOTS = [
    (collection, member, inside)
    for collection, members in MEMBERS.items()
    for member in members.split()
    for inside in [lambda v: v, *INSIDE.get((collection, member), ())]
]


def _work(op: Op) -> None:
    """What becomes of an op: rows and what derives from them in the worker, JSON in the reader."""
    commit = Commit(7, REPO, "3kabcdefghij2", None, [op], [])
    mapped = map_commit(commit, ENTRY_MS)
    effects = Effects(derive.FULL)
    for change in mapped.changes:
        derive.added(effects, change.table, change.row, change.cid)  # type: ignore[arg-type]
        if change.table.name == "fastworker.gates":
            (derive.thread_gate_row if change.row[1] == "thread" else derive.post_gate_row)(change.row)  # type: ignore[index,arg-type]
    if op.block is not None:
        encode_json(commit)


def _op(slot: tuple[str, str, Callable[[Any], Any]], value: Any, form: str) -> Op:
    collection, member, inside = slot
    record = {"$type": collection, **WHOLE.get(collection, {}), member: inside(value)}
    rkey = "self" if collection in ("app.bsky.actor.profile", "app.bsky.labeler.service") else "3kabcdefghij2"
    if form == "cbor":
        return Op("create", collection, rkey, CID, _cbor(record))
    return Op("create", collection, rkey, CID, None, _lexicon_json(record))


def _lexicon_json(value: Any) -> Any:
    if type(value) is dict:
        return {key: _lexicon_json(inner) for key, inner in value.items()}
    if type(value) is list:
        return [_lexicon_json(inner) for inner in value]
    return {"$bytes": value.hex()} if isinstance(value, bytes) else value


def _cbor(value: Any) -> bytes:
    """DAG-CBOR that may hold what no encoder writes: lone surrogates, and links as such."""
    if type(value) is dict:
        return _head(5, len(value)) + b"".join(_cbor(key) + _cbor(value[key]) for key in value)
    if type(value) is list:
        return _head(4, len(value)) + b"".join(map(_cbor, value))
    if type(value) is str:
        text = value.encode("utf-8", "surrogatepass")
        return _head(3, len(text)) + text
    if type(value) is Link:
        return b"\xd8\x2a" + _head(2, len(value) + 1) + b"\0" + value
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    return libipld.encode_dag_cbor(value)


def _head(major: int, size: int) -> bytes:
    return bytes((major << 5 | 26,)) + size.to_bytes(4, "big") if size > 23 else bytes((major << 5 | size,))


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """What it costs is a matter of everything else that lives in this process."""
    gc.disable()
    yield
    gc.enable()


def _seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def assert_linear(make: Callable[[int], Callable[[], object]], small: int = SMALL) -> None:
    """`make(n)`: work on about n bytes."""
    large = make(TIMES * small)
    if _seconds(large) < CHEAP_S:
        return
    costs = []
    for work in (make(small), large):
        work()
        costs.append(min(_seconds(work) for _ in range(3)))
    assert costs[1] < max(GROWTH_MAX * costs[0], CHEAP_S), (
        f"{TIMES} times the bytes cost {costs[1] / costs[0]:.1f} times"
    )


def _work_in(slot: tuple[str, str, Any], name: str, form: str, n: int) -> Callable[[], object]:
    return partial(_work, _op(slot, VALUES[name](n), form))


@pytest.mark.parametrize("form", ["cbor", "json"])
@pytest.mark.parametrize("name", VALUES)
def test_no_member_of_a_record_costs_more_than_its_bytes(name: str, form: str, pytestconfig: pytest.Config) -> None:
    """Without --extended each value in each member in one of the two forms."""
    turn = (list(VALUES).index(name) + ["cbor", "json"].index(form)) % 2
    for slot in SLOTS if pytestconfig.getoption("--extended") else SLOTS[turn::2]:
        assert_linear(partial(_work_in, slot, name, form))


@pytest.mark.parametrize("name", TEXTS)
def test_a_date_costs_no_more_than_its_characters(name: str) -> None:
    assert_linear(lambda n: partial(parse_date, TEXTS[name](n)), 100_000)


@pytest.mark.parametrize("name", VALUES)
def test_no_json_entry_costs_more_than_its_bytes(name: str) -> None:
    def entry(n: int) -> dict[bytes, bytes]:
        value = _lexicon_json(VALUES[name](n))
        op = {
            "action": "create",
            "path": "com.example.thing/self",
            "cid": value,
            "record": {"py_type": "x", "a": value},
        }
        data = {
            "repo": REPO,
            "rev": value,
            "time": value,
            "ops": [op, {"action": value, "path": value}],
            "drops": value,
        }
        return {b"type": b"commit", b"data": json.dumps(data).encode(), b"seq": b"7"}

    assert_linear(lambda n: partial(decode_entry, entry(n)))


# A search for what nobody thought of: texts of any prefix, unit and end, in values in values, in any field of any event.
TOKENS = [
    *" \t\n0127aZTtz:+-.,/%#?&=@_~!$*'()[]{}<>\\\"\0b",
    *(
        "\ud800",
        "é",
        "ı",
        "😀",
        "\u200b",
        "\u2028",
        "a.",
        "a-",
        "0:",
        ":0",
        "--",
        "://",
        "../",
        "%2",
        "did:plc:",
        "did:web:",
        "at://",
    ),
    *(
        "https://",
        "2024-01-01",
        "T00:00:00",
        ".000",
        "+00:00",
        "0000-",
        "Jan ",
        "bafy",
        "b2",
        "01711220",
        "app.bsky.",
        '{"a":',
        "[[",
    ),
]
WRAPS: list[Callable[[Any], Any]] = [
    lambda v: [v],
    lambda v: [v, v],
    lambda v: [[v]] * 3,
    lambda v: {"a": v},
    lambda v: {"$type": "app.bsky.embed.record", "record": v},
    lambda v: {"$type": "blob", "ref": v, "mimeType": v, "size": v},
    lambda v: {"$link": v},
    lambda v: {"$bytes": v},
    lambda v: {"uri": v, "cid": v},
    lambda v: {"py_type": "x", "created_at": v, "some_key": v},
    lambda v: {"images": [{"image": v, "alt": v}]},
    lambda v: {"features": [{"$type": "app.bsky.richtext.facet#mention", "did": v}]},
]
FIELDS = {
    "commit": ("repo", "rev", "time", "ops", "drops", "relay", "action", "path", "cid", "record", "blobs", "since"),
    "identity": ("did", "handle", "time", "relay", "drops"),
    "account": ("did", "active", "status", "time", "relay"),
}


def _text_of(r: random.Random) -> Callable[[int], str]:
    before, unit, after = ("".join(r.choices(TOKENS, k=r.randint(low, 3))) for low in (0, 1, 0))
    return lambda n: before + unit * (n // len(unit.encode("utf-8", "surrogatepass"))) + after


def _value_of(r: random.Random) -> Callable[[int], Any]:
    value: Callable[[int], Any]
    if r.random() < 0.6:
        text = _text_of(r)
        value = text if r.random() < 0.7 else (lambda n: [text(40)] * (n // 40))
    else:
        value = VALUES[r.choice(list(VALUES))]
    for wrap in r.choices(WRAPS, k=r.choice((0, 0, 1, 2, 4))):
        value = partial(lambda inner, wrap, n: wrap(inner(n)), value, wrap)
    return value


def _entry_of(kind: str, field: str, value: Any) -> dict[bytes, bytes]:
    op = {"action": "create", "path": "app.bsky.feed.post/3kabcdefghij2", "cid": CID, "record": {"text": ""}}
    data: dict[str, Any] = {"repo": REPO, "rev": "3kabcdefghij2", "time": "2026-01-01T00:00:00Z", "ops": [op]}
    if kind != "commit":
        data = {"did": REPO, "time": "2026-01-01T00:00:00Z", "active": True}
    (op if kind == "commit" and field in op else data)[field] = value
    return {b"type": kind.encode(), b"data": json.dumps(data).encode(), b"seq": b"7"}


def _take_entry(fields: dict[bytes, bytes]) -> None:
    with contextlib.suppress(InvalidEvent):
        event = decode_entry(fields)
        if isinstance(event, Commit):
            map_commit(event, ENTRY_MS)
            encode_json(event)


def _trial(r: random.Random) -> tuple[str, Callable[[int], Callable[[], object]]]:
    """One guess: its name, to be found again, and how it is made of about n bytes."""
    value = _value_of(r)
    if r.random() < 0.6:
        slot, form = r.choice(SLOTS), r.choice(("cbor", "json"))
        name = f"{slot[0]} {slot[1]} as {form}"
        return name, lambda n: partial(_work, _op(slot, value(n), form))
    kind = r.choice(list(FIELDS))
    field = r.choice(FIELDS[kind])
    return f"{kind} {field}", lambda n: partial(_take_entry, _entry_of(kind, field, _lexicon_json(value(n))))


def search(first: int, seconds: float) -> int:
    """How many guesses there was time for. The seed in the message makes the same one again."""
    until, seed = time.monotonic() + seconds, first
    while time.monotonic() < until:
        r = random.Random(seed)
        name, make = _trial(r)
        try:
            assert_linear(make, r.choice((SMALL, 10 * SMALL)))
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}, {value_words(make)}: {error!r}") from error
        seed += 1
    return seed - first


def value_words(make: Callable[[int], Callable[[], object]]) -> str:
    return repr(getattr(make(60), "args", ""))[:400]


def test_a_search_for_what_costs_more_than_its_bytes() -> None:
    assert search(0, 1.0) > 0


@pytest.mark.extended
@pytest.mark.timeout(7_200)
def test_ten_minutes_of_searching_for_cost() -> None:
    count = search(int(time.time() * 1000), float(os.environ.get("FUZZ_SECONDS", "600")))
    sys.stdout.write(f"{count:,} guesses\n")
    assert count > 50


def test_few_searches_of_a_block_for_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: how often the block is searched through does not depend on how many byte strings it has."""
    made: list[bytes] = []

    def searched(content: bytes) -> bytes:
        made.append(content)
        return b"\0nowhere"

    monkeypatch.setattr(event_record, "_byte_string", searched)
    for count in (100, 10_000):
        made.clear()
        op = Op("create", "com.example.thing", "self", CID, _cbor({"a": _numbered(4 * count, 3)}))
        event_record.json_text(event_record.load_record(op), op)
        assert len(made) <= 2 * event_record.SEARCHES_MAX


def test_no_block_is_hashed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred ops that name one large block, whose bytes are not even those that its CID names."""
    hashed: list[int] = []
    frame = Repo(REPO).commit(
        [
            ("create", f"com.example.thing/{number}", {"$type": "com.example.thing", "a": "a" * 20_000})
            for number in range(100)
        ]
    )

    def judged(verdict: bool, _: object, block: bytes) -> bool:
        hashed.append(len(block))
        return verdict

    for verdict in (True, False):
        hashed.clear()
        monkeypatch.setattr("fastworker.event.frame.is_block_of", partial(judged, verdict))
        decode_frame(frame.data)
        assert 0 < sum(hashed) <= 2_000_000
        assert verdict or len(hashed) == 1


async def test_the_loop_has_its_turn_after_a_heavy_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, not by the number of entries: here each one takes longer than a turn."""
    monkeypatch.setattr(turn, "TURN_S", 0.0)
    data = json.dumps({"repo": REPO, "ops": []}).encode()
    entries = [(f"1-{number}", {b"type": b"commit", b"data": data, b"seq": b"7"}) for number in range(20)]
    slot = Heartbeats(1)[0]
    no: Any = None
    one = pipeline.Pipeline(no, Mock(), no, slot, limits=Limits(), dead_letters=DeadLetterLimit())
    turns = 0

    async def beat() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beating = asyncio.create_task(beat())
    await one._take(entries)
    beating.cancel()
    assert turns >= len(entries)


def test_a_deep_record_is_refused_or_linear() -> None:
    def make(n: int) -> Callable[[], object]:
        block = b"\x81" * n + b"\x80"

        def work() -> None:
            with pytest.raises(InvalidEvent):
                event_record.load_record(Op("create", "a.b.c", "d", CID, block))

        return work

    assert_linear(make, 100_000)

"""Small adversarial histories: few accounts, few records, everything collides.

A history is what happened (events in firehose order) and how a consumer group handed it out (batches: any
order, any entry more than once). A crash before the transaction is an entry that comes later; a crash between
the transaction and the ack is an entry that comes again.

`histories()` is a Hypothesis strategy that shrinks to few events in one batch; `random_history` makes long ones.
Hypothesis is a development dependency: only `histories()` needs it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Event = dict[str, Any]
Record = dict[str, Any]

FIRST_SEQ = 1_000
BEGIN = datetime(2026, 1, 1)  # noqa: DTZ001 - UTC, as every time here

DIDS = (
    "did:plc:" + "a" * 24,
    "did:plc:" + "b" * 24,
    "did:plc:" + "c" * 24,
    "did:web:d.example",
)
STRANGER = "did:plc:" + "z" * 24  # never acts
RKEYS = ("3kaaaaaaaaa22", "3kbbbbbbbbb22", "3kccccccccc22")
HANDLES = ("alice.test", "Bob.Test", "handle.invalid", None)
ACCOUNTS = (
    (True, None),
    (False, "deleted"),
    (False, "deleted"),
    (False, "takendown"),
    (False, "deactivated"),
    (False, None),
    (False, "a-status-of-tomorrow"),
)
CLAIMS = {
    3: "2099-01-01T00:00:00.000Z",
    6: "0001-01-01T00:00:00Z",
    9: "2025-12-20T00:00:00Z",
    11: "-000001-12-31T00:00:00Z",
}
DATES = (
    "2026-01-01T00:00:00.000Z",
    "2025-12-31T23:59:59.123456Z",
    "2025-06-01T09:00:00+09:00",
    "2025-06-01",
    "2099-01-01T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "1969-07-20T20:17:40Z",
    "yesterday",
)
ODD: tuple[Any, ...] = (
    None,
    True,
    7,
    1.5,
    2**63,
    "",
    "n\x00ul",
    f"at://{DIDS[1]}/app.bsky.feed.post/{RKEYS[0]}\x00",
    f"at://{DIDS[1]} /app.bsky.feed.post/{RKEYS[0]}",
    "\x00" + DIDS[1],
    "\ud800half",
    "\u00e9" * 600,
    [],
    [None],
    {},
    {"a\x00": "\x00"},
)
ONE_EACH = {"app.bsky.actor.profile", "app.bsky.actor.status", "app.bsky.labeler.service"}  # their rkey is `self`
WEIGHTS = {
    "app.bsky.feed.post": 8,
    "app.bsky.feed.like": 8,
    "app.bsky.feed.repost": 3,
    "app.bsky.bookmark": 2,
    "app.bsky.graph.follow": 3,
    "app.bsky.graph.block": 1,
    "app.bsky.graph.list": 1,
    "app.bsky.graph.listitem": 2,
    "app.bsky.graph.listblock": 1,
    "app.bsky.feed.generator": 2,
    "app.bsky.graph.starterpack": 1,
    "app.bsky.labeler.service": 1,
    "com.atproto.label.label": 2,
    "app.bsky.graph.verification": 3,
    "app.bsky.feed.threadgate": 2,
    "app.bsky.feed.postgate": 2,
    "app.bsky.actor.profile": 2,
    "app.bsky.actor.status": 1,
    "com.example.thing": 2,
}
COLLECTIONS = tuple(collection for collection, weight in WEIGHTS.items() for _ in range(weight))


@dataclass(frozen=True, slots=True)
class History:
    """`batches` are positions in `events`; each occurs at least once. The repr is Python that makes it again."""

    events: list[Event]
    batches: list[list[int]]

    def deliveries(self) -> list[list[Event]]:
        return [[self.events[position] for position in batch] for batch in self.batches]


def entry_ms(event: Event) -> int:
    """The milliseconds of the stream id under which the history's event is delivered, every time the same."""
    return 1_767_225_600_500 + 1_000 * int(event["place"] if "place" in event else event["seq"])


def to_entry(event: Event) -> dict[bytes, bytes]:
    """The stream entry that a reader writes for the event: JSON, lexicon form, fields in the contract's order."""
    members = {
        "commit": ("repo", "ops", "rev", "time"),
        "identity": ("did", "handle", "time"),
        "account": ("did", "active", "status", "time"),
    }[event["kind"]]
    data = {name: event[name] for name in members if name == "handle" or event[name] is not None}
    if "relay" in event:
        data["relay"] = event["relay"]
    if "ops" in data:  # a delete has no cid
        data["ops"] = [{name: op[name] for name in op if name != "cid" or op[name]} for op in data["ops"]]
    return {
        b"type": event["kind"].encode(),
        b"data": json.dumps(data, separators=(",", ":")).encode(),
        b"seq": str(event["seq"]).encode(),
    }


def to_recording(event: Event) -> dict[bytes, bytes]:
    """As `to_entry`, for a real stream, whose ids are of today: it says when the history's event was received."""
    return {**to_entry(event), b"at": b"%d" % entry_ms(event)}


def histories(max_events: int = 12, *, bare: bool = True) -> SearchStrategy[History]:
    """Histories as a Hypothesis strategy. `bare`: some commits have neither rev nor time (the predecessor's form).

    Most are about a few accounts and collections only: what happens to one record or pair matters more than variety.
    """
    from hypothesis import strategies as st

    few = st.lists(st.sampled_from(sorted(WEIGHTS)), min_size=1, max_size=3, unique=True)

    @st.composite
    def history(draw: st.DrawFn) -> History:
        collections = draw(st.one_of(few, st.just(COLLECTIONS)))
        dids = DIDS[: draw(st.integers(1, len(DIDS)))]
        authors = st.builds(Author, st.randoms(use_true_random=False), st.just(dids), collections=st.just(collections))
        steps = st.lists(authors.map(Author.step), min_size=1, max_size=max_events)
        is_failover = draw(st.integers(0, 3)) == 3  # no commit is bare then: with two relays it would be set aside
        events = number(draw(steps), bare=bare and not is_failover)
        if is_failover:
            at = draw(st.integers(0, len(events)))
            events = fail_over(events, at, draw(st.integers(0, min(at, 3))))
        positions = range(len(events))
        order = list(draw(st.permutations(positions)))
        for again in draw(st.lists(st.sampled_from(positions), max_size=4)):
            order.insert(draw(st.integers(0, len(order))), again)
        ends = sorted(draw(st.sets(st.integers(1, len(order) - 1), max_size=5))) if len(order) > 1 else []
        return History(events, _cut(order, ends))

    return history()


def random_history(seed: int, count: int, *, bare: bool = True) -> History:
    """A long history: `count` events, a tenth of them delivered twice, none more than about 200 places too late."""
    random = Random(seed)
    dids = [f"did:plc:{tid(n).lower():a>24}" for n in range(max(4, count // 500))]
    author = Author(random, dids, [tid(n) for n in range(8)])
    events = number([author.step() for _ in range(count)], bare=bare)
    twice = [random.randrange(count) for _ in range(count // 10)]
    order = sorted([*range(count), *twice], key=lambda position: position + random.randrange(200))
    ends = sorted({random.randrange(1, len(order)) for _ in range(len(order) // 300)}) if len(order) > 1 else []
    return History(events, _cut(order, ends))


def _cut(order: list[int], ends: list[int]) -> list[list[int]]:
    return [order[a:b] for a, b in zip([0, *ends], [*ends, len(order)], strict=True)]


def number(steps: list[Event], *, bare: bool) -> list[Event]:
    """Give the events their place on the firehose: seq, rev, time."""
    events = []
    for position, event in enumerate(steps):
        seq = FIRST_SEQ + position
        numbered = {"kind": event["kind"], "seq": seq, **event}
        numbered["time"] = (BEGIN + timedelta(seconds=seq)).isoformat(timespec="milliseconds") + "Z"
        if event["kind"] == "commit":
            is_bare = numbered.pop("bare") and bare
            numbered["rev"] = None if is_bare else tid(seq)
            numbered["time"] = None if is_bare else numbered["time"]
        if numbered["time"] is not None:  # a claim of the host, whose clock may be wrong
            numbered["time"] = CLAIMS.get(seq % 13, numbered["time"])
        events.append(numbered)
    return events


def fail_over(events: list[Event], at: int, again: int = 0) -> list[Event]:
    """The same events, but from position `at` on by another relay whose numbers are lower. That one also tells the
    `again` events before it, under numbers of its own."""
    told = []
    for position, event in enumerate(events):
        time = BEGIN + timedelta(seconds=event["seq"])
        moved = {**event, "place": event["seq"], "time": time.isoformat(timespec="milliseconds") + "Z"}
        if event["kind"] == "commit":
            moved["rev"] = tid((time - datetime(1970, 1, 1)) // timedelta(microseconds=1) << 10)  # noqa: DTZ001
        if position < at:
            told.append({**moved, "relay": "a.test", "seq": event["seq"] + 30_000})
        if position >= at - again:
            told.append({**moved, "relay": "b.test", "seq": event["seq"] - FIRST_SEQ + 1})
    return told


class Author:
    """Writes what the clients of these accounts could write, good and bad, all over each other."""

    def __init__(
        self,
        random: Random,
        dids: Sequence[str] = DIDS,
        rkeys: Sequence[str] = RKEYS,
        collections: Sequence[str] = COLLECTIONS,
    ) -> None:
        self.random = random
        self.dids = dids
        self.rkeys = rkeys
        self.collections = collections

    def step(self) -> Event:
        """One event without its place: mostly a commit of one op."""
        did = self.random.choice(self.dids)
        match self.random.randrange(16):
            case 0:
                return {"kind": "identity", "did": did, "handle": self.random.choice(HANDLES)}
            case 1:
                active, status = self.random.choice(ACCOUNTS)
                return {"kind": "account", "did": did, "active": active, "status": status}
            case 2:
                count = self.random.randrange(5)  # none at all is a commit too
            case _:
                count = 1
        return {
            "kind": "commit",
            "repo": did,
            "bare": not self.random.randrange(8),
            "ops": [self.op(did) for _ in range(count)],
        }

    def op(self, repo: str) -> Record:
        collection = self.random.choice(self.collections)
        action = self.random.choice(("create", "create", "create", "update", "delete"))
        rkey = self.random.choice(self.rkeys)
        if collection in ONE_EACH and self.random.randrange(8):
            rkey = "self"
        op = {"action": action, "path": f"{collection}/{rkey}", "cid": None}
        if action == "delete":
            return op
        record = {
            "$type": collection,
            "createdAt": self.random.choice(DATES),
            **self.record_of(collection, repo, rkey),
        }
        if not self.random.randrange(6):
            spoilt = self.random.choice(sorted(record))
            record[spoilt] = self.random.choice(ODD)
        if not self.random.randrange(10):
            del record[self.random.choice(sorted(record))]
        return {**op, "cid": cid_of(record), "record": record}

    def _uri(self, collection: str) -> str:
        rkey = "self" if collection == "app.bsky.labeler.service" else self.random.choice(self.rkeys)
        return f"at://{self.random.choice(self.dids)}/{collection}/{rkey}"

    def _ref(self, collection: str = "app.bsky.feed.post") -> Record:
        uri = self._uri(collection)
        return {"uri": uri, "cid": cid_of(uri)}

    def _blob(self) -> Any:
        cid = cid_of(self.random.randrange(3))
        return self.random.choice(
            (
                {"$type": "blob", "ref": {"$link": cid}, "mimeType": "image/jpeg", "size": 1},
                {"cid": cid, "mimeType": "image/jpeg"},
                {"$type": "blob", "mimeType": "image/jpeg", "size": 1},
            )
        )

    def _media(self) -> Record:
        match self.random.randrange(4):
            case 0:
                images = [{"alt": "", "image": self._blob()} for _ in range(self.random.randrange(3))]
                return {"$type": "app.bsky.embed.images", "images": images}
            case 1:
                external = {"uri": "https://x.example", "title": "", "description": "", "thumb": self._blob()}
                return {"$type": "app.bsky.embed.external", "external": external}
            case 2:
                return {"$type": "app.bsky.embed.video", "video": self._blob(), "thumbnail": self._blob()}
            case _:
                return {"$type": "com.example.embed", "value": 1}

    def _embed(self) -> Record:
        collection = self.random.choice(("app.bsky.feed.post", "app.bsky.feed.post", "app.bsky.feed.generator"))
        match self.random.randrange(3):
            case 0:
                return {"$type": "app.bsky.embed.record", "record": self._ref(collection)}
            case 1:
                record = {"$type": "app.bsky.embed.record", "record": self._ref(collection)}
                return {"$type": "app.bsky.embed.recordWithMedia", "record": record, "media": self._media()}
            case _:
                return self._media()

    def _post(self) -> Record:
        record: Record = {"text": self.random.choice(("hi", "", "n\x00ul", "\U0001f600"))}
        if self.random.randrange(2):
            record["reply"] = {"root": self._ref(), "parent": self._ref()}
        if self.random.randrange(2):
            record["embed"] = self._embed()
        if not self.random.randrange(3):
            mentioned = [
                self.random.choice((*self.dids, "did:", f"{DIDS[1]}\x00")) for _ in range(self.random.randrange(3))
            ]
            features = [{"$type": "app.bsky.richtext.facet#mention", "did": did} for did in mentioned]
            record["facets"] = [{"index": {"byteStart": 0, "byteEnd": 1}, "features": features}]
        if not self.random.randrange(3):
            record |= {"langs": ["en"], "tags": ["one", "t\x00wo"]}
        return record

    def _allow(self) -> Record:
        rules = (
            {"$type": "app.bsky.feed.threadgate#mentionRule"},
            {"$type": "app.bsky.feed.threadgate#followingRule"},
            {"$type": "app.bsky.feed.threadgate#followerRule"},
            {"$type": "app.bsky.feed.threadgate#listRule", "list": self._uri("app.bsky.graph.list")},
        )
        return (
            {"allow": [self.random.choice(rules) for _ in range(self.random.randrange(3))]}
            if self.random.randrange(3)
            else {}
        )

    def _gated(self, repo: str, rkey: str) -> str:
        return f"at://{repo}/app.bsky.feed.post/{rkey}" if self.random.randrange(6) else self._uri("app.bsky.feed.post")

    def record_of(self, collection: str, repo: str, rkey: str) -> Record:
        match collection:
            case "app.bsky.feed.post":
                return self._post()
            case "app.bsky.feed.like":
                subject = self.random.choice(
                    (*["app.bsky.feed.post"] * 4, "app.bsky.feed.generator", "app.bsky.labeler.service")
                )
                via = {} if self.random.randrange(4) else {"via": self._ref("app.bsky.feed.repost")}
                return {"subject": self._ref(subject), **via}
            case "app.bsky.feed.repost" | "app.bsky.bookmark":
                return {"subject": self._ref()}
            case "app.bsky.graph.follow" | "app.bsky.graph.block":
                return {"subject": self.random.choice((*self.dids, STRANGER))}
            case "app.bsky.graph.list":
                name = "L" * self.random.choice((1, 300))
                return {"name": name, "purpose": "app.bsky.graph.defs#modlist", "avatar": self._blob()}
            case "app.bsky.graph.listitem":
                owner = repo if self.random.randrange(4) else self.random.choice(self.dids)
                return {
                    "list": f"at://{owner}/app.bsky.graph.list/{self.random.choice(self.rkeys)}",
                    "subject": self.random.choice(self.dids),
                }
            case "app.bsky.graph.listblock":
                return {"subject": self._uri("app.bsky.graph.list")}
            case "app.bsky.feed.generator":
                described = {"description": "what\x00", "avatar": self._blob()}
                return {"did": "did:web:feeds.example", "displayName": "Feed", **described}
            case "app.bsky.graph.starterpack":
                feeds = [{"uri": self._uri("app.bsky.feed.generator")} for _ in range(self.random.randrange(3))]
                return {
                    "name": "Pack",
                    "list": self._uri("app.bsky.graph.list"),
                    "feeds": self.random.choice((feeds, None)),
                }
            case "app.bsky.labeler.service":
                return {"policies": {"labelValues": ["spam"]}}
            case "com.atproto.label.label":
                subject = self.random.choice((self._uri("app.bsky.feed.post"), self.random.choice(self.dids)))
                neg = {"neg": True} if self.random.randrange(2) else {}
                return {
                    "src": self.random.choice(self.dids),
                    "uri": subject,
                    "val": "spam",
                    "cts": self.random.choice(DATES),
                    **neg,
                }
            case "app.bsky.graph.verification":
                return {"subject": self.random.choice(self.dids[:2]), "handle": "Alice.Test", "displayName": "Alice"}
            case "app.bsky.feed.threadgate":
                return {"post": self._gated(repo, rkey), **self._allow()}
            case "app.bsky.feed.postgate":
                rules = (
                    {"embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}]}
                    if self.random.randrange(2)
                    else {}
                )
                detached = (
                    {"detachedEmbeddingUris": [self._uri("app.bsky.feed.post")]} if self.random.randrange(2) else {}
                )
                return {"post": self._gated(repo, rkey), **rules, **detached}
            case "app.bsky.actor.profile":
                name = "A" * self.random.choice((1, 300))
                pinned = {"pinnedPost": self._ref()} if self.random.randrange(2) else {}
                return {"displayName": name, "avatar": self._blob(), "banner": self._blob(), **pinned}
            case _:
                return {"deep": {"\x00key": [1, 1.0, 2**63, {"$link": cid_of(1)}, {"$bytes": "AQI"}]}}


def cid_of(value: Any) -> str:
    """A well-formed CID that differs where the value does (of its JSON, not of its DAG-CBOR)."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return "b" + base64.b32encode(b"\x01\x71\x12\x20" + digest).decode().lower().rstrip("=")


def tid(position: int) -> str:
    """A timestamp identifier (13 characters, sorts as it counts)."""
    alphabet = "234567abcdefghijklmnopqrstuvwxyz"
    return "".join(alphabet[position >> shift & 31] for shift in range(60, -1, -5))

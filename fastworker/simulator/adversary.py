"""Traffic that looks for trouble: few accounts, few posts, so that everything collides with everything."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastworker.simulator.production import GATES, SELF
from fastworker.simulator.records import Person, Post, Record, Records, Ref, name_cid
from fastworker.simulator.repo import (
    START_TIME,
    Block,
    Lost,
    Repo,
    SimFrame,
    Write,
    account_frame,
    identity_frame,
    info_frame,
    tid,
    unknown_frame,
)
from fastworker.simulator.world import Account, World

T = TypeVar("T")

ADVERSARIAL: Mapping[str, float] = {
    # moves: shares of steps
    "create": 30,
    "update": 8,  # another record at a live path
    "update_unseen": 2,  # ... at a path that was there before anyone listened
    "delete": 12,
    "delete_unseen": 3,
    "delete_again": 2,  # of what is not there
    "recreate": 5,  # at a path that was deleted
    "twin": 8,  # a second record for one pair (like, follow, list item ...)
    "delete_twin": 4,
    "relike": 2,  # delete, then the same again at another path, in two commits
    "churn": 4,  # several ops on one path in one commit
    "multiple": 4,  # up to 20 ops in one commit
    "huge": 0.2,  # 200 ops in one commit
    "empty": 1,  # a commit without ops
    "bad_path": 0.5,
    "bad_action": 0.3,
    "lost": 0.7,  # the block of an op is missing, or is not what its CID says
    "bad_block": 0.7,  # the block of an op is not a record
    "duplicate": 4,  # a frame again, byte by byte
    "identity": 4,
    "account": 3,
    "sync": 1,
    "info": 0.5,
    "unknown": 0.5,
    # chances, in percent of the records made
    "odd": 12,
    "surrogate": 0.3,  # lone surrogates: invalid UTF-8 on the wire
}
"""What happens how often. Any of it can be given to `Network(weights=...)`; 0 switches it off."""

_CHANCES = frozenset(("odd", "surrogate"))

COLLECTIONS: Mapping[str, float] = {
    "app.bsky.feed.post": 24,
    "app.bsky.feed.like": 22,
    "app.bsky.feed.repost": 9,
    "app.bsky.graph.follow": 8,
    "app.bsky.graph.block": 4,
    "app.bsky.bookmark": 3,
    "app.bsky.graph.list": 3,
    "app.bsky.graph.listitem": 5,
    "app.bsky.graph.listblock": 2,
    "app.bsky.feed.generator": 2,
    "app.bsky.graph.starterpack": 2,
    "app.bsky.labeler.service": 1,
    "com.atproto.label.label": 2,
    "app.bsky.graph.verification": 3,
    "app.bsky.feed.threadgate": 4,
    "app.bsky.feed.postgate": 3,
    "app.bsky.actor.profile": 3,
    "app.bsky.actor.status": 1,
    "chat.bsky.actor.declaration": 1,
    "app.bsky.graph.starterPack": 0.5,  # seen in the wild: a name that is almost right
    "xyz.example.thing": 1,
}

PAIRED = frozenset(
    (
        "app.bsky.feed.like",
        "app.bsky.feed.repost",
        "app.bsky.graph.follow",
        "app.bsky.graph.block",
        "app.bsky.bookmark",
        "app.bsky.graph.listitem",
        "app.bsky.graph.listblock",
        "app.bsky.graph.verification",
    )
)

_START_US = int(START_TIME.timestamp() * 1_000_000)
_SLOTS = tuple(tid(_START_US - 86_400_000_000 * (day + 1), 3) for day in range(8))
_NAMES = ("feed-a", "feed-b")

ODD_DATES: tuple[Any, ...] = (
    "0000-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z", "-000001-01-01T00:00:00.000Z", "9999-12-31T23:59:59.999Z",
    "10000-01-01T00:00:00Z", "+275760-09-13T00:00:00.000Z", "1969-12-31T23:59:59.999Z", "1970-01-01T00:00:00Z",
    "2026-07-04T23:38:07+09:00", "2026-07-04T06:38:07.5-08:00", "2026-07-04T14:38:07.123456789Z",
    "2030-01-01T00:00:00Z",
    "2026-02-30T00:00:00Z", "2026-07-04", "2026-07-04T14:38:07", "2026-07-04 14:38:07Z", "2026-07-04T14:38Z",
    "2026-07-04T24:00:00Z", "2026-06-30T23:59:60Z", "20260704T143807Z", "2026-07-04T14:38:07+25:00", "not a date", "",
    "2026-07-04T14:38:07.517z", "Sat, 04 Jul 2026 14:38:07 GMT", None, 1_783_175_887, {"$date": 1},
    "2026-07-04T14:38:07Z\0",
)  # fmt: skip
ODD_TEXTS = (
    "a\0b", "\0", "\u202ertl", "e\u0301" * 100, "👩‍👩‍👧‍👦" * 40, "\ufeff", "\\u0000", "'; drop table posts; --",
    "\u2028\x85",
    "\x7f\x01\x1b[31m", "x" * 3_000, "%s {} $1 \\N \t\n", "\\", '"', "😀" * 300, "",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e300, 2**53, 2**63 - 1, -(2**63), 2**64 - 1, "", "x", [], [1], {}, [None], [[[[]]]],
    {"$type": 3}, {"$link": name_cid("odd")}, {"$bytes": "AAEC"}, {"$bytes": "AXESIA" + "A" * 42}, ["\0"],
    {"a\0b": "\0c"},
    {"": {"": ""}}, {"uri": 1, "cid": 2}, {"uri": "at://did:plc:x/a/b"}, "at://did:plc:ewvi7nxzyoun6zhxrhs64oiz",
)  # fmt: skip
ODD_URIS = (
    "at://alice.test/app.bsky.feed.post/3k1", "https://example.com/", "at://", "at://did:plc:x", "", "did:plc:x",
    "at://did:plc:ewvi7nxzyoun6zhxrhs64oiz/app.bsky.feed.post", "at://did:web:example.com/app.bsky.feed.post/3k1",
    "at://did:plc:ewvi7nxzyoun6zhxrhs64oiz/app.bsky.feed.post/" + "r" * 500, "at://did:plc:ewvi7nxzyoun6zhxrhs64oiz/\0",
)  # fmt: skip
ODD_PATHS = (
    "", "/", "app.bsky.feed.like", "app.bsky.feed.like/", "/3k1", "app.bsky.feed.like/a/b", "app.bsky.feed.like/..",
    "app.bsky.feed.post/has space", "app.bsky.feed.post/é", "nodots/3k1", "app.bsky.feed.post/" + "r" * 513,
    "app.bsky.actor.profile/not-self", "app.bsky.feed.post/" + "r" * 500, "app..feed.post/3k1",
    "9pp.bsky.feed.post/3k1",
)  # fmt: skip
NOT_NUMBERS = (b"\xa1aa\xf9\x7e\x00", b"\xa1aa\xfb\x7f\xf8\0\0\0\0\0\0")
BAD_BLOCKS = (
    b"", b"\xff", b"\xa1", b"\x80", b"\x01", b"\xf6", b"\x63abc", b"\xa1\x01\x02", b"\xbf\xff", *NOT_NUMBERS,
    b"\xa1aa\xc1\x00", b"\xa2ab\x01aa\x02\xff", b"\xa0\xa0",
    b"\x81" * 5_000 + b"\x80",
)  # fmt: skip
_STATUSES: tuple[tuple[bool, str | None], ...] = (
    (True, None), (True, None), (True, None), (False, "takendown"), (False, "suspended"), (False, "deactivated"),
    (False, "deleted"), (True, "desynchronized"), (True, "throttled"), (False, "unheard-of"), (False, None),
)  # fmt: skip


class Adversary:
    """`step()` makes the frames of one thing that happens. It is the `Targets` of its own records."""

    def __init__(self, world: World, weights: Mapping[str, float]) -> None:
        unknown = set(weights) - set(ADVERSARIAL)
        if unknown:
            raise ValueError(f"no such weight: {', '.join(sorted(unknown))}")
        weights = {**ADVERSARIAL, **weights}
        self._world = world
        self._random = world.rng.random
        self._records = Records(world.rng, world.clock, self)
        self._odd, self._surrogate = weights["odd"] / 100, weights["surrogate"] / 100
        self._collections = _table(COLLECTIONS)
        self._writes: dict[str, Callable[[Account], list[Write]]] = {
            "create": lambda account: [self._create(account)],
            "update": self._update,
            "update_unseen": self._update_unseen,
            "delete": self._delete,
            "delete_unseen": self._delete_unseen,
            "delete_again": lambda _: [("delete", self._path(self._collection()), None)],
            "recreate": self._recreate,
            "twin": self._twin,
            "churn": self._churn,
            "multiple": lambda account: self._several(account, 2 + int(self._random() * 19)),
            "huge": lambda account: self._several(account, 200),
            "empty": lambda _: [],
            "bad_path": self._bad_path,
            "bad_action": self._bad_action,
            "lost": self._lost,
            "bad_block": self._bad_block,
        }
        self._frames: dict[str, Callable[[Account], list[SimFrame]]] = {
            "delete_twin": self._delete_twin,
            "relike": self._relike,
            "duplicate": self._duplicate,
            "identity": self._identity,
            "account": self._account,
            "sync": lambda account: [account.repo.sync()],
            "info": lambda _: [info_frame("OutdatedCursor", "nothing to worry about")],
            "unknown": lambda _: [unknown_frame(world.clock.tick())],
        }
        self._moves = _table({move: weight for move, weight in weights.items() if move not in _CHANCES})
        self._pairs: deque[tuple[Account, str, Record]] = deque(maxlen=100)
        self._deleted: deque[tuple[Account, str]] = deque(maxlen=100)
        self._recent: deque[SimFrame] = deque(maxlen=60)

    def step(self) -> list[SimFrame]:
        move = self._pick(self._moves)
        account = self._someone()
        if move in self._frames:
            frames = self._frames[move](account)
        else:
            frames = [self._commit(account, self._writes[move](account))]
        self._recent.extend(frames)
        return frames

    # Moves that are one commit

    def _create(self, account: Account) -> Write:
        return self._write("create", account, self._new_path())

    def _update(self, account: Account) -> list[Write]:
        if not account.live:
            return [self._create(account)]
        return [self._write("update", account, self._pick(account.live))]

    def _update_unseen(self, account: Account) -> list[Write]:
        path = account.take_unseen()
        return [self._write("update", account, path) if path else self._create(account)]

    def _delete(self, account: Account) -> list[Write]:
        return [("delete", self._pick(account.live), None) if account.live else self._create(account)]

    def _delete_unseen(self, account: Account) -> list[Write]:
        path = account.take_unseen()
        return [("delete", path, None) if path else self._create(account)]

    def _recreate(self, account: Account) -> list[Write]:
        mine = [path for owner, path in self._deleted if owner is account]
        return [self._write("create", account, self._pick(mine)) if mine else self._create(account)]

    def _twin(self, account: Account) -> list[Write]:
        mine = [(path, record) for owner, path, record in self._pairs if owner is account]
        if not mine:
            return [self._create(account)]
        path, record = self._pick(mine)
        return [("create", self._path(path.split("/")[0]), {**record, "createdAt": self._world.clock.iso()})]

    def _churn(self, account: Account) -> list[Write]:
        path = self._new_path()
        actions = self._pick(
            (
                ("create", "delete"),
                ("create", "update"),
                ("create", "update", "delete"),
                ("delete", "create"),
                ("create", "delete", "create"),
                ("update", "update"),
            )
        )
        return [self._write(action, account, path) for action in actions]

    def _several(self, account: Account, count: int) -> list[Write]:
        moves = (self._update, self._delete, self._twin, self._churn)
        writes: list[Write] = []
        while len(writes) < count:
            writes += [self._create(account)] if self._random() < 0.7 else self._pick(moves)(account)
        return writes[:count]

    def _bad_path(self, account: Account) -> list[Write]:
        return [self._write("create", account, self._pick(ODD_PATHS)), self._create(account)]

    def _bad_action(self, account: Account) -> list[Write]:
        return [self._write("upsert", account, self._new_path()), self._create(account)]

    def _lost(self, account: Account) -> list[Write]:
        _, path, record = self._create(account)
        instead = None if self._random() < 0.5 else b"\xa1dthisdthat"
        return [("create", path, Lost(record, instead)), self._create(account)]

    def _bad_block(self, account: Account) -> list[Write]:
        block = self._pick(BAD_BLOCKS)
        value = {"a": None} if block in NOT_NUMBERS else None  # read leniently: what is no number becomes null
        return [("create", self._new_path(), Block(block, value)), self._create(account)]

    # Moves that are frames

    def _delete_twin(self, account: Account) -> list[SimFrame]:
        if not self._pairs:
            return [self._commit(account, [self._create(account)])]
        owner, path, _ = self._pick(self._pairs)
        return [self._commit(owner, [("delete", path, None)])]

    def _relike(self, account: Account) -> list[SimFrame]:
        mine = [(path, record) for owner, path, record in self._pairs if owner is account]
        if not mine:
            return [self._commit(account, [self._create(account)])]
        path, record = self._pick(mine)
        again = self._path(path.split("/")[0])
        return [
            self._commit(account, [("delete", path, None)]),
            self._commit(account, [("create", again, {**record, "createdAt": self._world.clock.iso()})]),
        ]

    def _duplicate(self, account: Account) -> list[SimFrame]:
        return [self._pick(self._recent)] if self._recent else [account.repo.sync()]

    def _identity(self, account: Account) -> list[SimFrame]:
        other = self.person()
        handle = self._pick(
            (account.handle, account.handle.upper(), other.handle, f"new.{account.handle}", "handle.invalid", None)
        )
        return [identity_frame(self._world.clock.tick(), account.did, handle)]

    def _account(self, account: Account) -> list[SimFrame]:
        active, status = self._pick(_STATUSES)
        did = account.did if self._random() < 0.95 else self.person().did
        frames = [account_frame(self._world.clock.tick(), did, active=active, status=status)]
        if status == "deleted" and did == account.did:  # whoever comes back begins with an empty repository
            account.repo = Repo(did, self._world.clock, key=account.key)
            account.live.clear()
            account.unseen_left = 0
            if self._random() < 0.5:
                frames.append(account_frame(self._world.clock.tick(), did, active=True))
                frames.append(account.repo.sync())
        return frames

    # What moves are made of

    def _commit(self, account: Account, writes: list[Write]) -> SimFrame:
        frame = account.repo.commit(writes)
        for action, path, record in writes:
            if action == "delete":
                if path in account.live:
                    account.live.remove(path)
                    self._deleted.append((account, path))
                continue
            if path not in account.live:
                account.live.append(path)
            if path.split("/")[0] in PAIRED and isinstance(record, dict):
                self._pairs.append((account, path, record))
        return frame

    def _write(self, action: str, account: Account, path: str) -> Write:
        if action == "delete":
            return (action, path, None)
        collection, _, rkey = path.partition("/")
        record = self._records.make(collection, account.did, rkey)
        if collection in GATES and self._random() < 0.1:
            record["post"] = self.post().this.uri
        if self._random() < self._odd:
            self._mutate(record)
        if self._random() < self._surrogate:
            record["text" if collection == "app.bsky.feed.post" else "note"] = "half \ud83d of a pair"
        return (action, path, record)

    def _mutate(self, record: Record) -> None:
        """One thing about the record is not as it should be."""
        members = [member for member in record if member != "$type"]
        roll = self._random()
        if roll < 0.25:
            record["cts" if "cts" in record else "createdAt"] = self._pick(ODD_DATES)
        elif roll < 0.45:
            texts = [m for m in members if isinstance(record[m], str) and m not in {"createdAt", "cts"}]
            record[self._pick(texts or ["note"])] = self._pick(ODD_TEXTS)
        elif roll < 0.6:
            record[self._pick(members)] = self._pick(ODD_VALUES)
        elif roll < 0.7:
            inner = [record[m] for m in members if isinstance(record[m], dict)]
            target: Record = self._pick(inner) if inner else record
            target[self._pick(list(target) or ["x"])] = self._pick(ODD_VALUES)
        elif roll < 0.77:
            del record[self._pick(members)]
        elif roll < 0.84:
            subject = record.get("subject")
            if isinstance(subject, dict):
                subject["uri"] = self._pick(ODD_URIS)
            else:
                record[self._pick([m for m in ("list", "subject", "post", "uri", "src") if m in record] or ["uri"])] = (
                    self._pick(ODD_URIS)
                )
        elif roll < 0.9:
            record["$type"] = self._pick((self._collection(), None, 7, "", "app.bsky.feed.post#main"))
        elif roll < 0.92:
            record.pop("$type")
        elif roll < 0.96:
            record["extra"] = self._pick(ODD_VALUES)
        elif "text" in record:
            feature = "app.bsky.richtext.facet#mention"
            record["facets"] = [
                {
                    "index": {"byteStart": 0, "byteEnd": 1},
                    "features": [{"$type": feature, "did": self._world.person(number).did}],
                }
                for number in range(120)
            ]
        else:
            nested: Any = "deep"
            for _ in range(28):
                nested = {"in": nested} if self._random() < 0.5 else [nested]
            record["extra"] = nested

    def _collection(self) -> str:
        return self._pick(self._collections)

    def _new_path(self) -> str:
        return self._path(self._collection())

    def _path(self, collection: str) -> str:
        """Mostly one of a few: of posts, that others already speak of."""
        if collection in SELF:
            return f"{collection}/self"
        if collection == "app.bsky.feed.generator":
            return f"{collection}/{self._pick(_NAMES)}"
        if collection == "app.bsky.graph.list":
            return f"{collection}/{_SLOTS[int(self._random() * 2)]}"
        roll = self._random()
        if roll < 0.75 or (roll < 0.95 and collection in GATES):
            return f"{collection}/{self._pick(_SLOTS)}"
        if roll < 0.97:
            return f"{collection}/{self._world.clock.tid()}"
        return f"{collection}/{self._pick(('a:b~c.d_e-f', 'r' * 200, 'x', '~', '3jzfcijpj2z2a'))}"

    def _someone(self) -> Account:
        return self._world.account(int(self._random() * self._world.accounts_max))

    def _pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random() * len(choices))]

    # Targets

    def person(self) -> Person:
        strangers = 2 if self._random() < 0.05 else 0
        return self._world.person(int(self._random() * self._world.accounts_max) + strangers * self._world.accounts_max)

    def post(self) -> Post:
        this = self._post()
        return Post(this, this if self._random() < 0.4 else self._post())

    def like_subject(self) -> Ref:
        roll = self._random()
        if roll < 0.88:
            return self._post()
        did = self._someone().did
        if roll < 0.93:
            return _ref(f"at://{did}/app.bsky.feed.generator/{self._pick(_NAMES)}")
        if roll < 0.97:
            return _ref(f"at://{did}/app.bsky.labeler.service/self")
        return _ref(self.list_uri(""))

    def via(self) -> Ref:
        return _ref(f"at://{self._someone().did}/app.bsky.feed.repost/{self._pick(_SLOTS)}")

    def list_uri(self, owner: str) -> str:
        """Mostly the owner's, whether it exists or not."""
        did = owner if owner and self._random() < 0.85 else self._someone().did
        return f"at://{did}/app.bsky.graph.list/{_SLOTS[int(self._random() * 2)]}"

    def feed_uri(self) -> str:
        return f"at://{self._someone().did}/app.bsky.feed.generator/{self._pick(_NAMES)}"

    def _post(self) -> Ref:
        return _ref(f"at://{self._someone().did}/app.bsky.feed.post/{self._pick(_SLOTS)}")


def _ref(uri: str) -> Ref:
    return Ref(uri, name_cid(uri))


def _table(weights: Mapping[str, float]) -> list[str]:
    return [name for name, weight in weights.items() for _ in range(round(10 * weight))]

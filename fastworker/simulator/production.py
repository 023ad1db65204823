"""Traffic as the relay's: shares, sizes and skew of the measured network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastworker.simulator.records import Person, Post, Records, Ref, name_cid
from fastworker.simulator.repo import START_TIME, SimFrame, Write, account_frame, identity_frame, tid
from fastworker.simulator.world import Account, World

T = TypeVar("T")

PRODUCTION: Mapping[str, float] = {
    "app.bsky.feed.like": 66.0,
    "app.bsky.feed.post": 12.0,
    "app.bsky.feed.repost": 10.0,
    "app.bsky.graph.follow": 7.0,
    "app.bsky.graph.block": 1.0,
    "app.bsky.graph.listitem": 0.8,
    "app.bsky.actor.profile": 0.5,
    "app.bsky.feed.threadgate": 0.4,
    "fm.teal.alpha.actor.status": 0.4,
    "app.bsky.actor.status": 0.2,
    "app.bsky.feed.postgate": 0.2,
    "site.standard.document": 0.2,
    "app.bsky.graph.listblock": 0.1,
    "app.bsky.graph.list": 0.1,
    "sh.tangled.feed.star": 0.1,
    "app.bsky.graph.starterpack": 0.05,
    "app.bsky.graph.verification": 0.05,
    "app.bsky.feed.generator": 0.03,
    "app.bsky.labeler.service": 0.01,
}
"""Shares of creates: 2026, from the captured frames."""

SURGE: Mapping[str, float] = {
    **PRODUCTION,
    "app.bsky.feed.like": 47.3,
    "app.bsky.graph.follow": 33.3,
    "app.bsky.feed.post": 9.4,
    "app.bsky.feed.repost": 5.9,
    "app.bsky.graph.block": 1.6,
    "app.bsky.actor.profile": 0.81,
    "app.bsky.graph.listitem": 0.78,
}
"""The follow wave of November and December 2024."""

SELF = frozenset(
    ("app.bsky.actor.profile", "app.bsky.actor.status", "fm.teal.alpha.actor.status", "app.bsky.labeler.service")
)
"""Collections whose only rkey is `self`."""
GATES = frozenset(("app.bsky.feed.threadgate", "app.bsky.feed.postgate"))
CHANGEABLE = SELF | GATES | {"app.bsky.graph.list", "app.bsky.feed.generator", "app.bsky.graph.starterpack"}
"""Collections whose records clients replace."""

_DELETES, _UPDATES, _IDENTITIES, _ACCOUNTS, _MULTIPLE = 0.039, 0.006, 0.006, 0.004, 1 / 150
_POSTS_MAX = 20_000


class Production:
    """`step()` makes the frame of one event. It is the `Targets` of its own records."""

    def __init__(self, world: World, weights: Mapping[str, float], records_max: int | None = None) -> None:
        self._world = world
        self._records_max = records_max
        self._live = 0  # records that were shown and not deleted
        self._random = world.rng.random
        self._records = Records(world.rng, world.clock, self)
        total = sum(weights.values())
        self._collections = [c for c, w in weights.items() for _ in range(round(10_000 * w / total))]
        self._plain = [c for c in self._collections if c not in SELF | GATES | {"app.bsky.graph.listitem"}]
        self._posts: list[Post] = []
        self._reposts: list[Ref] = []
        self._feeds: list[str] = []
        self._own_posts: list[tuple[Account, str]] = []
        self._own_lists: list[tuple[Account, str]] = []
        self._changeable: list[tuple[Account, str]] = []
        self._list = ""
        self._writers: list[Account] = []

    def step(self) -> list[SimFrame]:
        roll = self._random()
        if roll < _IDENTITIES + _ACCOUNTS:
            return [self._about_account(roll)]
        if roll > 1 - _DELETES and (frame := self._delete()) is not None:
            return [frame]
        if roll < _IDENTITIES + _ACCOUNTS + _UPDATES:
            return [self._update()]
        if self._random() < _MULTIPLE:
            account = self._world.account(self._world.skewed())
            count = min(200, 1 + int(1 / (self._random() + 0.005)))
            return [
                self._commit(account, [self._write(account, _pick(self._plain, self._random)) for _ in range(count)])
            ]
        return [self._create(_pick(self._collections, self._random))]

    def _about_account(self, roll: float) -> SimFrame:
        account = self._world.account(self._world.skewed())
        tick = self._world.clock.tick()
        if roll < _IDENTITIES:
            handle = None if roll < _IDENTITIES / 5 else account.handle
            if handle is not None:
                self._world.operations.append((tick.time, account.did, handle))
            return identity_frame(tick, account.did, handle)
        status = "deactivated" if roll < _IDENTITIES + _ACCOUNTS * 0.2 else None
        account.status = status
        return account_frame(tick, account.did, active=status is None, status=status)

    def _create(self, collection: str) -> SimFrame:
        rkey = None
        if collection in GATES and self._own_posts:
            account, rkey = _pick(self._own_posts, self._random)
        elif collection == "app.bsky.graph.listitem" and self._own_lists:
            account, self._list = _pick(self._own_lists, self._random)
        else:
            account = self._world.account(self._world.skewed())
        return self._commit(account, [self._write(account, collection, rkey)])

    def _write(self, account: Account, collection: str, rkey: str | None = None) -> Write:
        rkey = rkey or ("self" if collection in SELF else self._world.clock.tid())
        path = f"{collection}/{rkey}"
        present = account.repo.holds(path)
        return ("update" if present else "create", path, self._records.make(collection, account.did, rkey))

    def _update(self) -> SimFrame:
        if not self._changeable:
            return self._create("app.bsky.actor.profile")
        account, path = _pick(self._changeable, self._random)
        collection, rkey = path.split("/")
        return self._commit(account, [self._write(account, collection, rkey)])

    def _delete(self) -> SimFrame | None:
        """Two of three delete what was shown here, the others something from before."""
        if not self._writers:
            return None
        account = _pick(self._writers, self._random)
        path = account.take_unseen() if self._random() < 0.33 else None
        if path is None and (path := account.take_live(self._random())) is not None:
            self._live -= 1
        return None if path is None else self._commit(account, [("delete", path, None)])

    def _commit(self, account: Account, writes: list[Write]) -> SimFrame:
        frame = account.repo.commit(writes)
        assert frame.event is not None
        self._bounded(self._writers, account, 4_096)
        for op in frame.event["ops"]:
            if op["action"] == "create":
                account.live.append(op["path"])
                self._live += 1
                self._remember(account, op)
        if self._records_max is not None and self._live > self._records_max:
            self._forget(self._live // 4)
        return frame

    def _forget(self, records: int) -> None:
        """So many records and their accounts, so that what is remembered does not grow without end."""
        gone = self._world.silence(records)
        self._live -= sum(len(account.live) for account in gone)
        self._writers = [account for account in self._writers if account not in gone]
        for things in (self._own_posts, self._own_lists, self._changeable):
            things[:] = [(account, what) for account, what in things if account not in gone]

    def _remember(self, account: Account, op: dict[str, Any]) -> None:
        """What later records may speak about."""
        collection, rkey = op["path"].split("/")
        this = Ref(f"at://{account.did}/{op['path']}", op["cid"])
        if collection in CHANGEABLE:
            self._bounded(self._changeable, (account, op["path"]), 1_000)
        if collection == "app.bsky.feed.post":
            reply = op["record"].get("reply")
            root = Ref(reply["root"]["uri"], reply["root"]["cid"]) if reply else this
            self._bounded(self._posts, Post(this, root), _POSTS_MAX)
            self._bounded(self._own_posts, (account, rkey), _POSTS_MAX)
        elif collection == "app.bsky.feed.repost":
            self._bounded(self._reposts, this, 1_000)
        elif collection == "app.bsky.graph.list":
            self._bounded(self._own_lists, (account, this.uri), 1_000)
        elif collection == "app.bsky.feed.generator":
            self._bounded(self._feeds, this.uri, 1_000)

    def _bounded(self, things: list[T], thing: T, count_max: int) -> None:
        if len(things) < count_max:
            things.append(thing)
        else:
            things[int(self._random() * count_max)] = thing

    # Targets

    def person(self) -> Person:
        return self._world.person(self._world.skewed())

    def post(self) -> Post:
        """Half the answers and quotes go to a popular post, the others to something written before."""
        posts = self._posts
        if posts and self._random() < 0.7:
            return posts[int(len(posts) * self._random() ** 2.5)]
        ref = self._old_post()
        return Post(ref, ref)

    def like_subject(self) -> Ref:
        roll = self._random()
        if roll < 0.005 and self._feeds:
            uri = _pick(self._feeds, self._random)
            return Ref(uri, name_cid(uri))
        posts = self._posts
        if roll < 0.6 and posts:
            return posts[int(len(posts) * self._random() ** 2.5)].this
        return self._old_post()

    def via(self) -> Ref | None:
        return _pick(self._reposts, self._random) if self._reposts else None

    def list_uri(self, owner: str) -> str:
        chosen, self._list = self._list, ""
        if chosen:
            return chosen
        if self._own_lists and not owner:
            return _pick(self._own_lists, self._random)[1]
        return f"at://{owner or self.person().did}/app.bsky.graph.list/{_old_rkey(0)}"

    def feed_uri(self) -> str:
        return (
            _pick(self._feeds, self._random)
            if self._feeds
            else "at://did:web:feeds.example.com/app.bsky.feed.generator/hot"
        )

    def _old_post(self) -> Ref:
        """A post from before, popular ones more often."""
        number = int(50_000 * self._random() ** 2.5)
        uri = f"at://{self._world.person(number % self._world.accounts_max).did}/app.bsky.feed.post/{_old_rkey(number)}"
        return Ref(uri, name_cid(uri))


def _pick(things: Sequence[T], random: Callable[[], float]) -> T:
    return things[int(random() * len(things))]


def _old_rkey(number: int) -> str:
    return tid(int(START_TIME.timestamp() * 1_000_000) - 3_600_000_000 - number * 7_777_777, 7)

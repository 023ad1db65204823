"""Who lives on the simulated network: accounts with names and repositories, all from one seed."""

from __future__ import annotations

import base64
import random
from collections import Counter
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from fastworker.simulator import mst
from fastworker.simulator.cbor import DAG_CBOR
from fastworker.simulator.records import Person
from fastworker.simulator.repo import START_TIME, Clock, Repo, tid

if TYPE_CHECKING:
    from fastworker.simulator.keys import SigningKey

_HISTORY_SHARES = (
    ("app.bsky.feed.like", 0.62),
    ("app.bsky.graph.follow", 0.15),
    ("app.bsky.feed.post", 0.13),
    ("app.bsky.feed.repost", 0.08),
    ("app.bsky.graph.block", 0.01),
    ("app.bsky.graph.listitem", 0.01),
)


@lru_cache(32)
def history(size: int) -> tuple[mst.Node, tuple[str, ...]]:
    """(sealed tree, its paths): what a repository held before anyone listened. Accounts share the tree."""
    root = mst.EMPTY
    paths = []
    moment = int(START_TIME.timestamp() * 1_000_000)
    for collection, share in _HISTORY_SHARES:
        for number in range(round(size * share)):
            path = f"{collection}/{tid(moment - 60_000_000 * (number + 1), len(collection))}"
            root = mst.put(root, path.encode(), DAG_CBOR + sha256(path.encode()).digest())
            paths.append(path)
    mst.seal(root)
    return root, tuple(paths)


class Account:
    """`live`: paths that this account has shown; `unseen`: paths that it holds from before, in no particular order.
    `status`: as the newest #account said; None: active."""

    __slots__ = ("handle", "key", "live", "number", "repo", "status", "unseen_left", "unseen_paths")

    def __init__(
        self, number: int, person: Person, clock: Clock, history_size: int, key: SigningKey | None = None
    ) -> None:
        root, self.unseen_paths = history(history_size)
        self.number = number
        self.handle = person.handle
        self.status: str | None = None
        self.key = key
        self.repo = Repo(person.did, clock, root=root, key=key)
        self.live: list[str] = []
        self.unseen_left = len(self.unseen_paths)

    @property
    def did(self) -> str:
        return self.repo.did

    def take_live(self, random_value: float) -> str | None:
        """Forgets and returns one of the live paths."""
        if not self.live:
            return None
        at = int(random_value * len(self.live))
        self.live[at], self.live[-1] = self.live[-1], self.live[at]
        return self.live.pop()

    def take_unseen(self) -> str | None:
        """A path from before that was not taken yet; strides through them, so that collections mix."""
        if not self.unseen_left:
            return None
        self.unseen_left -= 1
        return self.unseen_paths[(self.unseen_left * 7_919 + self.number) % len(self.unseen_paths)]


class World:
    """Accounts by number, made when they are first needed.

    `signed`: they have keys, three of four on k256, and keep their records; they have no history then, which has none.
    """

    def __init__(
        self, seed: int | str, clock: Clock, *, accounts: int, history_size: int, signed: bool = False
    ) -> None:
        self.rng = random.Random(f"fastworker {seed}")
        self.clock = clock
        self.accounts_max = accounts
        self._seed = seed
        self._history_size = 0 if signed else history_size
        self._signed = signed
        self._accounts: dict[int, Account] = {}
        self._persons: dict[int, Person] = {}
        self._lives: Counter[int] = Counter()
        self.operations: list[tuple[str, str, str]] = []  # (time, DID, handle): documents that were changed

    def account(self, number: int) -> Account:
        found = self._accounts.get(number)
        if found is None:
            # Repositories differ by an order of magnitude, and so do the proofs.
            size = self._history_size * (1, 4, 8, 24)[number & 3] // 8
            found = self._accounts[number] = Account(
                number, self.person(number), self.clock, size, self._key(number) if self._signed else None
            )
        return found

    def accounts(self) -> list[Account]:
        """Those that were needed so far."""
        return list(self._accounts.values())

    def _key(self, number: int) -> SigningKey:
        from fastworker.simulator.keys import SigningKey  # noqa: PLC0415 - only who signs needs the curves

        return SigningKey(f"{self._seed} {number}", "k256" if number & 3 else "p256")

    def person(self, number: int) -> Person:
        found = self._persons.get(number)
        if found is None:
            life = f" {lives}" if (lives := self._lives[number]) else ""
            digest = sha256(f"{self._seed} {number}{life}".encode()).digest()
            name = base64.b32encode(digest[:15]).decode().lower()
            found = self._persons[number] = Person(f"did:plc:{name}", f"{name[:8]}.sim.test")
        return found

    def silence(self, records: int) -> set[Account]:
        """The busiest accounts that have shown so many records together: others take their numbers from now on."""
        gone: set[Account] = set()
        for account in sorted(self._accounts.values(), key=lambda account: len(account.live), reverse=True):
            if records <= 0:
                break
            records -= len(account.live)
            gone.add(account)
            del self._accounts[account.number], self._persons[account.number]
            self._lives[account.number] += 1
        return gone

    def skewed(self, exponent: float = 2.0) -> int:
        """The number of an account; low numbers are the busy ones (density falls as a power of the number)."""
        return int(self.accounts_max * self.rng.random() ** exponent)

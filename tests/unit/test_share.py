"""Which partitions a process reads: shares are fair, every partition has an owner, and one that lags gets help."""

from __future__ import annotations

import random
import zlib

import pytest

from fastworker.stream.limits import STREAM_LEN_MAX
from fastworker.stream.members import Look
from fastworker.stream.partitions import Layout, layout_of, partition_of
from fastworker.worker.share import Share, share_of

BEGIN, END = STREAM_LEN_MAX // 25, STREAM_LEN_MAX // 100


class Group:
    """Members that look one after the other, in any order, as Redis shows it to them."""

    def __init__(self, partitions: int, written: int | None = None) -> None:
        self.layout = Layout(written or partitions, partitions)
        self.waiting = [0] * partitions
        self.unfinished = [0] * partitions
        self.members: list[str] = []
        self.owners: dict[int, str] = {}
        self.shares: dict[str, Share] = {}

    def turn(self, me: str) -> None:
        self.owners = {n: one for n, one in self.owners.items() if one in self.members}
        look = Look(self.layout, sorted(self.members), self.owners, self.waiting, self.unfinished)
        helped = self.shares[me].help if me in self.shares else None
        share = self.shares[me] = share_of(me, look, helped)
        for number in share.give:
            del self.owners[number]
        for number in share.take:
            self.owners.setdefault(number, me)

    def turns(self, seed: int, count: int = 6) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            for me in rng.sample(self.members, len(self.members)):
                self.turn(me)

    def assert_fair(self) -> None:
        counts = [list(self.owners.values()).count(me) for me in self.members]
        assert sorted(self.owners) == list(range(self.layout.written))
        assert max(counts) - min(counts) <= 1

    def readers(self, partition: int) -> int:
        return (partition in self.owners) + sum(share.help == partition for share in self.shares.values())


@pytest.mark.parametrize("partitions", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_shares_are_fair_whoever_comes_and_goes(partitions: int, seed: int) -> None:
    rng = random.Random(seed)
    group = Group(partitions)
    for _ in range(20):
        if group.members and rng.random() < 0.4:
            gone = rng.choice(group.members)
            group.members.remove(gone)
            group.shares.pop(gone, None)
        else:
            group.members.append(f"{rng.getrandbits(64):016x}")
        if group.members:
            group.turns(seed)
            group.assert_fair()


def test_who_joins_takes_no_more_than_its_share_from_others() -> None:
    group = Group(8)
    group.members = ["a", "b"]
    group.turns(1)
    before = dict(group.owners)
    group.members.append("c")
    group.turns(2)
    group.assert_fair()
    assert sum(before[n] != group.owners[n] for n in range(8)) == 2


def test_a_partition_that_is_not_written_is_read_until_it_is_empty() -> None:
    group = Group(4, written=2)
    group.members = ["a"]
    group.unfinished = [0, 0, 0, 3]
    group.turns(1)
    assert sorted(group.owners) == [0, 1, 3]
    group.unfinished[3] = 0
    group.turns(2)
    assert sorted(group.owners) == [0, 1]


def test_more_processes_than_partitions_all_read() -> None:
    group = Group(2)
    group.members = list("abcdef")
    group.turns(1)
    group.assert_fair()
    assert sorted(group.readers(n) for n in range(2)) == [3, 3]


def test_one_that_lags_gets_everybody_who_has_nothing_to_do() -> None:
    group = Group(4)
    group.members = list("abcd")
    group.turns(1)
    group.waiting[2] = BEGIN
    group.turns(2)
    assert group.readers(2) == 4
    group.waiting[2] = END  # not before it is nearly done
    group.turns(3)
    assert group.readers(2) == 4
    group.waiting[2] = END - 1
    group.turns(4)
    assert group.readers(2) == 1
    group.waiting = [BEGIN] * 4  # who has enough himself helps nobody
    group.turns(5)
    assert [group.readers(n) for n in range(4)] == [1, 1, 1, 1]


def test_an_account_is_in_one_partition_for_every_release() -> None:
    """Another hash would move accounts, and two partitions would hold events of one: say so in the release notes."""
    dids = [f"did:plc:{number:024}" for number in range(10_000)]
    counts = [0] * 8
    for did in dids:
        counts[partition_of(did, 8)] += 1
        assert partition_of(did, 8) == zlib.crc32(did.encode()) % 8
    assert min(counts) > 1_100
    assert partition_of("", 8) == 0
    assert partition_of(dids[1], 1) == 0


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (None, (1, 1)),
        (b"", (1, 1)),
        (b"4 8", (4, 8)),
        (b"8 4", (8, 8)),
        (b"0 0", (1, 1)),
        (b"x", (1, 1)),
        (b"99 999", (64, 64)),
    ],
)
def test_what_the_reader_says_of_the_partitions(told: bytes | None, found: tuple[int, int]) -> None:
    assert layout_of(told) == found

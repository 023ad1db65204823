from __future__ import annotations

import os

from fastworker.event import Commit, Op
from fastworker.table.mapper import map_commit
from fastworker.worker.overlap import Marks, Overlap, keys_of

REPO, OTHER = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb"


def keys(repo: str, *ops: Op) -> set[int]:
    return set(keys_of(map_commit(Commit(1, repo, None, None, list(ops), []), 1_700_000_000_000)))


def like(rkey: str, post: str = "p") -> Op:
    subject = {"uri": f"at://{OTHER}/app.bsky.feed.post/{post}", "cid": "bafyrei"}
    return Op("create", "app.bsky.feed.like", rkey, "bafyrei", None, {"subject": subject})


def test_keys_are_of_records_and_of_their_pairs() -> None:
    first = keys(REPO, like("1"))
    assert len(first) == 2
    assert first & keys(REPO, like("2")), "the same pair"
    assert first & keys(REPO, Op("delete", "app.bsky.feed.like", "1")), "the same record"
    assert not first & keys(REPO, like("2", "q"))
    assert not first & keys(OTHER, like("1"))


def test_all_or_none_are_marked() -> None:
    marks = Marks()
    one, other = Overlap(marks, 0), Overlap(marks, 1)
    assert one.take([1, 2])
    assert one.take([2, 3]), "its own"
    assert not other.take([7, 3])
    assert one.take([7]), "nothing of what was refused is marked"
    other.give_back([1, 2, 3])
    assert not other.take([1]), "another's marks are not given back"
    one.give_back([1, 2, 3, 7])
    assert other.take([1, 2, 3, 7])


def test_the_marks_of_a_killed_process_go_when_its_number_comes_back() -> None:
    marks = Marks()
    killed = os.fork()
    if not killed:
        Overlap(marks, 4).take([5])
        os._exit(0)
    os.waitpid(killed, 0)
    other = Overlap(marks, 1)
    assert not other.take([5]), "memory is shared"
    Overlap(marks, 4)
    assert other.take([5])

"""Whole repositories: every record or a reason, whatever the order of the blocks, in bounded memory."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import libipld
import pytest

from fastworker.event.proof import Flaw, Unproved
from fastworker.event.repository import Repository, TreeRecord
from fastworker.simulator import mst
from fastworker.simulator.cbor import DAG_CBOR, RAW, cid_of, encode_record
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.repo import Repo, car_bytes, commit_block, read_car, read_tree, varint

DID = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"


def grown(size: int) -> Repo:
    repo = Repo(DID, key=SigningKey("one"))
    for start in range(0, size, 200):
        repo.commit(
            [
                ("create", f"app.bsky.feed.like/{n}", {"$type": "app.bsky.feed.like", "n": n % 7})  # the same again
                for n in range(start, min(size, start + 200))
            ]
        )
    return repo


def section(cid: bytes, block: bytes) -> bytes:
    return varint(len(cid) + len(block)) + cid + block


@pytest.fixture(params=[0, 1 << 30], ids=["by offsets", "in memory"])
def in_memory_max(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def read(path: Path, car: bytes, in_memory_max: int = 0) -> list[TreeRecord]:
    file = path / "repo.car"
    file.write_bytes(car)
    with Repository(file, in_memory_max=in_memory_max) as repository:
        return list(repository.records())


def flaw(path: Path, car: bytes) -> Flaw:
    """The same, whether blocks are held or read from the file."""
    with pytest.raises(Unproved) as caught:
        read(path, car)
    with pytest.raises(Unproved) as held:
        read(path, car, 1 << 30)
    assert held.value.flaw == caught.value.flaw
    return caught.value.flaw


def test_every_record_in_key_order(tmp_path: Path, in_memory_max: int) -> None:
    repo = grown(700)
    root, blocks = repo.export()
    found = read(tmp_path, car_bytes(root, blocks), in_memory_max)
    assert [(f"{held.collection}/{held.rkey}".encode(), held.cid) for held in found] == list(mst.items(repo.root))
    assert all(held.block == repo.records[held.cid] for held in found)


def test_an_empty_repository(tmp_path: Path) -> None:
    root, blocks = grown(0).export()
    assert read(tmp_path, car_bytes(root, blocks)) == []


def test_any_order_duplicates_and_foreign_blocks(tmp_path: Path, in_memory_max: int) -> None:
    root, blocks = grown(300).export()
    sections = [section(cid, block) for cid, block in blocks.items()]
    sections += sections[:50]
    sections += [
        section(cid_of(b"foreign"), b"foreign"),
        section(RAW + bytes(32), b"blob"),
        section(b"\x12\x20", b"v0"),
    ]
    header = car_bytes(root, {})
    expected = read(tmp_path, car_bytes(root, blocks))
    for seed in range(3):
        random.Random(seed).shuffle(sections)
        assert read(tmp_path, header + b"".join(sections), in_memory_max) == expected


def test_a_file_cut_anywhere_is_never_a_smaller_repository(tmp_path: Path) -> None:
    root, blocks = grown(25).export()
    car = car_bytes(root, blocks)
    ends = {len(car_bytes(root, dict(list(blocks.items())[:count]))) for count in range(len(blocks))}
    for size in {*range(0, len(car), 7), *ends}:
        assert flaw(tmp_path, car[:size]) == (Flaw.MISSING_BLOCK if size in ends else Flaw.BAD_CAR), size


def test_a_block_that_is_missing_or_another(tmp_path: Path) -> None:
    repo = grown(60)
    root, blocks = repo.export()
    for cid in blocks:
        less = {key: block for key, block in blocks.items() if key != cid}
        assert flaw(tmp_path, car_bytes(root, less)) == Flaw.MISSING_BLOCK
    changed = {**blocks, cid: blocks[cid][:-1] + bytes((blocks[cid][-1] ^ 1,))}
    assert flaw(tmp_path, car_bytes(root, changed)) == Flaw.BAD_HASH


def node(entries: list[tuple[bytes, bytes, bytes | None]], left: bytes | None = None) -> bytes:
    return libipld.encode_dag_cbor({"e": [{"p": 0, "k": k, "v": v, "t": t} for k, v, t in entries], "l": left})


def made(*nodes: bytes, record: bytes = b"\xa0") -> bytes:
    """A CAR of a commit on the first node."""
    commit = commit_block(DID, "3lzzzzzzzzzzz", cid_of(nodes[0]))
    return car_bytes(cid_of(commit), {cid_of(block): block for block in (commit, *nodes, record)})


KEYS = [b"a.b.c/%d" % n for n in range(20_000)]
LEAF = [key for key in KEYS if mst.layer_of(key) == 0]
SECOND = [key for key in KEYS if mst.layer_of(key) == 1]
EMPTY_RECORD = cid_of(b"\xa0")


def test_trees_that_are_none(tmp_path: Path) -> None:
    one = node([(LEAF[0], EMPTY_RECORD, None)])
    assert len(read(tmp_path, made(one))) == 1
    assert flaw(tmp_path, made(node([(SECOND[0], EMPTY_RECORD, cid_of(one)), (LEAF[0], EMPTY_RECORD, None)]), one))
    swapped = sorted(LEAF[:2], reverse=True)
    assert flaw(tmp_path, made(node([(key, EMPTY_RECORD, None) for key in swapped]))) == Flaw.BAD_TREE
    mixed = node([(key, EMPTY_RECORD, None) for key in sorted([LEAF[0], SECOND[0]])])
    assert flaw(tmp_path, made(mixed)) == Flaw.BAD_TREE
    twice = node([(SECOND[0], EMPTY_RECORD, cid_of(one))], cid_of(one))  # one subtree in two places
    assert flaw(tmp_path, made(twice, one)) == Flaw.BAD_TREE
    empty = node([])
    assert flaw(tmp_path, made(node([(SECOND[0], EMPTY_RECORD, cid_of(empty))]), empty)) == Flaw.BAD_TREE
    assert flaw(tmp_path, made(node([], cid_of(one)), one)) == Flaw.BAD_TREE
    below = node([(LEAF[0], EMPTY_RECORD, cid_of(one))])
    assert flaw(tmp_path, made(below, one)) == Flaw.TOO_DEEP
    wide = sorted(LEAF)[:10_001]
    assert flaw(tmp_path, made(node([(key, EMPTY_RECORD, None) for key in wide]))) == Flaw.TOO_LARGE


def test_a_key_or_a_value_that_nothing_can_be_stored_of_costs_no_other(tmp_path: Path) -> None:
    odd = next(key for key in (b"a/%d" % n for n in range(9)) if mst.layer_of(key) == 0)  # no collection
    tree = node(sorted([(odd, EMPTY_RECORD, None), (LEAF[0], RAW + bytes(32), None), (LEAF[1], EMPTY_RECORD, None)]))
    file = tmp_path / "repo.car"
    file.write_bytes(made(tree))
    with Repository(file) as repository:
        found = {held.rkey: held.block for held in repository.records()}
        assert repository.bad_paths == 1
    assert found == {LEAF[0].decode()[6:]: None, LEAF[1].decode()[6:]: b"\xa0"}


def test_a_key_without_a_slash_says_nothing_of_the_next(tmp_path: Path, in_memory_max: int) -> None:
    names = [f"a.b.c{n}" for n in range(60)]
    first = next(name for name in names if mst.layer_of(name.encode()) == 0)
    keys = [first, next(f"{first}0/{n}" for n in range(60) if mst.layer_of(f"{first}0/{n}".encode()) == 0)]
    file = tmp_path / "repo.car"
    file.write_bytes(made(node([(key.encode(), EMPTY_RECORD, None) for key in keys])))
    with Repository(file, in_memory_max=in_memory_max) as repository:
        repository.check()
        assert [f"{one.collection}/{one.rkey}" for one in repository.records()] == keys[1:]
        assert repository.bad_paths == 1


def test_headers_and_sizes(tmp_path: Path) -> None:
    root, blocks = grown(3).export()
    car = car_bytes(root, blocks)
    assert flaw(tmp_path, b"") == Flaw.BAD_CAR
    assert flaw(tmp_path, b"<html>busy</html>") == Flaw.BAD_CAR
    assert flaw(tmp_path, varint(1 << 40) + car) == Flaw.BAD_CAR
    assert flaw(tmp_path, car.replace(b"gversion\x01", b"gversion\x02", 1)) == Flaw.BAD_CAR
    assert flaw(tmp_path, car + varint(3 << 20) + bytes(10)) == Flaw.TOO_LARGE
    assert flaw(tmp_path, car + b"\xff" * 20) == Flaw.BAD_CAR
    (tmp_path / "repo.car").write_bytes(car)
    with pytest.raises(Unproved, match="too_large"):
        Repository(tmp_path / "repo.car", bytes_max=len(car) - 1)


def test_a_hundred_thousand_copies_of_one_block_cost_no_more(tmp_path: Path) -> None:
    """Copies of the record that every key names: found once per key, not looked through."""
    root, blocks = grown(2_000).export()
    record = encode_record({"$type": "app.bsky.feed.like", "n": 1})
    car = car_bytes(root, blocks) + section(cid_of(record), record) * 100_000
    started = time.process_time()
    assert len(read(tmp_path, car)) == 2_000
    assert time.process_time() - started < 5


def test_what_it_holds_of_a_large_file_is_its_index(tmp_path: Path) -> None:
    root, blocks = grown(600).export()
    large = {cid_of(block): block for block in (bytes((n,)) * 1_000_000 for n in range(40))}
    file = tmp_path / "repo.car"
    file.write_bytes(car_bytes(root, blocks | large))
    tracemalloc.start()
    with Repository(file) as repository:
        assert len(list(repository.records())) == 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000 < file.stat().st_size


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "count"), [("jetstream-repo", 23), ("little", 278), ("bsky.app", 10_640)])
def test_real_repositories(real_data: Path, name: str, count: int, in_memory_max: int) -> None:
    path = real_data / f"cars/{name}.car"
    root, blocks = read_car(path.read_bytes())
    tree = libipld.decode_dag_cbor(blocks[root])["data"]
    with Repository(path, in_memory_max=in_memory_max) as repository:
        found = [(f"{held.collection}/{held.rkey}", held.cid) for held in repository.records()]
        assert repository.bad_paths == 0
    assert found == list(read_tree(blocks, tree))
    assert len(found) == count
    assert all(cid.startswith(DAG_CBOR) for _, cid in found)

"""The tree is right: the published vectors, real repositories, and a second derivation from the specification."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastworker.simulator import mst
from fastworker.simulator.cbor import DAG_CBOR, cid_bytes, cid_of, cid_text, decode, encode
from fastworker.simulator.repo import Clock, read_car, read_tree, repo_to_frames

KEYS = st.integers(0, 300).map(lambda n: b"app.bsky.feed.like/%d" % n)


def value_of(key: bytes) -> bytes:
    return cid_of(key)


def derived(keys: list[bytes]) -> bytes:
    """The root CID from the definition: split a sorted list at the keys of the highest layer, then the parts."""

    def node(part: list[bytes], layer: int) -> dict[str, Any] | None:
        if not part:
            return None
        inner: list[bytes] = []
        groups: list[list[bytes]] = []
        group: list[bytes] = []
        for key in part:
            if mst.layer_of(key) == layer:
                inner.append(key)
                groups.append(group)
                group = []
            else:
                group.append(key)
        groups.append(group)
        links = [
            None if (below := node(g, layer - 1)) is None else {"$link": cid_text(cid_of(encode(below)))}
            for g in groups
        ]
        entries, previous = [], b""
        for key, subtree in zip(inner, links[1:], strict=True):
            shared = 0
            while shared < min(len(previous), len(key)) and previous[shared] == key[shared]:
                shared += 1
            suffix = {"$bytes": base64.b64encode(key[shared:]).decode()}
            entries.append({"p": shared, "k": suffix, "v": {"$link": cid_text(value_of(key))}, "t": subtree})
            previous = key
        return {"l": links[0], "e": entries}

    top = max(map(mst.layer_of, keys), default=0)
    return cid_of(encode(node(sorted(keys), top) or {"l": None, "e": []}))


def test_the_empty_tree_has_the_root_that_everyone_knows() -> None:
    assert cid_text(mst.seal(mst.EMPTY)) == "bafyreie5737gdxlw5i64vzichcalba3z2v5n6icifvx5xytvske7mr3hpm"


@given(st.lists(st.tuples(KEYS, st.booleans()), max_size=60))
def test_any_history_of_edits_gives_the_tree_of_what_is_left(edits: Any) -> None:
    root, held = mst.EMPTY, set()
    for key, keep in edits:
        if keep:
            root = mst.put(root, key, value_of(key))
            held.add(key)
        elif key in held:
            root = mst.remove(root, key)
            held.remove(key)
    assert dict(mst.items(root)) == {key: value_of(key) for key in held}
    assert list(dict(mst.items(root))) == sorted(held)
    assert mst.seal(root) == derived(list(held))
    assert all(mst.get(root, key) == value_of(key) for key in held)


def test_an_edit_leaves_the_old_tree_as_it_was() -> None:
    root = mst.EMPTY
    for number in range(200):
        root = mst.put(root, b"app.bsky.feed.like/%d" % number, value_of(b"%d" % number))
    before = mst.seal(root)
    changed = mst.remove(mst.put(root, b"app.bsky.feed.like/new", value_of(b"")), b"app.bsky.feed.like/7")
    assert mst.seal(changed) != before
    assert cid_of(root.encode()) == before
    assert len(dict(mst.items(root))) == 200


def test_what_is_not_there_cannot_be_removed() -> None:
    with pytest.raises(KeyError):
        mst.remove(mst.put(mst.EMPTY, b"a/b", value_of(b"")), b"a/c")


def test_a_commit_carries_only_new_nodes_and_proofs() -> None:
    root = mst.EMPTY
    for number in range(3_000):
        root = mst.put(root, b"app.bsky.feed.like/%d" % number, value_of(b"%d" % number))
    mst.seal(root)
    root = mst.put(root, b"app.bsky.feed.like/new", value_of(b"new"))
    cid, blocks = mst.blocks(root, [b"app.bsky.feed.like/new"])
    assert cid in blocks
    assert 3 <= len(blocks) <= 16


def test_a_node_is_the_cbor_that_the_specification_says() -> None:
    root = mst.EMPTY
    for number in range(40):
        root = mst.put(root, b"app.bsky.feed.like/%d" % number, value_of(b"%d" % number))
    _, blocks = mst.blocks(root, [])
    for cid, block in blocks.items():
        assert cid == DAG_CBOR + hashlib.sha256(block).digest()
        assert encode(decode(block)) == block
        assert set(decode(block)) == {"l", "e"}


@pytest.mark.real_data
def test_published_key_heights(real_data: Path) -> None:
    for case in json.loads((real_data / "interop/mst/key_heights.json").read_text()):
        assert mst.layer_of(case["key"].encode()) == case["height"], case


@pytest.mark.real_data
def test_published_common_prefixes(real_data: Path) -> None:
    for case in json.loads((real_data / "interop/mst/common_prefix.json").read_text()):
        assert mst.common_prefix(case["left"].encode(), case["right"].encode()) == case["len"], case


@pytest.mark.real_data
def test_published_commit_proofs(real_data: Path) -> None:
    for case in json.loads((real_data / "interop/firehose/commit-proof-fixtures.json").read_text()):
        value = cid_bytes(case["leafValue"])
        root = mst.EMPTY
        for key in case["keys"]:
            root = mst.put(root, key.encode(), value)
        assert cid_text(mst.seal(root)) == case["rootBeforeCommit"], case["comment"]
        for key in case["adds"]:
            root = mst.put(root, key.encode(), value)
        for key in case["dels"]:
            root = mst.remove(root, key.encode())
        after, blocks = mst.blocks(root, [key.encode() for key in case["adds"] + case["dels"]])
        assert cid_text(after) == case["rootAfterCommit"], case["comment"]
        assert {cid_text(cid) for cid in blocks} == set(case["blocksInProof"]), case["comment"]


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "count"), [("jetstream-repo", 23), ("little", 278), ("bsky.app", 10_640)])
def test_a_real_repository_built_again_one_record_at_a_time_has_its_own_root(
    real_data: Path, name: str, count: int
) -> None:
    car = (real_data / f"cars/{name}.car").read_bytes()
    root, blocks = read_car(car)
    commit = decode(blocks[root])
    there = dict(read_tree(blocks, cid_bytes(commit["data"]["$link"])))
    frames = list(repo_to_frames(car, Clock(start_seq=1)))
    assert [frame.seq for frame in frames] == list(range(1, count + 1))
    shown = {frame.event["ops"][0]["path"]: frame.event["ops"][0] for frame in frames if frame.event}
    assert {path: op["cid"] for path, op in shown.items()} == {path: cid_text(cid) for path, cid in there.items()}
    assert all(encode(op["record"]) == blocks[there[path]] for path, op in shown.items())
    last = read_car(decode_payload(frames[-1].data)["blocks"])
    assert decode(last[1][last[0]])["data"] == commit["data"]


def decode_payload(data: bytes) -> dict[str, Any]:
    import libipld

    payload: dict[str, Any] = libipld.decode_dag_cbor_multi(data)[1]
    return payload

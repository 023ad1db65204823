"""Commits prove themselves, and nothing that signature and tree cover can be changed unseen."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import libipld
import pytest
import zstandard

from fastworker.event import proof
from fastworker.event.proof import Flaw, Unproved, Verdict
from fastworker.event.recording import FramesFile
from fastworker.simulator import mst
from fastworker.simulator.cbor import LINK, cid_bytes, cid_of, text
from fastworker.simulator.keys import Curve, SigningKey
from fastworker.simulator.repo import Clock, Repo, Write, car_bytes, commit_block, read_car
from fastworker.sync.keys import key_of, multikey_of

DID = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"


def payload_of(frame: bytes) -> dict[str, Any]:
    payload: dict[str, Any] = libipld.decode_dag_cbor_multi(frame)[1]
    return payload


def like(number: int) -> dict[str, Any]:
    subject = {"uri": f"at://{DID}/app.bsky.feed.post/{number}", "cid": "bafyreid"}
    return {"$type": "app.bsky.feed.like", "subject": subject, "createdAt": "2026-07-04T00:00:00Z"}


def path(number: int) -> str:
    return f"app.bsky.feed.like/3l{number:011}".replace("0", "z").replace("1", "y").replace("8", "x").replace("9", "w")


def grown(size: int, curve: Curve = "k256") -> Repo:
    repo = Repo(DID, Clock(), key=SigningKey("one", curve))
    for start in range(0, size, 100):
        repo.commit([("create", path(n), like(n)) for n in range(start, min(size, start + 100))])
    return repo


def verdict(payload: dict[str, Any], repo: Repo) -> Verdict | Flaw:
    assert isinstance(repo.key, SigningKey)
    try:
        return proof.prove_commit(payload, key_of(repo.key.multikey).is_signed)
    except Unproved as error:
        return error.flaw


@pytest.mark.parametrize("curve", ["k256", "p256"])
def test_commits_of_every_shape_are_proved(curve: Curve) -> None:
    chance = random.Random(curve)
    repo = grown(300, curve)
    numbers = set(range(300))
    for _ in range(150):
        there = chance.sample(sorted(numbers), chance.randint(0, 6))
        new = set(chance.sample(range(300, 2_000), chance.randint(0, 8))) - numbers
        writes: list[Write] = [("create", path(n), like(n)) for n in new]
        writes += [("delete", path(n), None) for n in there[::2]]
        writes += [("update", path(n), like(n + chance.randint(1, 9))) for n in there[1::2]]
        chance.shuffle(writes)
        numbers = (numbers | new) - set(there[::2])
        assert verdict(payload_of(repo.commit(writes).data), repo) == Verdict.OK, writes


def test_a_repository_from_empty_to_empty() -> None:
    repo = grown(0)
    for action in ("create", "delete"):
        for n in range(40):
            frame = repo.commit([(action, path(n), like(n) if action == "create" else None)])
            assert verdict(payload_of(frame.data), repo) == Verdict.OK


def test_a_commit_without_ops_is_proved() -> None:
    repo = grown(20)
    assert verdict(payload_of(repo.commit([]).data), repo) == Verdict.OK


def said(payload: dict[str, Any]) -> tuple[Any, ...]:
    """What a commit says, less `seq`, `time` and the like. A member that is absent is as good as null."""
    ops = [tuple(op.get(name) for name in ("action", "path", "cid", "prev")) for op in payload["ops"]]
    return ops, *(payload.get(name) for name in ("repo", "rev", "commit", "blocks", "prevData"))


@pytest.mark.parametrize(
    "writes",
    [
        [("create", path(5_000), like(1))],
        [("create", path(5_000), like(1)), ("update", path(7), like(99)), ("delete", path(8), None)],
    ],
    ids=["one create", "create, update, delete"],
)
def test_no_flipped_bit_of_what_is_covered_is_ever_ok(writes: list[Write]) -> None:
    repo = grown(60)
    frame = repo.commit(writes).data
    original = payload_of(frame)
    assert verdict(original, repo) == Verdict.OK
    tried = 0
    for position in range(len(frame)):
        for bit in (0, 3, 7) if len(frame) < 4_000 else (position % 8,):
            changed = bytearray(frame)
            changed[position] ^= 1 << bit
            try:
                header, payload = libipld.decode_dag_cbor_multi(bytes(changed))
            except ValueError:
                continue
            if header != {"t": "#commit", "op": 1} or type(payload) is not dict:
                continue
            tried += 1
            if verdict(payload, repo) == Verdict.OK:
                assert said(payload) == said(original), (position, bit)
    assert tried > len(frame)


def test_ops_that_hide_or_invent_something() -> None:
    repo = grown(60)
    writes: list[Write] = [("create", path(500), like(1)), ("update", path(7), like(9)), ("delete", path(8), None)]
    payload = payload_of(repo.commit(writes).data)
    for n in range(3):
        assert verdict({**payload, "ops": payload["ops"][:n] + payload["ops"][n + 1 :]}, repo) == Flaw.INVERSION
    twice = {**payload, "ops": [*payload["ops"], payload["ops"][0]]}
    assert verdict(twice, repo) == Flaw.INVERSION
    invented = {"action": "delete", "path": path(9_999), "cid": None, "prev": payload["ops"][0]["cid"]}
    assert verdict({**payload, "ops": [*payload["ops"], invented]}, repo) == Flaw.INVERSION
    assert verdict({**payload, "ops": payload["ops"] * 100}, repo) == Flaw.TOO_LARGE


def test_two_ops_on_one_path_are_refused_even_where_they_could_be_undone() -> None:
    repo = grown(60)
    payload = payload_of(repo.commit([("update", path(7), like(9))]).data)
    (op,) = payload["ops"]
    between = cid_of(b"between")
    ops = [{**op, "prev": between}, {**op, "cid": between}]
    assert verdict({**payload, "ops": ops}, repo) == Flaw.INVERSION


def layered(layer: int, count: int) -> list[bytes]:
    return [key for key in (b"a.b.c/%d" % n for n in range(500)) if proof.layer_of(key) == layer][:count]


def test_one_record_is_undone_the_short_way_as_the_long_way() -> None:
    """A key of any layer, with and without neighbours; the short way gives nothing, or what the long way gives."""
    chance = random.Random(5)
    tried = short = 0
    for size in (2, 3, 5, 9, 40, 400):
        keys = [b"app.bsky.feed.like/3k%d" % chance.randrange(10**9) for _ in range(size)]
        tree = mst.EMPTY
        for key in keys:
            tree = mst.put(tree, key, cid_of(key))
        after = mst.seal(tree)
        blocks = mst.all_blocks(tree)
        for key in {*chance.sample(keys, min(size, 40)), *sorted(keys, key=proof.layer_of)[-8:]}:
            for step, before in (
                (("create", key, cid_of(key), None), mst.remove(tree, key)),
                (("update", key, cid_of(key), cid_of(b"old")), mst.put(tree, key, cid_of(b"old"))),
            ):
                root = mst.seal(before)
                assert proof.invert(blocks, after, [step]) == root
                found = proof._invert_one(blocks, after, step)
                assert found in (None, root)
                tried += 1
                short += found is not None
            other = ("create", key, cid_of(b"other"), None)
            assert proof._invert_one(blocks, after, other) is None
    assert short > 0.9 * tried, (short, tried)


def test_a_create_with_its_neighbours_cid_is_refused() -> None:
    """The short way looks for the CID first: it may be there under another key."""
    first, second = sorted(layered(0, 2))
    ours, theirs = cid_of(b"ours"), cid_of(b"theirs")
    after = mst.put(mst.put(mst.EMPTY, first, ours), second, theirs)
    mst.seal(after)
    before = mst.seal(mst.put(mst.EMPTY, first, ours))
    blocks = mst.all_blocks(after)
    assert proof.invert(blocks, mst.seal(after), [("create", second, theirs, None)]) == before
    with pytest.raises(Unproved, match="inversion"):
        proof.invert(blocks, mst.seal(after), [("create", second, ours, None)])


def test_a_record_that_is_a_node_hides_no_change() -> None:
    """A value that equals a subtree's CID: to replace the link in both places would hide that the value changed."""
    low, high = sorted(layered(0, 2))
    top = next(key for key in layered(1, 99) if key > high)
    leaf = mst.seal(mst.put(mst.EMPTY, low, cid_of(b"1")))
    grown_leaf = mst.seal(mst.put(mst.put(mst.EMPTY, low, cid_of(b"1")), high, cid_of(b"2")))
    before = after = mst.put(mst.EMPTY, low, cid_of(b"1"))
    before = mst.put(before, top, leaf)
    after = mst.put(mst.put(after, high, cid_of(b"2")), top, grown_leaf)
    mst.seal(before)
    mst.seal(after)
    step = ("create", high, cid_of(b"2"), None)
    for undo in (proof.invert(mst.all_blocks(after), mst.seal(after), [step]), _short(after, step)):
        assert undo != mst.seal(before)


def _short(tree: mst.Node, step: proof.Step) -> bytes | None:
    return proof._invert_one(mst.all_blocks(tree), mst.seal(tree), step)


def test_another_key_another_account_another_revision() -> None:
    repo = grown(5)
    payload = payload_of(repo.commit([("create", path(50), like(1))]).data)
    other = Repo(DID, key=SigningKey("two"))
    assert verdict(payload, other) == Flaw.BAD_SIGNATURE
    assert verdict({**payload, "repo": "did:plc:" + "b" * 24}, repo) == Flaw.BAD_COMMIT
    assert verdict({**payload, "rev": "3lzzzzzzzzzzz"}, repo) == Flaw.BAD_COMMIT


def test_a_legacy_commit_is_looked_up() -> None:
    repo = grown(30)
    payload = payload_of(repo.commit([("create", path(50), like(1)), ("delete", path(3), None)]).data)
    legacy = {key: value for key, value in payload.items() if key != "prevData"}
    assert verdict(legacy, repo) == Verdict.LEGACY
    wrong = [{**legacy["ops"][0], "cid": cid_of(b"other")}, legacy["ops"][1]]
    assert verdict({**legacy, "ops": wrong}, repo) == Flaw.INVERSION


def test_a_missing_neighbour_is_a_missing_block() -> None:
    repo = grown(400)
    for n in range(30):
        payload = payload_of(repo.commit([("delete", path(n), None)]).data)
        root, blocks = read_car(payload["blocks"])
        tree = libipld.decode_dag_cbor(blocks[root])["data"]
        nodes = [cid for cid, block in blocks.items() if block.startswith(b"\xa2ae") and cid != tree]
        for cid in nodes[-1:]:
            car = car_bytes(root, {k: b for k, b in blocks.items() if k != cid})
            assert verdict({**payload, "blocks": car}, repo) in (Flaw.MISSING_BLOCK, Verdict.OK)
    car = car_bytes(root, {k: b for k, b in blocks.items() if k != tree})
    assert verdict({**payload, "blocks": car}, repo) == Flaw.MISSING_BLOCK


def node(*entries: tuple[bytes, bytes | None], left: bytes | None = None, shared: int = 0) -> bytes:
    return libipld.encode_dag_cbor(
        {
            "e": [{"p": shared if n else 0, "k": key, "v": cid_of(b"v"), "t": t} for n, (key, t) in enumerate(entries)],
            "l": left,
        }
    )


def test_trees_that_are_none() -> None:
    """Bounds of a node: order, number of entries, length of keys, layers."""

    def flaw(*blocks: bytes) -> Flaw:
        held = {cid_of(block): block for block in blocks}
        with pytest.raises(Unproved) as caught:
            proof.find(held, cid_of(blocks[0]), b"zz/zz")
        return caught.value.flaw

    assert flaw(node((b"b/b", None), (b"a/a", None))) == Flaw.BAD_TREE
    assert flaw(node((b"b/b", None), (b"b/b", None))) == Flaw.BAD_TREE
    assert flaw(node((b"b/b", None), (b"c", None), shared=9)) == Flaw.BAD_TREE
    assert flaw(node((b"b" * 1_025, None))) == Flaw.TOO_LARGE
    assert flaw(node(*((b"%05d" % n, None) for n in range(10_001)))) == Flaw.TOO_LARGE
    assert flaw(b"\xa1ae\x80") == Flaw.BAD_TREE
    assert flaw(b"\x80") == Flaw.BAD_TREE
    below = node((b"a/aa", None))
    deep = [below]
    for _ in range(5):
        deep.append(node(left=cid_of(deep[-1])))
    first = next(key for key in (b"a/%d" % n for n in range(9_999)) if proof.layer_of(key) == 2)
    top = node((first, cid_of(deep[-1])))  # a chain that is deeper than the layer of its top
    assert flaw(top, *deep) == Flaw.TOO_DEEP


def test_commit_blocks_that_are_none() -> None:
    good = commit_block(DID, "3lzzzzzzzzzzz", cid_of(b"x"))
    assert proof.read_commit(good).did == DID
    for bad in (
        good[:-1] + b"\x02",
        good.replace(b"csigX@", b"csig\x59\x00\x40"),
        good.replace(text(DID), text("did:plc")),
        good.replace(text("3lzzzzzzzzzzz"), text("3lzzzzzzzzzz")),
        good.replace(LINK + cid_of(b"x"), b"\x58\x24" + cid_of(b"x")),
        b"\xa6",
        b"",
    ):
        with pytest.raises(Unproved):
            proof.read_commit(bad)
    with pytest.raises(Unproved, match="too_large"):
        proof.read_commit(good + bytes(10_000))


def test_a_commit_block_is_read_by_its_places_as_by_decoding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(block: bytes) -> proof.SignedCommit | Flaw:
        try:
            return proof.read_commit(block)
        except Unproved as error:
            return error.flaw

    plain = commit_block("did:plc:" + "a" * 24, "3lzzzzzzzzzzz", cid_of(b"x"))
    others = [
        plain[:at] + bytes((plain[at] ^ 1 << bit,)) + plain[at + 1 :] for at in range(len(plain)) for bit in (0, 7)
    ]
    blocks = [plain, *others, commit_block("did:web:a.test", "3lzzzzzzzzzzz", cid_of(b"x"))]
    found = [read(block) for block in blocks]
    monkeypatch.setattr(proof, "_plain", lambda _: None)
    assert found == [read(block) for block in blocks]
    assert len({str(one) for one in found}) > 200


def test_ten_thousand_keys_in_one_node_are_undone_in_a_moment() -> None:
    keys = [f"a.b.c/{n}" for n in range(40_000)]
    flat = [key for key in keys if proof.layer_of(key.encode()) == 0][:9_000]
    root = mst.EMPTY
    repo = Repo(DID, key=SigningKey("one"))
    for key in flat[:4_000]:  # all of layer 0: one node
        root = mst.put(root, key.encode(), cid_of(b"v"))
    repo.root = root
    frame = repo.commit([("create", key, {"$type": "a.b.c"}) for key in flat[4_000:4_200]])
    assert verdict(payload_of(frame.data), repo) == Verdict.OK


@pytest.mark.real_data
def test_every_real_commit_is_signed_and_undone(real_data: Path, tmp_path: Path) -> None:
    packed = (real_data / "frames/frames.bin.zst").read_bytes()
    frames = tmp_path / "frames"
    frames.write_bytes(zstandard.ZstdDecompressor().decompressobj().decompress(packed))
    packed = (real_data / "frames/did_docs.json.zst").read_bytes()
    documents = json.loads(zstandard.ZstdDecompressor().decompressobj().decompress(packed))
    proved = 0
    for frame in FramesFile(frames, little_endian=True):
        header, payload = libipld.decode_dag_cbor_multi(frame)
        if header["t"] == "#commit":
            key = key_of(multikey_of(documents[payload["repo"]]) or "")
            assert proof.prove_commit(payload, key.is_signed) == Verdict.OK
            proved += 1
    assert proved == 148


@pytest.mark.real_data
def test_published_commit_proofs_are_enough_to_undo(real_data: Path) -> None:
    cases = json.loads((real_data / "interop/firehose/commit-proof-fixtures.json").read_text())
    for case in cases:
        value = cid_bytes(case["leafValue"])
        root = mst.EMPTY
        for key in {*case["keys"], *case["adds"]} - set(case["dels"]):
            root = mst.put(root, key.encode(), value)
        after = mst.seal(root)
        proofs = {cid_bytes(cid) for cid in case["blocksInProof"]}
        blocks = {cid: block for cid, block in mst.all_blocks(root).items() if cid in proofs}
        steps: list[proof.Step] = [("create", key.encode(), value, None) for key in case["adds"]]
        steps += [("delete", key.encode(), None, value) for key in case["dels"]]
        assert proof.invert(blocks, after, steps) == cid_bytes(case["rootBeforeCommit"]), case["comment"]
    assert len(cases) == 6


@pytest.mark.real_data
def test_published_signatures(real_data: Path) -> None:
    cases = json.loads((real_data / "interop/crypto/signature-fixtures.json").read_text())

    def raw(digits: str) -> bytes:
        return base64.b64decode(digits + "=" * (-len(digits) % 4))

    for case in cases:
        key = key_of(case["publicKeyDid"].removeprefix("did:key:"))
        valid = key.is_signed(raw(case["signatureBase64"]), raw(case["messageBase64"]))
        assert valid is case["validSignature"], case["comment"]
    assert len(cases) == 6


def test_the_high_s_and_odd_lengths_are_refused() -> None:
    signing = SigningKey("three", "p256")
    key = key_of(signing.multikey)
    assert key.is_signed(signing.sign(b"m"), b"m")
    assert not key.is_signed(signing.sign(b"m", high_s=True), b"m")
    for curve in ("k256", "p256"):
        signing = SigningKey("three", curve)
        key = key_of(signing.multikey)
        for signature in (b"", bytes(64), b"\xff" * 64, signing.sign(b"m") + b"\0", signing.sign(b"m")[:-1]):
            assert not key.is_signed(signature, b"m")


def test_keys_of_documents() -> None:
    good = SigningKey("four").multikey
    method = {"id": f"{DID}#atproto", "type": "Multikey", "publicKeyMultibase": good}
    assert multikey_of({"id": DID, "verificationMethod": [{"id": "x"}, 3, method]}) == good
    assert multikey_of({"id": DID, "verificationMethod": [{**method, "id": "#atproto"}]}) == good
    assert multikey_of({"id": DID, "verificationMethod": [{**method, "id": "did:plc:other#atproto"}]}) is None
    assert multikey_of({"id": DID}) is None
    for bad in ("", "z", good[:-1], good + "1", "f" + good[1:], good.replace("z", "0", 2), "z" + "1" * 60):
        with pytest.raises(ValueError, match="multikey"):
            key_of(bad)

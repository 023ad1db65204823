"""The simulated network makes what a relay sends: checked with another decoder, frame by frame."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from typing import Any

import libipld
import pytest

from fastworker.simulator import mst
from fastworker.simulator.adversary import ADVERSARIAL, COLLECTIONS
from fastworker.simulator.cbor import DAG_CBOR, cid_bytes, cid_text, decode, encode
from fastworker.simulator.hostile import good_likes
from fastworker.simulator.network import Block, Clock, LiveClock, Lost, Network, Repo, SimFrame, hostile_frames
from fastworker.simulator.production import Production
from fastworker.simulator.repo import START_SEQ, error_frame, read_car, read_tree, tid

MIXES = ("production", "surge", "adversarial")


def told(frame: SimFrame) -> dict[str, Any]:
    """What is known of a frame that is no error."""
    assert frame.event is not None
    return frame.event


def message(frame: SimFrame) -> tuple[dict[str, Any], dict[str, Any]]:
    header, payload = libipld.decode_dag_cbor_multi(frame.data)
    return header, payload


def commits(frames: Any) -> Any:
    """(event, payload, blocks) of every commit that is decodable by libipld."""
    for frame in frames:
        if frame.event is not None and frame.event["kind"] == "commit":
            _, payload = message(frame)
            yield frame.event, payload, blocks_of(payload["blocks"])


def blocks_of(car: bytes) -> dict[bytes, bytes]:
    """The sections of a CAR, unchecked (the adversarial mix has wrong ones)."""
    at = 1 + car[0]
    found = {}
    while at < len(car):
        size = shift = 0
        while True:
            byte = car[at]
            at += 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        found[car[at : at + 36]] = car[at + 36 : at + size]
        at += size
    return found


def load(blocks: dict[bytes, bytes], cid: bytes, layer: int | None = None) -> mst.Node:
    """The part of a tree that a commit carries; what it lacks is an opaque node."""
    if cid not in blocks:
        node = mst.Node(layer or 0, (), (None,))
    else:
        raw = decode(blocks[cid])
        entries: tuple[mst.Entry, ...] = ()
        subtrees, key = [raw["l"]], b""
        for entry in raw["e"]:
            previous, key = key, key[: entry["p"]] + libipld.decode_dag_cbor(encode(entry["k"]))
            entries += (mst._entry(previous, key, cid_bytes(entry["v"]["$link"])),)
            subtrees.append(entry["t"])
        if entries:
            layer = mst.layer_of(entries[0][0])
        if layer is None:  # an empty tree, or a bridge at the top, which no tree has
            layer = 0
        below = tuple(None if s is None else load(blocks, cid_bytes(s["$link"]), layer - 1) for s in subtrees)
        node = mst.Node(layer, entries, below)
    node.cid, node.link = cid, b"\xd8\x2a\x58\x25\x00" + cid
    return node


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_seed_gives_the_same_bytes_in_any_process(mix: Any) -> None:
    code = (
        "import hashlib; from fastworker.simulator.network import Network\n"
        f"frames = Network(5, mix={mix!r}, history=20).frames(400)\n"
        "print(hashlib.sha256(b''.join(frame.data for frame in frames)).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": n},
        ).stdout
        for n in ("0", "1234")
    }
    here = hashlib.sha256(b"".join(f.data for f in Network(5, mix=mix, history=20).frames(400))).hexdigest()
    assert digests == {here + "\n"}
    other = hashlib.sha256(b"".join(f.data for f in Network(6, mix=mix, history=20).frames(400))).hexdigest()
    assert other != here


@pytest.mark.parametrize("mix", MIXES)
def test_every_frame_means_what_its_event_says(mix: Any) -> None:
    kinds: Counter[str] = Counter()
    for frame in Network(3, mix=mix, accounts=40, history=40).frames(1_500):
        header, payload = message(frame)
        event = frame.event
        kinds[header["t"]] += 1
        assert payload.get("seq") == frame.seq
        if event is None:
            assert header["t"] in {"#info", "#future"}
            continue
        assert header == {"op": 1, "t": "#" + event["kind"]}
        assert payload["time"] == event["time"]
        assert event["seq"] == frame.seq
        if event["kind"] == "commit":
            assert (payload["repo"], payload["rev"]) == (event["repo"], event["rev"])
            blocks = blocks_of(payload["blocks"])
            for op, told in zip(payload["ops"], event["ops"], strict=True):
                assert (op["action"], op["path"]) == (told["action"], told["path"])
                assert (op["cid"] and cid_text(op["cid"])) == told["cid"]
                if "record" in told:
                    assert encode(told["record"]) == blocks[op["cid"]]
                    assert hashlib.sha256(blocks[op["cid"]]).digest() == op["cid"][4:]
        elif event["kind"] == "account":
            assert (payload["did"], payload["active"]) == (event["did"], event["active"])
            assert payload.get("status") == event["status"]
        elif event["kind"] == "identity":
            assert (payload["did"], payload.get("handle")) == (event["did"], event["handle"])
    assert {"#commit", "#identity", "#account"} <= set(kinds)


@pytest.mark.parametrize("mix", MIXES)
def test_repositories_are_true_chains(mix: Any) -> None:
    """Hashes, roots, revs, `since`, `prev`; and undoing a commit's ops inside its own proof gives `prevData`."""
    last: dict[str, tuple[str, bytes]] = {}
    seen: set[int] = set()
    undone = 0
    for frame in Network(4, mix=mix, accounts=30, history=60).frames(1_200):
        event = frame.event
        if event is None or event["kind"] not in {"commit", "sync"} or frame.seq in seen:
            continue
        assert frame.seq is not None
        seen.add(frame.seq)
        _, payload = message(frame)
        blocks = blocks_of(payload["blocks"])
        did = event.get("repo") or event["did"]
        (root,) = libipld.decode_dag_cbor(payload["blocks"][1 : 1 + payload["blocks"][0]])["roots"]
        assert next(iter(blocks)) == root, "the commit block comes first"
        commit = libipld.decode_dag_cbor(blocks[root])
        assert hashlib.sha256(blocks[root]).digest() == root[4:]
        assert set(commit) == {"did", "rev", "sig", "data", "prev", "version"}
        assert (commit["did"], commit["rev"], commit["version"], commit["prev"]) == (did, event["rev"], 3, None)
        assert len(commit["sig"]) == 64
        if event["kind"] == "commit":
            assert payload["commit"] == root
            if did in last and payload["since"] is not None:
                assert (payload["since"], payload["prevData"]) == last[did]
            tree = load(blocks, commit["data"])
            assert commit["data"] in blocks
            if all(op["action"] in {"create", "update", "delete"} for op in payload["ops"]):
                for op in reversed(payload["ops"]):
                    key = op["path"].encode()
                    if op["action"] != "delete":
                        assert mst.get(tree, key) == op["cid"]
                    if op.get("prev") is not None:
                        tree = mst.put(tree, key, op["prev"])
                    elif op["action"] != "delete":
                        tree = mst.remove(tree, key)
                assert mst.seal(tree) == payload["prevData"]
                undone += 1
        if did in last:
            assert event["rev"] > last[did][0]
        last[did] = (event["rev"], commit["data"])
    assert undone > 700


def test_a_repository_holds_exactly_its_live_records() -> None:
    network = Network(9, accounts=5)
    held: dict[str, dict[str, str]] = {}
    for frame in network.frames(1_500):
        if told(frame)["kind"] == "commit":
            records = held.setdefault(told(frame)["repo"], {})
            for op in told(frame)["ops"]:
                if op["action"] == "delete":
                    del records[op["path"]]
                else:
                    assert (op["action"] == "update") == (op["path"] in records)
                    records[op["path"]] = op["cid"]
    for number in range(5):
        account = network.world.account(number)
        root, blocks = mst.blocks(account.repo.root, ())
        whole: dict[bytes, bytes] = dict(blocks)
        stack = [account.repo.root]
        while stack:
            node = stack.pop()
            cid = node.cid
            assert cid is not None
            whole[cid] = node.encode()
            stack += [below for below in node.subtrees if below is not None]
        assert {p: cid_text(c) for p, c in read_tree(whole, root)} == held.get(account.did, {})


def test_production_has_the_measured_shares() -> None:
    ops: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    total = 0
    sizes: dict[str, list[int]] = {}
    posts: Counter[str] = Counter()
    authors = []
    for frame in Network(11).frames(8_000):
        kinds[told(frame)["kind"]] += 1
        if told(frame)["kind"] != "commit":
            continue
        authors.append(told(frame)["repo"])
        for op in told(frame)["ops"]:
            total += 1
            collection = op["path"].split("/")[0]
            ops[op["action"]] += 1
            if op["action"] == "create":
                ops[collection] += 1
                sizes.setdefault(collection, []).append(len(encode(op["record"])))
            if op["action"] == "create" and collection == "app.bsky.feed.post":
                posts.update(op["record"].keys())
                posts["non-ascii"] += not op["record"]["text"].isascii()
                posts["count"] += 1
    assert 0.005 < (kinds["identity"] + kinds["account"]) / 8_000 < 0.015
    assert 0.03 < ops["delete"] / total < 0.045
    assert 0.003 < ops["update"] / total < 0.012
    for collection, share in {"like": 0.66, "post": 0.12, "repost": 0.10}.items():
        assert abs(ops[f"app.bsky.feed.{collection}"] / ops["create"] - share) < 0.02, collection
    assert abs(ops["app.bsky.graph.follow"] / ops["create"] - 0.07) < 0.01
    for member, share in {"reply": 0.52, "embed": 0.34, "facets": 0.205, "langs": 0.94}.items():
        assert abs(posts[member] / posts["count"] - share) < 0.05, member
    assert 0.2 < posts["non-ascii"] / posts["count"] < 0.6
    assert 225 < sum(sizes["app.bsky.feed.like"]) / len(sizes["app.bsky.feed.like"]) < 250
    assert 420 < sum(sizes["app.bsky.feed.post"]) / len(sizes["app.bsky.feed.post"]) < 560
    assert max(Counter(authors).values()) / len(authors) < 0.02, "no account dominates"
    window = [len(set(authors[at : at + 150])) for at in range(0, 7_500, 150)]
    assert sum(window) / len(window) > 140, "149 of 150 in the capture"


def test_surge_is_the_follow_wave() -> None:
    ops: Counter[str] = Counter()
    for frame in Network(11, mix="surge").frames(4_000):
        ops.update(op["path"].split("/")[0] for op in told(frame).get("ops", ()) if op["action"] == "create")
    assert abs(ops["app.bsky.graph.follow"] / ops.total() - 0.333) < 0.03
    assert abs(ops["app.bsky.feed.like"] / ops.total() - 0.473) < 0.03


def test_history_makes_the_proofs_of_large_repositories() -> None:
    frames = [(frame, payload, blocks) for frame, (_, payload, blocks) in sized(Network(2, history=2_000), 600)]
    mean = sum(len(frame.data) for frame, _, _ in frames) / len(frames)
    nodes = sum(len(blocks) - 1 - len(payload["ops"]) for _, payload, blocks in frames) / len(frames)
    assert 3_500 < mean < 5_500
    assert 5 < nodes < 9


def sized(network: Network, count: int) -> Any:
    for frame in network.frames(count):
        if told(frame)["kind"] == "commit" and len(told(frame)["ops"]) == 1:
            yield frame, next(commits([frame]))


def test_the_adversary_does_everything_it_is_known_for() -> None:
    network = Network(1, mix="adversarial")
    seqs: list[int] = []
    found: Counter[Any] = Counter()
    live: dict[str, set[str]] = {}
    for frame in network.frames(6_000):
        event = frame.event
        if frame.seq is not None:
            again = frame.seq in seqs[-200:]
            assert again or frame.seq > max(seqs[-300:], default=0), "only a duplicate goes back"
            found["duplicate"] += again
            seqs.append(frame.seq)
        if event is None:
            found["info" if frame.seq is None else "unknown"] += 1
            continue
        found[event["kind"]] += 1
        if event["kind"] == "account":
            found[event["status"] or str(event["active"])] += 1
        if event["kind"] == "identity":
            found["without handle"] += event["handle"] is None
        if event["kind"] != "commit":
            continue
        ops = event["ops"]
        found["empty"] += not ops
        found["200 ops"] += len(ops) == 200
        held = live.setdefault(event["repo"], set())
        paths = [op["path"] for op in ops]
        found["one path twice"] += len(set(paths)) < len(paths)
        for op in ops:
            path = op["path"]
            collection = path.partition("/")[0]
            found[collection] += 1
            record = op.get("record")
            if op["action"] == "delete":
                found["delete unseen"] += path not in held
                held.discard(path)
                continue
            found["no record"] += record is None
            found["recreate"] += op["action"] == "create" and path in held
            held.add(path)
            if record is not None:
                found["NUL"] += "\\x00" in repr(record)
                found["surrogate"] += "\\ud83d" in repr(record)
                found["wrong $type"] += record.get("$type", collection) != collection
                found["no date"] += not isinstance(record.get("createdAt"), str)
                found["year 0"] += str(record.get("createdAt", "")).startswith("0000")
                found["mismatching gate"] += collection.endswith("gate") and path.split("/")[1] not in str(
                    record.get("post")
                )
                if collection.endswith("listitem"):
                    found["foreign list"] += event["repo"] not in str(record.get("list"))
    wanted = {
        *COLLECTIONS, "duplicate", "info", "unknown", "commit", "identity", "account", "sync", "takendown", "suspended",
        "deactivated", "deleted", "desynchronized", "throttled", "unheard-of", "without handle", "empty", "200 ops",
        "one path twice", "delete unseen", "recreate", "no record", "NUL", "surrogate", "wrong $type", "no date",
        "year 0",
        "mismatching gate", "foreign list",
    }  # fmt: skip
    assert not {name for name in wanted if not found[name]}


def test_pairs_have_twins_and_lose_either() -> None:
    likes: dict[tuple[str, str], set[str]] = {}
    twins = lost = 0
    for frame in Network(1, mix="adversarial", weights={"odd": 0}).frames(4_000):
        for op in (frame.event or {}).get("ops", ()):
            uri = f"{told(frame)['repo']}/{op['path']}"
            if "app.bsky.feed.like" not in op["path"] or op["action"] != "create" or "record" not in op:
                for pair in likes.values():
                    lost += op["action"] == "delete" and len(pair) > 1 and uri in pair
                    pair.discard(uri)
                continue
            if "subject" not in op["record"]:
                continue  # a block that is read leniently
            pair = likes.setdefault((told(frame)["repo"], op["record"]["subject"]["uri"]), set())
            pair.add(uri)
            twins += len(pair) > 1
    assert twins > 20
    assert lost > 5


def test_weights_switch_moves_off_and_typos_are_refused() -> None:
    quiet = dict.fromkeys(ADVERSARIAL, 0) | {"create": 1}
    frames = list(Network(1, mix="adversarial", weights=quiet).frames(300))
    assert {op["action"] for frame in frames for op in told(frame)["ops"]} == {"create"}
    with pytest.raises(ValueError, match="updaet"):
        Network(1, mix="adversarial", weights={"updaet": 1})


def test_frames_made_by_hand() -> None:
    repo = Repo("did:plc:handmade", Clock(start_seq=100))
    record = {"$type": "app.bsky.feed.post", "text": "one", "createdAt": "2026-07-04T14:38:07.517Z"}
    first = repo.commit([("create", "app.bsky.feed.post/3a", record)])
    second = repo.commit(
        [
            ("update", "app.bsky.feed.post/3a", record | {"text": "two"}),
            ("create", "app.bsky.feed.post/3b", Lost(record)),
            ("create", "app.bsky.feed.post/3c", Lost(record | {"text": "x"}, b"\xa0")),
            ("create", "app.bsky.feed.post/3d", Block(b"\xff", None)),
        ]
    )
    third = repo.commit([("delete", "app.bsky.feed.post/3a", None)])
    assert [frame.seq for frame in (first, second, third)] == [100, 101, 102]
    _, payload = message(second)
    blocks = blocks_of(payload["blocks"])
    update, lost, other, bad = payload["ops"]
    assert update["prev"] == message(first)[1]["ops"][0]["cid"]
    assert lost["cid"] not in blocks
    assert blocks[other["cid"]] == b"\xa0"
    assert blocks[bad["cid"]] == b"\xff"
    assert ["record" in op for op in told(second)["ops"]] == [True, False, False, False]
    _, payload = message(third)
    assert payload["ops"][0] | {"prev": b""} == {
        "action": "delete",
        "path": "app.bsky.feed.post/3a",
        "cid": None,
        "prev": b"",
    }
    assert payload["since"] == told(second)["rev"]


def test_a_clean_car_is_read_back() -> None:
    frame = Repo("did:plc:handmade").commit(good_likes())
    car = message(frame)[1]["blocks"]
    header, blocks = libipld.decode_car(car)
    root, mine = read_car(car)
    assert header == {"version": 1, "roots": [root]}
    assert list(mine) == list(blocks)
    with pytest.raises(ValueError, match="other bytes"):
        read_car(car[:-1] + b"!")
    with pytest.raises(ValueError, match="truncated"):
        read_car(car[:-1])


def test_tids_sort_as_time_does() -> None:
    moments = [0, 1, 31, 32, 1_783_175_887_517_000, 1_783_175_887_517_001, 2**53 - 1]
    assert [tid(m) for m in moments] == sorted(tid(m) for m in moments)
    assert tid(0) == "2222222222222"
    assert tid(1_783_175_887_507_805, 3).startswith("3mptby")


def test_time_and_seq_only_go_forward() -> None:
    frames = list(Network(1).frames(500))
    assert [frame.seq for frame in frames] == list(range(START_SEQ, START_SEQ + 500))
    assert all(told(a)["time"] <= told(b)["time"] for a, b in itertools.pairwise(frames))


def test_error_frames() -> None:
    assert libipld.decode_dag_cbor_multi(error_frame("FutureCursor", "no")) == [
        {"op": -1},
        {"error": "FutureCursor", "message": "no"},
    ]


def test_hostile_messages_are_many_and_the_same_every_time() -> None:
    cases = list(hostile_frames(1))
    assert len(cases) > 2_000
    assert len({name for name, _ in cases}) == len(cases)
    assert cases == list(hostile_frames(1))
    good = Repo("did:plc:hostilehostilehostileho2", Clock()).commit(good_likes()).data
    assert good not in {data for _, data in cases}


def test_the_siblings_of_a_hostile_op_are_whole() -> None:
    """In every case named `record is ...` the first and the last like can still be had."""
    checked = 0
    for name, data in hostile_frames():
        if name.startswith("record is "):
            _, payload = libipld.decode_dag_cbor_multi(data)
            blocks = blocks_of(payload["blocks"])
            first, middle, last = payload["ops"]
            for op, (_, path, record) in zip((first, last), (good_likes()[0], good_likes()[2]), strict=True):
                assert op["path"] == path
                assert decode(blocks[op["cid"]]) == record
            assert DAG_CBOR + hashlib.sha256(blocks[middle["cid"]]).digest() == middle["cid"]
            checked += 1
    assert checked > 30


def test_nothing_under_test_is_imported() -> None:
    code = (
        "import sys, fastworker.simulator.network, fastworker.simulator.relay, fastworker.law.model\n"
        "rooms = ('event', 'table', 'store', 'stream', 'reader', 'worker', 'process')\n"
        "parts = tuple('fastworker.' + room for room in rooms)\n"
        "print([m for m in sys.modules if m.startswith(parts)])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_live_network_dates_what_happens_now_and_time_never_stands() -> None:
    before = time.time()
    network = Network(3, accounts=20, clock=LiveClock())
    times = [told(frame)["time"] for frame in network.frames(200)]
    revs = [told(frame)["rev"] for frame in network.frames(200) if told(frame)["kind"] == "commit"]
    dates = [datetime.fromisoformat(text).timestamp() for text in times]
    assert before - 0.001 <= dates[0] <= dates[-1] <= time.time() + 0.001
    assert revs == sorted(set(revs))


def test_a_network_without_end_forgets_its_busiest_accounts() -> None:
    network = Network(3, accounts=60, records_max=400)
    everybody = set()
    for _ in range(3_000):
        for frame in network.step():
            everybody.add(told(frame).get("repo") or told(frame)["did"])
        accounts = list(network.world._accounts.values())
        assert sum(len(account.live) for account in accounts) <= 400
    assert len(accounts) <= 60 < len(everybody), "others took their places"
    assert len(network.world._persons) <= 60
    kept = {id(account) for account in accounts}
    assert isinstance(network._traffic, Production)
    assert {id(account) for account in network._traffic._writers} <= kept

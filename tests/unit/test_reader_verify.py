"""Verdicts of single commits at the level `full`: what is covered by signature, tree or chain cannot change unseen."""

from __future__ import annotations

import base64
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fastworker.errors import InvalidEvent
from fastworker.event import Commit
from fastworker.event.frame import open_frame, read_frame
from fastworker.event.recording import FramesFile
from fastworker.reader.chain import Chain
from fastworker.reader.stats import ReaderStats
from fastworker.reader.verify import Verifier, only_proved
from fastworker.simulator.cbor import cid_text, encode
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.repo import Clock, Repo, Write, tid
from fastworker.stream.chunk import Chunk
from fastworker.sync.keys import multikey_of

DID = "did:plc:" + "a" * 24


class Known(dict[str, str]):
    """Keys by DID."""

    def key(self, did: str) -> str | None:
        return self.get(did)

    def changed(self, did: str) -> None:
        pass


def verdict(frame: bytes, keys: Known | None, *, since: str, before: bytes, full: bool = True) -> str | None:
    """At level `full`, after that state; None where it is no commit at all. `keys` None: at level `chain`."""
    try:
        header, payload = open_frame(frame)
        commit = read_frame(header, payload, "relay.test")
    except InvalidEvent:
        return None
    if not isinstance(commit, Commit):
        return None
    chain = Chain(None, 1 << 16)
    chain.replace(commit.repo if keys is None else next(iter(keys)), since, before)
    stats = ReaderStats()
    Verifier(chain, keys, stats, lambda *_: None, full=full).put(Chunk(), commit, payload, frame)
    chain.close()
    return next((name for name, count in stats.verdicts.items() if count), "aside")


def said(payload: dict[str, Any]) -> tuple[Any, ...]:
    """What a commit says, less `seq` and `time`, which nothing covers. A member that is absent is as good as null."""
    ops = [tuple(op.get(name) for name in ("action", "path", "cid", "prev")) for op in payload["ops"]]
    return ops, *(payload.get(name) for name in ("repo", "rev", "commit", "blocks", "prevData", "since"))


def flipped(frame: bytes, positions: list[int], chance: random.Random) -> list[bytes]:
    found = []
    for position in positions:
        changed = bytearray(frame)
        changed[position] ^= 1 << chance.randrange(8)
        found.append(bytes(changed))
    return found


def like(number: int) -> dict[str, Any]:
    subject = {"uri": f"at://{DID}/app.bsky.feed.post/{number}", "cid": "bafyreid"}
    return {"$type": "app.bsky.feed.like", "subject": subject, "createdAt": "2026-07-04T00:00:00Z"}


def path(number: int) -> str:
    return f"app.bsky.feed.like/{tid(1_780_000_000_000_000 + number)}"


def test_no_flipped_bit_is_ever_ok() -> None:
    chance = random.Random(1)
    key = SigningKey("one")
    repo = Repo(DID, Clock(), key=key)
    repo.commit([("create", path(number), like(number)) for number in range(60)])
    writes: list[Write] = [("create", path(900), like(1)), ("update", path(7), like(99)), ("delete", path(8), None)]
    frame = repo.commit(writes).data
    payload = open_frame(frame)[1]
    state = {"since": payload["since"], "before": payload["prevData"]}
    assert verdict(frame, Known({DID: key.multikey}), **state) == "ok"
    seen: Counter[str | None] = Counter()
    for changed in flipped(frame, list(range(len(frame))), chance):
        found = verdict(changed, Known({DID: key.multikey}), **state)
        seen[found] += 1
        if found == "ok":
            assert said(open_frame(changed)[1]) == said(payload)
    assert seen["ok"] < 100, "seq, time and the empty lists"
    assert min(seen[name] for name in ("inversion", "bad_commit", "break")) > 0, seen
    assert seen["legacy"] <= 8 * len(b"prevData"), "its name is another one: as a host of before sync 1.1 says it"


def stripped(frame: bytes, *names: str, without_op: int | None = None) -> bytes:
    """What a relay could send instead of a frame: nothing of the envelope is signed."""
    header, payload = open_frame(frame)
    ops = [op for number, op in enumerate(payload["ops"]) if number != without_op]
    told = [{name: _json(value) for name, value in op.items() if name not in names} for op in ops]
    rest = {name: _json(value) for name, value in payload.items() if name not in names}
    blocks = {"$bytes": base64.b64encode(payload["blocks"]).decode()}
    return encode(header) + encode({**rest, "blocks": blocks, "ops": told})


def _json(value: Any) -> Any:
    return {"$link": cid_text(value)} if isinstance(value, bytes) and len(value) == 36 else value


def test_prev_data_that_a_relay_takes_away_hides_nothing() -> None:
    """Without it the ops say what the tree before them was, and the chain what it was: an op that is left out is missed."""
    key = SigningKey("one")
    repo = Repo(DID, Clock(), key=key)
    repo.commit([("create", path(number), like(number)) for number in range(60)])
    writes: list[Write] = [("create", path(900), like(1)), ("create", path(901), like(2)), ("delete", path(8), None)]
    frame = repo.commit(writes).data
    payload = open_frame(frame)[1]

    def judged(data: bytes) -> str | None:
        return verdict(data, Known({DID: key.multikey}), since=payload["since"], before=payload["prevData"])

    assert judged(stripped(frame)) == "ok"
    assert judged(stripped(frame, "prevData")) == "legacy"  # told, and counted
    for number in range(3):
        assert judged(stripped(frame, without_op=number)) == "inversion"
        assert judged(stripped(frame, "prevData", without_op=number)) == "break"
        assert judged(stripped(frame, "prevData", "since", without_op=number)) == "break"
    assert judged(stripped(frame, "prevData", "prev")) == "legacy"  # nothing can be said of a delete without its prev
    assert judged(stripped(frame, "prevData", "since")) == "legacy"


TAKEN = re.compile(
    r"^\| ((?:\(nothing\)|`[a-zA-Z]+`(?:, )?)+) \| ([a-z`, ]+) \| (`[a-z]+`) \| (`[a-z]+`) \| (`[a-z]+`) \|$",
    re.MULTILINE,
)


def test_what_each_level_says_of_a_commit_of_which_something_was_taken() -> None:
    """The table in docs/proofs.md, which says it to operators."""
    table = TAKEN.findall((Path(__file__).resolve().parents[2] / "docs" / "proofs.md").read_text("utf-8"))
    repo, key = Repo(DID, Clock(), key=(signer := SigningKey("one"))), signer.multikey
    repo.commit([("create", path(number), like(number)) for number in range(60)])
    lost = open_frame(repo.commit([("create", path(700), like(1))]).data)[1]
    writes: list[Write] = [("create", path(900), like(1)), ("create", path(901), like(2)), ("delete", path(8), None)]
    frame = repo.commit(writes).data
    payload = open_frame(frame)[1]
    known = {"since": payload["since"], "before": payload["prevData"]}
    older = {"since": lost["since"], "before": lost["prevData"]}
    levels: dict[str, tuple[Known | None, bool]] = {
        "chain": (None, False),
        "signed": (Known({DID: key}), False),
        "full": (Known({DID: key}), True),
    }
    seen = set()
    for taken, at, *expected in table:
        names = [name.strip("`") for name in taken.split(", ") if name != "(nothing)"]
        for level in at.replace("`", "").split(", "):
            keys, full = levels[level]
            found = [
                verdict(stripped(frame, *names), keys, full=full, **known),
                verdict(stripped(frame, *names, without_op=0), keys, full=full, **known),
                verdict(stripped(frame, *names), keys, full=full, **older),
            ]
            assert found == [one.strip("`") for one in expected], (names, level)
            seen.add((frozenset(names), level))
    assert len(seen) == 8 * 3, "each set of the three members, at each level"


@pytest.mark.real_data
def test_every_real_commit_is_ok_and_no_changed_one_is(real_data: Path, tmp_path: Path) -> None:
    def unpacked(name: str) -> bytes:
        return zstandard.ZstdDecompressor().decompressobj().decompress((real_data / "frames" / name).read_bytes())

    (tmp_path / "frames").write_bytes(unpacked("frames.bin.zst"))
    documents = json.loads(unpacked("did_docs.json.zst"))
    chance = random.Random(2)
    seen: Counter[str | None] = Counter()
    proved = 0
    for frame in FramesFile(tmp_path / "frames", little_endian=True):
        header, payload = open_frame(frame)
        if header["t"] != "#commit":
            continue
        keys = Known({payload["repo"]: multikey_of(documents[payload["repo"]]) or ""})
        state = {"since": payload["since"], "before": payload["prevData"]}
        assert verdict(frame, keys, **state) == "ok"
        proved += 1
        for changed in flipped(frame, chance.sample(range(len(frame)), 40), chance):
            found = verdict(changed, keys, **state)
            seen[found] += 1
            if found == "ok":
                assert said(open_frame(changed)[1]) == said(payload)
    assert proved == 148
    assert seen["ok"] < 148 * 3


def test_what_is_not_proved_becomes_a_drop() -> None:
    frame = Repo(DID, Clock()).commit([("create", path(1), like(1)), ("create", path(2), like(2))]).data
    commit = read_frame(*open_frame(frame))
    assert isinstance(commit, Commit)
    left = only_proved(commit, frozenset((path(2),)))
    assert [op.rkey for op in left.ops] == [path(2).rpartition("/")[2]]
    assert [(drop.reason, drop.detail) for drop in left.drops] == [("unproved_op", path(1))]
    assert only_proved(commit, frozenset()).ops == []

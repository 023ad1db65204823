"""What each level of verification costs the reader per commit, and the whole of a frame beside it.

Real frames where they are (REAL_DATA), else simulated ones of repositories with 2,000 records.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import zstandard

from bench.report import Figures
from fastworker.event import Commit
from fastworker.event.entry import encode_frame_entry, encode_json, encode_native
from fastworker.event.frame import open_frame, read_frame
from fastworker.event.proof import read_link
from fastworker.event.recording import FramesFile
from fastworker.reader.chain import Chain
from fastworker.reader.stats import ReaderStats
from fastworker.reader.verify import Verifier
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.repo import Repo, tid
from fastworker.stream.chunk import Chunk
from fastworker.sync.keys import multikey_of

CHAIN_BYTES = 128 * 1024 * 1024


class _Keys(dict[str, str]):
    def key(self, did: str) -> str | None:
        return self.get(did)

    def changed(self, did: str) -> None:
        pass


class Frames(NamedTuple):
    kind: str
    frames: list[bytes]
    keys: _Keys


def frames_to_verify(commits: int) -> Frames:
    folder = Path(os.environ.get("REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "frames"
    return _real(folder) if folder.is_dir() else _simulated(commits)


def _real(folder: Path) -> Frames:
    def unpacked(name: str) -> bytes:
        return zstandard.ZstdDecompressor().decompressobj().decompress((folder / name).read_bytes())

    documents = json.loads(unpacked("did_docs.json.zst"))
    with TemporaryDirectory(prefix="fastworker-bench-") as temporary:
        path = Path(temporary) / "frames"
        path.write_bytes(unpacked("frames.bin.zst"))
        frames = [frame for frame in FramesFile(path, little_endian=True) if open_frame(frame)[0]["t"] == "#commit"]
    dids = {open_frame(frame)[1]["repo"] for frame in frames}
    return Frames("real", frames, _Keys({did: multikey_of(documents[did]) or "" for did in dids}))


def _simulated(commits: int) -> Frames:
    frames: list[bytes] = []
    keys = _Keys()
    for number in range(4):
        key = SigningKey(f"verify {number}")
        repo = Repo(f"did:plc:{'bcde'[number] * 24}", key=key)
        keys[repo.did] = key.multikey
        for start in range(0, 2_000, 200):
            repo.commit([("create", _path(n), _like(n)) for n in range(start, start + 200)])
        new = range(10_000_000, 10_000_000 + commits // 4)
        frames += [repo.commit([("create", _path(n), _like(n))]).data for n in new]
    return Frames("simulated", frames, keys)


def verify(commits: int, rounds: int) -> Figures:
    """Microseconds per commit: the reader's own work on it, and what each level adds."""
    given = frames_to_verify(commits)
    opened = [(frame, *open_frame(frame)) for frame in given.frames]
    read = [(frame, payload, read_frame(header, payload, "relay.test")) for frame, header, payload in opened]
    of_commits = [(frame, payload, event) for frame, payload, event in read if isinstance(event, Commit)]

    def judged(keys: _Keys | None, *, full: bool) -> Callable[[], None]:
        """Each commit follows what is known of its account."""
        chain = Chain(None, CHAIN_BYTES)
        seen = set()
        for _, payload, commit in of_commits:
            if commit.repo not in seen and payload.get("since") and payload.get("prevData"):
                chain.replace(commit.repo, payload["since"], payload["prevData"])
            seen.add(commit.repo)
        verifier = Verifier(chain, keys, ReaderStats(), lambda *_: None, full=full)

        def work() -> None:
            for frame, payload, commit in of_commits:
                verifier.put(Chunk(), commit, payload, frame)

        return work

    def each(work: Callable[[bytes, dict[str, Any], Commit], object]) -> Callable[[], None]:
        def run() -> None:
            for one in of_commits:
                work(*one)

        return run

    works: dict[str, Callable[[], Callable[[], None]]] = {
        "decode us": lambda: each(lambda frame, _, __: read_frame(*open_frame(frame), "relay.test")),
        "encode json us": lambda: each(lambda _, __, commit: encode_json(commit)),
        "encode native us": lambda: each(lambda _, __, commit: encode_native(commit)),
        "encode frame us": lambda: each(lambda frame, _, __: encode_frame_entry(frame, "relay.test")),
        "a chunk and a call us": lambda: each(lambda *_: Chunk()),
        "chain us": lambda: judged(None, full=False),
        "of that the commit block us": lambda: each(lambda _, said, one: read_link(said, one.repo, one.rev or "")),
        "signed us": lambda: judged(given.keys, full=False),
        "full us": lambda: judged(given.keys, full=True),
    }
    best = dict.fromkeys(works, float("inf"))
    for _, (name, prepare) in itertools.product(range(rounds), works.items()):  # in turns: a slow moment meets all
        work = prepare()
        started = time.process_time()
        work()
        best[name] = min(best[name], time.process_time() - started)
    count = len(of_commits)
    return {
        "frames": given.kind,
        "commits": count,
        "frame bytes": sum(len(frame) for frame in given.frames) / count,
        **{name: seconds / count * 1e6 for name, seconds in best.items()},
    }


def _path(number: int) -> str:
    return f"app.bsky.feed.like/{tid(1_780_000_000_000_000 + number * 1_000_003)}"


def _like(number: int) -> dict[str, Any]:
    uri = f"at://did:plc:{'b' * 24}/app.bsky.feed.post/{number}"
    return {
        "$type": "app.bsky.feed.like",
        "subject": {"uri": uri, "cid": "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"},
        "createdAt": "2026-07-04T14:38:07.517Z",
    }

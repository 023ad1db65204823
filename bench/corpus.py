"""The same events for every run: the simulated network's production mix, kept in the user's cache by seed and size."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastworker.errors import InvalidEvent
from fastworker.event.entry import encode_json, encode_native
from fastworker.event.frame import decode_frame
from fastworker.simulator.network import Network

Fields = dict[bytes, bytes]
FORMS = ("native", "json", "frame")
ACCOUNTS = 16_000
_ENTRIES = msgspec.msgpack.Decoder(list[dict[bytes, bytes]])
PIECE = 1_000


def cache() -> Path:
    """Where what takes long to make is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastworker-bench"


def _folder(seed: int, events: int) -> Path:
    return cache() / f"seed-{seed}-{events}"


def prepare(seed: int, events: int) -> Path:
    """Make the corpus if it is not there: per form a file of pieces, `[u32 length][msgpack]`; and the raw frames."""
    folder = _folder(seed, events)
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    network = Network(seed, mix="production", accounts=ACCOUNTS, history=0)
    files = {form: (folder / form).open("wb") for form in FORMS}
    frames = (folder / "corpus.frames").open("wb")
    pieces: dict[str, list[Fields]] = {form: [] for form in FORMS}
    made, told = 0, time.monotonic()
    try:
        for sim in network.frames(events):
            frames.write(len(sim.data).to_bytes(4, "big") + sim.data)
            try:
                event = decode_frame(sim.data, None)
            except InvalidEvent:
                continue
            pieces["native"].append(dict(encode_native(event)))  # type: ignore[arg-type]
            if (fields := encode_json(event)) is not None:  # type: ignore[arg-type]
                pieces["json"].append(dict(fields))
            pieces["frame"].append({b"f": sim.data, b"relay": b"bench"})
            made += 1
            if made % PIECE == 0:
                _flush(files, pieces)
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    print(f"corpus: {made:,} of {events:,} events", file=sys.stderr, flush=True)
        _flush(files, pieces)
    finally:
        for file in (*files.values(), frames):
            file.close()
    (folder / "done").touch()
    return folder


def _flush(files: Mapping[str, Any], pieces: dict[str, list[Fields]]) -> None:
    for form, entries in pieces.items():
        data = msgspec.msgpack.encode(entries)
        files[form].write(len(data).to_bytes(4, "big") + data)
        entries.clear()


def frames_only(seed: int, events: int) -> Path:
    """A file of raw frames alone: for runs that are too long for `prepare`."""
    path = _folder(seed, events) / "only.frames"  # not the one that an interrupted `prepare` may have left
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    made, told = 0, time.monotonic()
    with unfinished.open("wb") as file:
        for sim in Network(seed, mix="production", accounts=ACCOUNTS, history=0).frames(events):
            file.write(len(sim.data).to_bytes(4, "big") + sim.data)
            made += 1
            if time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"corpus: {made:,} of {events:,} frames", file=sys.stderr, flush=True)
    unfinished.rename(path)
    return path


def entries(folder: Path, form: str, count: int) -> Iterator[Fields]:
    """The first `count` entries of a form."""
    with (folder / form).open("rb") as file:
        left = count
        while left > 0 and (head := file.read(4)):
            for fields in _ENTRIES.decode(file.read(int.from_bytes(head, "big")))[:left]:
                yield fields
                left -= 1

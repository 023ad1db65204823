"""Any bytes at all: only InvalidEvent comes out, in bounded time and memory.

Whatever a relay, a PDS, an old worker or a hand at redis-cli can put before the decoders: noise, and valid input bent
by a few mutations, which gets much further. `--extended` goes on for ten minutes (FUZZ_SECONDS).
"""

from __future__ import annotations

import os
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastworker.errors import InvalidEvent
from fastworker.event import Commit, ErrorFrame, Event, Info, Op, Unknown
from fastworker.event.entry import decode_entry, encode_json, encode_native
from fastworker.event.frame import decode_frame
from fastworker.event.record import json_text, load_record
from fastworker.simulator.network import Network, hostile_frames
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit

SECONDS_PER_MB = 5.0  # of one core; an honest frame takes a hundredth of it
MEMORY_PER_BYTE = 400
NOW_MS = 1_783_175_890_114


def store(event: Event) -> None:
    """What the pipeline does with an event."""
    if isinstance(event, Commit):
        Batch().put(map_commit(event, NOW_MS))


def frame(data: bytes) -> None:
    event = decode_frame(data, "relay.test")
    if isinstance(event, Info | ErrorFrame | Unknown):
        return
    store(event)
    # what the reader puts on a stream is understood by the worker
    store(decode_entry(dict(encode_native(event))))
    fields = encode_json(event)
    if fields is not None:
        try:
            store(decode_entry(dict(fields)))
        except InvalidEvent as error:
            raise AssertionError(f"the reader wrote an entry that the worker refuses: {error}") from error


def frame_entry(data: bytes) -> None:
    store(decode_entry({b"f": data, b"relay": b"relay.test"}))


def native_entry(data: bytes) -> None:
    store(decode_entry({b"n": data}))


def json_entry(data: bytes) -> None:
    for kind in (b"commit", b"identity", b"account"):
        try:
            store(decode_entry({b"type": kind, b"data": data, b"seq": b"7"}))
        except InvalidEvent:
            continue


def record(data: bytes) -> None:
    for collection in ("app.bsky.feed.post", "app.bsky.actor.profile", "app.bsky.feed.threadgate"):
        op = Op("create", collection, "self", "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge", data, None)
        json_text(load_record(op), op)
        store(
            Commit(seq=7, repo="did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", rev=None, time=None, ops=[op], drops=[], relay=None)
        )


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frame": frame,
    "frame entry": frame_entry,
    "native entry": native_entry,
    "JSON entry": json_entry,
    "record": record,
}


@cache
def seeds(target: str) -> list[bytes]:
    frames = [f.data for f in Network(3, accounts=30).frames(150)]
    frames += [f.data for f in Network(3, mix="adversarial").frames(150)]
    frames += [data for _, data in hostile_frames()]
    if target in ("frame", "frame entry"):
        return frames
    found = []
    for data in frames:
        try:
            event = decode_frame(data, None)
        except InvalidEvent:
            continue
        if isinstance(event, Info | ErrorFrame | Unknown):
            continue
        if target == "native entry":
            found.append(dict(encode_native(event))[b"n"])
        elif target == "JSON entry":
            fields = encode_json(event)
            found += [dict(fields)[b"data"]] if fields is not None else []
        elif isinstance(event, Commit):
            found += [op.block for op in event.ops if op.block is not None]
    return found


def mutated(r: random.Random, sources: list[bytes]) -> bytes:
    data = bytearray(r.choice(sources))
    for _ in range(r.choice((1, 1, 2, 4, 16))):
        at = r.randrange(len(data) + 1)
        match r.randrange(8):
            case 0:
                data[at:at] = r.randbytes(r.randint(1, 8))
            case 1:
                del data[at : at + r.choice((1, 2, 8, 64, 1_000))]
            case 2 if data:
                data[at % len(data)] ^= 1 << r.randrange(8)
            case 3 if data:
                data[at % len(data)] = r.choice((0, 0x18, 0x5B, 0x7B, 0x80, 0x9B, 0x9F, 0xBB, 0xD8, 0xF9, 0xFF))
            case 4:
                other = r.choice(sources)
                data[at:at] = other[r.randrange(len(other) + 1) :][:200]
            case 5:
                data[at:at] = data[at : at + 50] * r.choice((2, 50))
            case 6:
                data[at:at] = r.choice((b"\x81", b"\xa1\x61a", b"[", b'{"a":')) * r.choice((10, 200, 5_000))
            case _:
                data[at:at] = b"\xd8\x2a\x58\x25\x00" + r.randbytes(36)
    return bytes(data)


def check(run: Callable[[bytes], None], data: bytes) -> None:
    started = time.process_time()
    try:
        run(data)
    except InvalidEvent:
        pass
    except Exception as error:
        raise AssertionError(f"{error!r} of {data[:2_000].hex()}") from error
    took = time.process_time() - started
    assert took < 1.0 + SECONDS_PER_MB * len(data) / 1e6, f"{took:.2f} s for {len(data)} bytes: {data[:2_000].hex()}"


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.binary(max_size=400))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_noise(target: str, data: bytes) -> None:
    check(TARGETS[target], data)


@pytest.mark.parametrize("target", TARGETS)
def test_bent_input(target: str) -> None:
    r = random.Random(f"fuzz {target}")
    for _ in range(1_500):
        check(TARGETS[target], mutated(r, seeds(target)))


@pytest.mark.parametrize("target", TARGETS)
def test_memory_is_bounded_by_the_input(target: str) -> None:
    r = random.Random(f"memory {target}")
    sources = seeds(target)
    check(TARGETS[target], sources[0])
    for _ in range(150):
        data = mutated(r, sources)
        tracemalloc.start()
        try:
            check(TARGETS[target], data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000 + MEMORY_PER_BYTE * len(data), f"{peak:,} bytes for {len(data)}: {data[:500].hex()}"


def _turns() -> Iterator[str]:
    while True:
        yield from TARGETS


@pytest.mark.extended
@pytest.mark.timeout(7_200)
def test_ten_minutes_of_bent_input() -> None:
    until = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "600"))
    r = random.Random()  # another way every time; what it finds is printed as bytes
    count = 0
    for target in _turns():
        for _ in range(200):
            check(TARGETS[target], mutated(r, seeds(target)))
            count += 1
        if time.monotonic() > until:
            break
    sys.stdout.write(f"{count:,} inputs\n")
    assert count > 1_000

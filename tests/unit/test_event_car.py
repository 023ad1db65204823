"""The CAR walk: wanted blocks, and what is left of a CAR that breaks off."""

from __future__ import annotations

import pytest

from fastworker.event.car import is_block_of, select_blocks
from fastworker.simulator.cbor import cid_of
from fastworker.simulator.repo import car_bytes

# One byte of length, two, and three (16,384 is where the third begins).
BLOCKS = [bytes([size % 251]) * size for size in (1, 91, 92, 300, 16_347, 16_348, 40_000, 5)]
CIDS = [cid_of(block) for block in BLOCKS]
CAR = car_bytes(CIDS[0], dict(zip(CIDS, BLOCKS, strict=True)))


def test_every_block_is_found_and_is_what_its_cid_says() -> None:
    found, is_sound = select_blocks(CAR, set(CIDS))
    assert is_sound
    assert found == dict(zip(CIDS, BLOCKS, strict=True))
    assert all(is_block_of(cid, block) for cid, block in found.items())


def test_only_the_wanted_are_kept() -> None:
    assert select_blocks(CAR, {CIDS[3]}) == ({CIDS[3]: BLOCKS[3]}, True)
    assert select_blocks(CAR, set()) == ({}, True)


def test_a_missing_block_is_no_broken_framing() -> None:
    assert select_blocks(CAR, {CIDS[1], b"\x01\x71\x12\x20" + bytes(32)}) == ({CIDS[1]: BLOCKS[1]}, True)


def test_blocks_before_the_break_are_kept_wherever_it_is() -> None:
    """Any prefix gives whole blocks only, and never claims to be sound in the middle of one."""
    ends = [len(car_bytes(CIDS[0], dict(zip(CIDS[:n], BLOCKS[:n], strict=True)))) for n in range(len(CIDS) + 1)]
    wanted = {*CIDS, b"\x01\x71\x12\x20" + bytes(32)}  # one that is not there: the walk goes to the end
    for cut in [*range(700), *range(700, len(CAR), 97), *(end + by for end in ends for by in (-1, 0, 1))]:
        if cut > len(CAR):
            continue
        found, is_sound = select_blocks(CAR[:cut], wanted)
        whole = sum(end <= cut for end in ends) - 1
        assert list(found) == CIDS[: max(whole, 0)], cut
        assert is_sound == (cut in ends), cut


def test_a_second_block_of_the_same_cid_is_ignored() -> None:
    car = CAR + bytes((37,)) + CIDS[0] + b"x"
    found, _ = select_blocks(car, {CIDS[0], b"?"})
    assert found[CIDS[0]] == BLOCKS[0]


@pytest.mark.parametrize(
    "car",
    [
        b"",
        b"\x00",
        b"\x80",
        b"\xff" * 100,
        b"\x3a",
        CAR[:60] + b"\x80" * 20,
        CAR[:60] + b"\x80" * 8 + b"\x01",
        bytes(500),
    ],
)
def test_no_framing(car: bytes) -> None:
    found, _ = select_blocks(car, set(CIDS))
    assert CIDS[5] not in found


def test_a_block_that_is_not_its_own() -> None:
    assert not is_block_of(CIDS[3], BLOCKS[3][:-1] + b"?")

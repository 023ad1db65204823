"""Files of frames."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastworker.errors import ConfigError
from fastworker.event.recording import FramesFile, write_frames
from fastworker.simulator.network import Network

FRAMES = [frame.data for frame in Network(1, accounts=5).frames(40)]


@pytest.mark.parametrize("little_endian", [False, True])
@pytest.mark.parametrize("name", ["x.frames", "x.frames.zst"])
def test_round_trip(tmp_path: Path, name: str, little_endian: bool) -> None:
    pytest.importorskip("zstandard")
    path = tmp_path / name
    assert write_frames(path, FRAMES, little_endian=little_endian) == 40
    file = FramesFile(path, little_endian=little_endian)
    assert list(file) == FRAMES
    assert list(file) == FRAMES, "it can be read again"
    assert file.truncated_bytes == 0
    if not name.endswith("zst"):
        assert int.from_bytes(path.read_bytes()[:4], "little" if little_endian else "big") == len(FRAMES[0])


@pytest.mark.parametrize(("cut", "left"), [(1, len(FRAMES[-1]) + 3), (len(FRAMES[-1]), 4), (len(FRAMES[-1]) + 2, 2)])
def test_a_truncated_tail_is_reported_and_costs_one_frame(tmp_path: Path, cut: int, left: int) -> None:
    path = tmp_path / "x.frames"
    write_frames(path, FRAMES)
    path.write_bytes(path.read_bytes()[:-cut])
    file = FramesFile(path)
    assert list(file) == FRAMES[:-1]
    assert file.truncated_bytes == left


def test_the_wrong_byte_order_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "x.frames"
    write_frames(path, FRAMES, little_endian=True)
    with pytest.raises(ConfigError, match="--little-endian"):
        list(FramesFile(path))


def test_without_zstandard_a_compressed_file_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match="pip install zstandard"):
        list(FramesFile(tmp_path / "x.frames.zst"))


@pytest.mark.real_data
def test_the_recorded_frames(real_data: Path) -> None:
    file = FramesFile(real_data / "frames/frames.bin.zst", little_endian=True)
    frames = list(file)
    assert (len(frames), sum(map(len, frames)), file.truncated_bytes) == (150, 818_776, 0)

"""Files of recorded frames: `[u32 length][frame]` repeated, big-endian unless told otherwise, plain or `.zst`."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from fastworker.errors import ConfigError

_FRAME_BYTES_MAX = 1 << 24
"""A length beyond this is not a frame of any relay: most likely the other byte order."""


class FramesFile:
    """The frames of a file, one at a time. A truncated tail ends the iteration and is left in `truncated_bytes`."""

    def __init__(self, path: str | Path, *, little_endian: bool = False) -> None:
        self.path = Path(path)
        self.truncated_bytes = 0
        self._length = struct.Struct("<I" if little_endian else ">I")

    def __iter__(self) -> Iterator[bytes]:
        self.truncated_bytes = 0
        with _open(self.path, "rb") as file:
            while start := _read(file, 4):
                if len(start) < 4:
                    self.truncated_bytes = len(start)
                    return
                (size,) = self._length.unpack(start)
                if size > _FRAME_BYTES_MAX:
                    raise ConfigError(
                        f"{self.path}: a frame of {size} bytes; this file has the other byte order (--little-endian),"
                        " or is not a file of frames."
                    )
                frame = _read(file, size)
                if len(frame) < size:
                    self.truncated_bytes = 4 + len(frame)
                    return
                yield frame


def write_frames(path: str | Path, frames: Iterable[bytes], *, little_endian: bool = False) -> int:
    """Returns the number of frames written."""
    length = struct.Struct("<I" if little_endian else ">I")
    count = 0
    with _open(Path(path), "wb") as file:
        for frame in frames:
            file.write(length.pack(len(frame)) + frame)
            count += 1
    return count


def _open(path: Path, mode: str) -> IO[bytes]:
    if path.suffix != ".zst":
        return cast("IO[bytes]", path.open(mode))
    try:
        import zstandard  # noqa: PLC0415 : only here, and only a few install it
    except ImportError:
        raise ConfigError(f"{path} is compressed: `pip install zstandard`, or decompress it with `zstd -d`.") from None
    return cast("IO[bytes]", zstandard.open(path, mode))


def _read(file: IO[bytes], size: int) -> bytes:
    """`size` bytes, less only at the end of the file (decompressors return what they have)."""
    data = file.read(size)
    while data and len(data) < size:
        more = file.read(size - len(data))
        if not more:
            break
        data += more
    return data

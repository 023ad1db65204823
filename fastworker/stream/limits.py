"""Defaults of what a stream holds and how it is read: of the settings, and of whoever is called without them."""

from __future__ import annotations

from typing import Final

STREAM_LEN_MAX: Final = 500_000
"""`REDIS_MAX_STREAM_LEN`"""
DEAD_LETTERS_MAX: Final = 10_000
"""`REDIS_DEAD_LETTER_MAXLEN`"""
BATCH_SIZE: Final = 300
"""`BATCH_SIZE`: entries of one read."""
PARTITIONS_MAX: Final = 64
"""`FASTWORKER_STREAM_PARTITIONS`: each costs the reader's scripts and every look at the stream a few commands more."""
ABANDONED_MS: Final = 600_000
"""An entry is abandoned when its consumer gave no sign for so long; a worker of ours would have adopted it long ago."""

"""Ids of stream entries."""

from __future__ import annotations


def id_order(entry_id: str) -> tuple[int, int]:
    """Stream ids in their order: milliseconds, then sequence."""
    ms, _, n = entry_id.partition("-")
    return int(ms), int(n or 0)


def id_ms(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])

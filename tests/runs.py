"""Which cases of a test are in every run, and which are in `./scripts/test --extended` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import pytest
from _pytest.mark.structures import ParameterSet

T = TypeVar("T")


def usually(cases: Iterable[T], *kept: T) -> list[ParameterSet]:
    """Cases of one argument. Every run has those of `kept`; the others are like them and cost too much for it."""
    found = list(cases)
    assert set(kept) <= set(found), "a case to keep that is none"
    return [pytest.param(case, marks=() if case in kept else pytest.mark.extended) for case in found]


def in_turns(one: Sequence[T], others: Sequence[str], name: Callable[[T], str]) -> list[ParameterSet]:
    """Pairs of two arguments. Every run has each of `one` with one of the `others`, in turns."""
    return [
        pytest.param(
            case,
            other,
            id=f"{name(case)}-{other}",
            marks=() if number % len(others) == position else pytest.mark.extended,
        )
        for number, case in enumerate(one)
        for position, other in enumerate(others)
    ]

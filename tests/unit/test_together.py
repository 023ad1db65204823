"""`together`: nothing runs on when its error is raised."""

from __future__ import annotations

import asyncio

import pytest

from fastworker.together import together


async def test_all_results_in_order() -> None:
    async def after(wait_s: float, result: int) -> int:
        await asyncio.sleep(wait_s)
        return result

    assert await together(after(0.01, 1), after(0, 2)) == [1, 2]
    assert await together() == []


async def test_when_one_fails_the_others_have_ended_before_its_error_is_raised() -> None:
    closed: list[str] = []

    async def hold() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # what closes a connection takes a moment
            closed.append("the other one")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="^no$"):
        await together(hold(), fail())
    assert closed == ["the other one"]

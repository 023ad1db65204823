"""`python -m tests.rig.soak`: what its verdict is made of, and a short run of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rig.soak import CatchUp, Look, Outage, Soak, catch_up


def look(at_s: float, made: int, ended: int | None) -> Look:
    return Look(at_s, made, ended, {})


LOOKS = [look(9, 900, 900), look(10, 1_000, 900), look(11, 1_100, None), look(12, 1_200, 900), look(13, 1_300, 900)]


def test_a_backlog_that_goes() -> None:
    looks = [*LOOKS, look(14, 1_400, 1_200), look(15, 1_500, 1_450), look(16, 1_600, 1_600)]
    assert catch_up(looks, back_s=11.5, rate=100) == CatchUp(backlog=300, wait_s=1.5, until_s=15, rate=275)


def test_a_backlog_that_stays() -> None:
    found = catch_up([*LOOKS, look(14, 1_400, 1_000), look(15, 1_500, 1_100)], back_s=11.5, rate=100)
    assert (found.until_s, found.rate) == (None, 100)


def test_a_server_that_never_comes_back() -> None:
    assert catch_up(LOOKS, back_s=14, rate=100) == CatchUp(0, 0.0, None, 0.0)


@pytest.mark.extended
async def test_a_short_soak(server_dir: Path) -> None:
    outages = [Outage("PostgreSQL", 15, 8), Outage("Redis", 35, 5)]
    problems = await Soak(server_dir, seed=2, rate=300, seconds=60, outages=outages).run()
    # Memory is for a run that is long enough to have a steady stretch.
    assert [problem for problem in problems if "grows" not in problem] == []

"""Everything is pulled: `python -m tests.rig.chaos`."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from tests.rig import operators, shrunk
from tests.rig.chaos import ELSEWHERE, PLACES, SERVERS, WEIGHTS, Fault, Form, chaos, plan

ROOT = Path(__file__).resolve().parents[2]
PEOPLE = Form(with_operator=True)
FORMS = (Form(partitions=4), Form(redis="sentinel"), Form(redis="cluster"), Form(partitions=4, redis="cluster"))


def test_the_seed_fixes_the_plan() -> None:
    assert plan(7, 500) == plan(7, 500)
    assert plan(7, 500) != plan(8, 500)
    kinds = [fault.kind for fault in plan(7, 500)]
    assert set(kinds) == set(WEIGHTS)
    assert 0 < sum(kind in SERVERS for kind in kinds) <= 50
    places = {fault.detail.partition(":")[0] for fault in plan(7, 500) if fault.kind == "crashpoint"}
    assert places == set(PLACES)
    for place, where in ELSEWHERE.items():
        text = (ROOT / where).read_text("utf-8")
        assert f"Step.{place.name}" in text or str(place) in text, f"{place} is died at nowhere"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.redis or 'one'}-{form.partitions}")
def test_a_short_plan_has_what_is_of_its_form(form: Form) -> None:
    kinds = {fault.kind for fault in plan(7, 60, form)}
    assert kinds >= set(form.weights)
    assert kinds - set(form.weights) <= set(WEIGHTS)


@pytest.mark.parametrize("name", shrunk.LIMITS)
def test_a_limit_that_chaos_makes_small_is_there(name: str) -> None:
    module, _, constant = name.partition(":")
    assert hasattr(importlib.import_module(module), constant)


@pytest.mark.timeout(300)  # each fault waits until the pipeline is at work again: a busy machine takes its time
@pytest.mark.parametrize(("seed", "count"), [(9, 8), pytest.param(1, 20, marks=pytest.mark.extended)])
async def test_a_minute_of_faults(server_dir: Path, seed: int, count: int) -> None:
    """Seed 9 begins with a killed PostgreSQL, a killed reader and a crash point, among eight of different kinds."""
    async with chaos(server_dir, seed=seed) as started:
        outcome = await started.run(plan(seed, count), recovery_s=2.0)
    assert outcome.problems == [], outcome.report()
    assert outcome.entries > 50 * count
    assert sum(outcome.faults.values()) == count


@pytest.mark.extended  # each act by itself is in every run: test_stream.py, test_relays.py, test_reader.py
@pytest.mark.timeout(300)
async def test_what_people_do(server_dir: Path) -> None:
    """A few of their acts, with small limits: what the relay sent is in the tables, whatever they removed."""
    faults = plan(5, 15, PEOPLE)
    kinds = {operators.LATER.get(fault.kind, fault.kind) for fault in faults}
    assert kinds >= set(operators.WEIGHTS) - set(operators.SERVERS)
    async with chaos(server_dir, 5, PEOPLE) as started:
        outcome = await started.run([fault for fault in faults if fault.kind in operators.WEIGHTS][:5], recovery_s=2.0)
    assert outcome.problems == [], outcome.report()


def test_kinds_that_came_later_leave_a_seeds_other_faults_as_they_were() -> None:
    later = plan(7, 500, PEOPLE)
    assert {fault.kind for fault in later} >= set(operators.LATER)
    assert {fault.kind for fault in later} >= set(operators.LATER.values())
    as_it_was = [fault._replace(kind=operators.LATER.get(fault.kind, fault.kind)) for fault in later]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "LATER", {})
        assert plan(7, 500, PEOPLE) == as_it_was


@pytest.mark.extended
@pytest.mark.timeout(600)
async def test_a_promotion_and_an_upkeep_that_fails(server_dir: Path) -> None:
    acts = [Fault(kind, 0.5, 0.5) for kind in ("op_upkeep", "op_promote", "op_upkeep", "op_promote")]
    async with chaos(server_dir, 3, PEOPLE) as started:
        outcome = await started.run(acts)
    assert outcome.problems == [], outcome.report()


@pytest.mark.extended
@pytest.mark.timeout(7_200)
async def test_a_thousand_faults_with_people_at_work(server_dir: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "42"))
    async with chaos(server_dir, seed, PEOPLE) as started:
        outcome = await started.run(plan(seed, 1_000, PEOPLE), limit_s=300)
    assert outcome.problems == [], outcome.report()


@pytest.mark.extended
@pytest.mark.timeout(7_200)
async def test_five_hundred_faults(server_dir: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "42"))
    async with chaos(server_dir, seed=seed) as started:
        outcome = await started.run(plan(seed, 500), limit_s=300)
    assert outcome.problems == [], outcome.report()
    assert set(outcome.crashes) == set(PLACES), outcome.report()


@pytest.mark.extended
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.redis or 'one'}-{form.partitions}")
async def test_five_hundred_faults_of_other_forms(server_dir: Path, form: Form) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "42"))
    faults = plan(seed, 500, form)
    assert {fault.kind for fault in faults} >= set(form.weights)
    async with chaos(server_dir, seed, form) as started:
        outcome = await started.run(faults, limit_s=300)
    assert outcome.problems == [], outcome.report()

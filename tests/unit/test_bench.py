"""What the benchmarks conclude from their figures, and that --help names each of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cookbook
from bench.instructions import compare as compare_counts
from bench.instructions import main as instructions_main
from bench.report import medians, shown
from bench.targets import TARGETS, compare

ROOT = Path(__file__).resolve().parent.parent.parent


def test_medians_are_taken_figure_by_figure_and_words_stay() -> None:
    runs = [{"a": 1.0, "b": 9, "curve": "x"}, {"a": 3.0, "b": 7, "curve": "y"}, {"a": 2.0, "b": 8, "curve": "z"}]
    assert medians(runs) == {"a": 2.0, "b": 8, "curve": "x"}
    assert [shown(value) for value in (0.123, 12345.6, 7, "x")] == ["0.12", "12,346", "7", "x"]


def test_a_target_is_told_only_where_there_is_a_figure_for_it() -> None:
    told: list[tuple[str, dict[str, Any], dict[str, float]]] = [
        ("decode", {"form": "json"}, {"events/s": 49_999.0}),
        ("decode", {"form": "native"}, {"events/s": 60_000.0}),
        ("latency", {"rate": 100}, {"all p50 ms": 99.0}),  # aimed at: 1,000 a second
        ("life", {}, {"first ack s": 1.51, "drained s": 4.0}),
    ]
    lines = compare(told).splitlines()
    assert [line.split()[0] for line in lines] == ["reached", "MISSED", "MISSED", "reached"]
    assert compare([]) == ""


@pytest.mark.parametrize(
    ("now", "well"),
    [
        ({"a": 105, "b": 50}, True),
        ({"a": 106, "b": 50}, False),
        ({"a": 100}, False),  # one that is gone
        ({"a": 100, "b": 50, "c": 1}, False),  # one that nobody has kept
    ],
)
def test_more_instructions_than_the_threshold_fail(now: dict[str, int], well: bool) -> None:
    assert compare_counts(now, {"a": 100, "b": 50})[1] is well


def test_without_valgrind_it_says_what_to_install_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert instructions_main([]) != 0
    assert "apt-get install valgrind" in capsys.readouterr().err


def test_every_target_is_a_figure_of_a_benchmark_that_help_explains() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for name in {target.bench for target in TARGETS}:
        assert f"\n    {name} " in said


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_every_benchmark_runs(tmp_path: Path) -> None:
    """On few events: that none of them has rotted. What they measure then means nothing."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--events", "2000", "--results", str(tmp_path / "results.jsonl")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1780,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) > 40
    assert "Targets" in ran.stdout


@pytest.mark.extended
@pytest.mark.timeout(600)
def test_instructions_are_counted_and_compared() -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("Debian's package valgrind is not installed")
    ran = subprocess.run(
        [sys.executable, "-m", "bench.instructions"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=580
    )
    assert "CAR walk and hashes" in ran.stdout, ran.stderr[-3000:]
    assert ran.returncode in (0, 1)


def test_the_cookbook_has_a_plan_under_each_query() -> None:
    """Written again it is the same page, and a query that is new gets its own."""
    page = cookbook.PAGE.read_text()
    queries = {query: plan for query, plan in cookbook.QUERY.findall(page) if not query.startswith("CREATE INDEX")}
    assert len(queries) > 8
    assert all(plan.startswith("\n```text plan\n") for plan in queries.values())
    plans = {query: re.sub(r"```(text plan)?", "", plan).strip("\n") for query, plan in queries.items()}
    assert cookbook.written(page, plans) == page
    bare = cookbook.written(page, {})
    assert "text plan" not in bare
    assert cookbook.written(bare, plans) == page
    assert not [plan for plan in plans.values() if "did:plc:" in plan.replace("did:plc:...", "")]

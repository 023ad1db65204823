"""`fastworker sample` on simulated hosts, beside a running worker."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fastworker.commands.sample import sample
from fastworker.errors import ExitCode, Unreachable
from fastworker.sync import sampling
from fastworker.sync.sampling import truth_of, wilson
from tests.integration.test_repairs import Scene, scene, worker  # noqa: F401 - fixtures
from tests.services import Service


async def sampled(scene: Scene, capsys: pytest.CaptureFixture[str], **how: bool) -> tuple[ExitCode, dict[str, Any]]:
    wish = {"is_repaired": True, **how}
    code = await sample(scene.config, repos=200, as_json=True, stop=asyncio.Event(), hosts=scene.hosts, **wish)
    return code, json.loads(capsys.readouterr().out)


async def test_differences_are_found_and_repaired(
    scene: Scene,
    worker: Service,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "AGAIN_S", 0.1)
    with pytest.raises(Unreachable, match="no account"):
        await sampled(scene, capsys)
    scene.happen(400)
    await scene.finished()
    code, found = await sampled(scene, capsys)
    assert code == ExitCode.DONE
    assert found["accounts"] > 5
    assert {one["truth"] for one in found["tables"].values()} == {1.0}

    scene.happen(200, lose=lambda n: n % 3 == 0)
    await scene.finished()
    code, found = await sampled(scene, capsys, is_repaired=False)
    assert code == ExitCode.NO
    table = found["tables"]["likes"]
    wrong = table["missing"] + table["different"]
    assert table["missing"] > 10
    assert table["truth"] == (table["compared"] - wrong) / (table["compared"] + table["extra"])
    assert table["low"] < table["truth"] < table["high"]
    code, found = await sampled(scene, capsys)
    assert code == ExitCode.DONE
    assert found["remaining"] == 0
    assert found["repaired"] == len(found["differing"]) > 0
    assert worker.process.poll() is None


def test_the_ratio_and_its_interval() -> None:
    assert truth_of(100, 5, 5, 0).truth == 0.9
    assert truth_of(100, 0, 0, 100).truth == 0.5
    assert truth_of(0, 0, 0, 0).truth is None
    low, high = wilson(0.9, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)  # as in the textbooks
    low, high = wilson(1.0, 60)
    assert low < 0.95
    assert high == 1.0

"""Micro-benchmarks of the pure floors, for `./scripts/bench --compare`: pytest-benchmark keeps and compares results."""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro import Body, bodies

BODIES = bodies()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_thousand_events(benchmark: Any, body: Body) -> None:
    benchmark(body)

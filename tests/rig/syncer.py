"""`python -m tests.rig.syncer PLAN`: a syncer in a process of its own, whose hosts are simulated ones.

PLAN is JSON: `env` for the configuration, `own`: origins of the servers that it may ask although they are on loopback;
`crash`: as FASTWORKER_CRASHPOINT.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from fastworker.config import parse_config
from fastworker.crashpoint import arm
from fastworker.process.signals import stop_on_signals
from fastworker.sync import syncer
from fastworker.sync.hosts import Hosts


async def main(plan: Path) -> None:
    told = json.loads(plan.read_text("utf-8"))
    config = parse_config(told["env"])
    arm(told.get("crash"))
    syncer.ROUND_S = 0.3  # type: ignore[misc]
    with stop_on_signals() as stop:
        async with Hosts(config.plc_url, own=frozenset(told["own"]), rate=lambda _: 100.0) as hosts:
            await syncer.run_syncer(config, stop, hosts=hosts)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))

"""`python -m tests.rig.backfill PLAN`: `fastworker backfill --known` in a process of its own, whose hosts are simulated.

PLAN is JSON: `env` for the configuration; `own`: origins of the servers that it may ask although they are on loopback;
`directory`: the directory's authority; `rate` and `directory_rate`: requests a second. Pauses after failures are short.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from fastworker.commands.backfill import backfill
from fastworker.config import parse_config
from fastworker.errors import ExitCode
from fastworker.sync import hosts as hosts_module
from fastworker.sync import many
from fastworker.sync.choice import Choice
from fastworker.sync.hosts import Bounds, Hosts


async def main(plan: Path) -> ExitCode:
    told = json.loads(plan.read_text("utf-8"))
    for module, name, pauses in (
        (hosts_module, "CLOSED_S", (1.0, 2.0, 4.0)),
        (hosts_module, "DIRECTORY_CLOSED_S", (1.0, 2.0)),
        (hosts_module, "PARK_S", 1.0),
        (many, "AGAIN_S", (1, 2, 4, 8)),
    ):
        setattr(module, name, pauses)
    config = parse_config(told["env"])

    def rate(host: str) -> float:
        found: float = told["directory_rate"] if host == told["directory"] else told["rate"]
        return found

    bounds = Bounds(idle_s=60, connect_s=60)  # on a busy machine they may be slow
    async with Hosts(config.plc_url, own=frozenset(told["own"]), bounds=bounds, rate=rate) as hosts:
        return await backfill(config, Choice(known=True), asyncio.Event(), hosts=hosts)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]))))

"""A service that is one process ends after SIGTERM, whatever it waits for."""

from __future__ import annotations

import signal
import subprocess
import sys

SERVICE = """
import asyncio, sys
import uvloop
from fastworker.log import setup_logging
from fastworker.process.signals import stop_on_signals

async def never_closes():
    await asyncio.Event().wait()

async def service():
    with stop_on_signals(left_s=0.2) as stop:
        print("on", flush=True)
        await stop.wait()
    await never_closes()

setup_logging("INFO", "human")
uvloop.run(service())
"""


def test_a_service_that_does_not_end_is_ended_and_says_what_it_waits_for() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Not ended 0.2 s after the signal: giving up" in said
    assert "in never_closes" in said

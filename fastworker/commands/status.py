"""`fastworker status`: what an operator asks first, from Redis alone, so that it works while everything else does not.

The workers' own figures come from what their monitors wrote there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import ExitStack
from typing import Final

import msgspec
from rich.live import Live
from rich.text import Text

from fastworker.config import Config
from fastworker.errors import ExitCode, StreamUnavailable
from fastworker.monitor.facts import Status, collect
from fastworker.monitor.terminal import Trend, render
from fastworker.stream.admin import open_redis
from fastworker.terminal import Terminal, write_json

RATE_WINDOW_S: Final = 0.5  # of a single look
WATCH_S: Final = 1.0
WATCH_RATES: Final = 5  # looks that a rate is over


async def show_status(config: Config, *, as_json: bool, watch: bool) -> ExitCode:
    """Print once, or until interrupted. A Redis that goes away under the live view is shown there, not an end."""
    async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-status") as admin:
        status, reading = await collect(admin, config)
        if not watch:
            await asyncio.sleep(RATE_WINDOW_S)
            status, _ = await collect(admin, config, reading)
            _print(status, as_json=as_json)
            return ExitCode.DONE
        console = Terminal()
        live = None
        readings, trend = deque([reading], maxlen=WATCH_RATES), Trend()
        with ExitStack() as stack:
            if not as_json and console.is_terminal:
                live = stack.enter_context(
                    Live(render(status, trend), console=console, auto_refresh=False, screen=True)
                )
            while True:
                await asyncio.sleep(WATCH_S)
                try:
                    status, reading = await collect(admin, config, readings[0])
                except StreamUnavailable as error:
                    if live is None:
                        raise
                    live.update(Text(str(error), style="red"), refresh=True)
                    continue
                readings.append(reading)
                trend.add(status)
                if live is None:
                    _print(status, as_json=as_json)
                else:
                    live.update(render(status, trend), refresh=True)


def _print(status: Status, *, as_json: bool) -> None:
    if as_json:
        write_json(msgspec.json.encode(status))
    else:
        Terminal(soft_wrap=False).print(render(status))

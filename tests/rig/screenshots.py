"""The pictures of README.md, of a real run: the status page in Chromium, `fastworker status --watch` as 80 columns.

Without --page it starts a simulated relay and `fastworker up` on servers of its own and looks after --minutes. With it,
the service at that page is looked at as it is, and REDIS_URL or FASTWORKER_HOME says where its stream is.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import re
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from fastworker.commands.up import with_servers_of_home
from fastworker.config import Config, parse_config
from fastworker.monitor.facts import collect
from fastworker.monitor.terminal import TREND, Trend, render
from fastworker.stream.admin import open_redis
from tests.rig.browser import browsing, chromium
from tests.services import ROOT, Service

IMAGES = ROOT / "docs" / "images"
RATE = 120
PAGE = {
    "status-page": (1280, 1000, False),
    "status-page-dark": (1280, 1000, True),
    "status-page-phone": (390, 844, False),
}


async def shoot_page(url: str, program: str, folder: Path) -> None:
    """What fits on the screen, without what lies below it."""
    async with browsing(program, folder / "profile") as browser:
        for name, (width, height, dark) in PAGE.items():
            await browser.look_like(width, height, dark=dark)
            await browser.send("Page.navigate", url=url)
            async with asyncio.timeout(30):
                while not await browser.value("document.querySelectorAll('figure svg path').length > 4"):
                    await asyncio.sleep(0.2)
            await asyncio.sleep(3)  # the second look fills in what the first could not know
            await browser.shoot(IMAGES / f"{name}.png", whole=False)


async def shoot_terminal(config: Config) -> None:
    """The last look of as many as the lines of the live view have room for."""
    trend = Trend()
    async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-screenshots") as admin:
        status, reading = await collect(admin, config)
        readings = deque([reading], maxlen=5)
        for _ in range(TREND):
            await asyncio.sleep(1)
            status, reading = await collect(admin, config, readings[0])
            readings.append(reading)
            trend.add(status)
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(render(status, trend))
    svg = console.export_svg(title="fastworker status --watch", theme=DIMMED_MONOKAI, unique_id="status")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code, ", "")  # no foreign host
    (IMAGES / "status-watch.svg").write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/screenshots", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the run has lasted when it is looked at")
    parser.add_argument("--page", metavar="URL", help="the status page of a service that runs already")
    options = parser.parse_args()
    program = chromium()
    if program is None:
        sys.exit("screenshots: chromium is not there: apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fw", ignore_cleanup_errors=True)))
        if options.page:
            page, env = options.page, dict(os.environ)
        else:
            folder.chmod(0o711)
            env = {"FASTWORKER_HOME": str(folder / "home"), "FASTWORKER_HTTP_PORT": "0"}
            relay = Service("relay", "--rate", str(RATE), "--port", "0")
            stack.callback(relay.stop)
            url = relay.wait_for("RELAY_URL=(.+)")[1]
            up = Service("up", RELAY_URL=url, FASTWORKER_RESOLVE_HANDLES="off", **env)
            stack.callback(up.stop)
            page = up.wait_for(r"HTTP on (http://[\d.:]+\d)", 60)[1]
            time.sleep(60 * options.minutes)
        config = with_servers_of_home(parse_config(env))
        asyncio.run(shoot_terminal(config))
        asyncio.run(shoot_page(page, program, folder))
    for path in sorted(IMAGES.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1024} kB")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

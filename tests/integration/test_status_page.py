"""The status page in a real browser, beside a worker under load: what it shows is what is so, on a phone and in the dark."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
import redis

from tests.rig.browser import CARD, Browser, browsing, chromium
from tests.services import ROOT, Service, until

RATE = 60
SIZES = {"wall": (1920, 1080), "laptop": (1280, 800), "phone": (390, 844)}
CHARTS = ["Events", "Latency", "Not finished", "Oldest unfinished", "Stream", "Cursor's age"]


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("chromium is not there: apt-get install chromium")
    async with browsing(program, tmp_path / "profile") as made:
        yield made


@pytest.mark.timeout(300)
async def test_the_status_page(
    browser: Browser, services: Callable[..., Service], redis_url: str, postgres_url: str, tmp_path: Path
) -> None:
    relay = services("relay", "--rate", str(RATE), "--port", "0")
    env = {"RELAY_URL": relay.wait_for("RELAY_URL=(.+)")[1], "REDIS_URL": redis_url, "DATABASE_URL": postgres_url}
    up = services("up", FASTWORKER_HTTP_PORT="0", FASTWORKER_RESOLVE_HANDLES="off", FASTWORKER_SYNC="off", **env)
    port = int(up.wait_for(r"HTTP on http://127.0.0.1:(\d+)", 60)[1])
    with redis.Redis.from_url(redis_url, socket_timeout=10) as client:
        client.xadd("firehose:events", {"type": "commit", "data": "{<b>not JSON</b>", "seq": "1"})
        until(lambda: client.xlen("firehose:dead-letters"))

        await browser.send("Page.navigate", url=f"http://127.0.0.1:{port}/")
        async with asyncio.timeout(60):
            while (
                await browser.value("document.getElementById('state')?.textContent") != "ready"
            ):  # null while it loads
                await asyncio.sleep(0.2)
            while await browser.value(f"!{CARD.format('finished')}"):
                await asyncio.sleep(0.2)
        await browser.value(f"{CARD.format('finished')}.focus()")
        counts_appends = int(client.info("server")["redis_version"].partition(".")[0]) >= 7
        if not counts_appends:
            assert await browser.card("appended") == "unknown"
        for rate in ("appended", "finished")[not counts_appends :]:  # once the start is caught up with
            async with asyncio.timeout(90):
                while not 0.7 * RATE < await browser.number(rate) < 1.3 * RATE:
                    await asyncio.sleep(0.2)
        committed = int(client.hget("fastworker:ledger", "committed") or 0)
        async with asyncio.timeout(60):
            while (shown := await browser.number("committed")) < committed:
                await asyncio.sleep(0.2)
        assert shown <= int(client.hget("fastworker:ledger", "committed") or 0)
        assert await browser.number("dead letters") == 1
    assert await browser.value(f"{CARD.format('dead letters')}.className") == "alarm"
    assert await browser.value(f"document.activeElement === {CARD.format('finished')}"), "an update keeps the place"
    names = "[...document.querySelectorAll('#processes td:first-child')].map(td => td.textContent).sort().join()"
    assert await browser.value(names) == "monitor,reader,worker-0,worker-1"
    letters = await browser.value("document.getElementById('letters').textContent")
    assert "bad_json" in letters
    assert "1 bad_json" in await browser.value("document.getElementById('drops').textContent")
    await assert_it_explains_itself(browser)
    await assert_it_remembers(browser, port)
    for dark, (name, (width, height)) in itertools.product((False, True), SIZES.items()):
        await browser.look_like(width, height, dark=dark)
        assert await browser.value("document.documentElement.scrollWidth") <= width, "nothing is cut"
        cut = (
            "[...document.querySelectorAll('td, dd, figcaption')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        )
        assert await browser.value(cut) == 0, name
        color = "rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)"
        assert await browser.value("getComputedStyle(document.body).color") == color
        await browser.shoot(tmp_path / f"{name}-{'dark' if dark else 'light'}.png")
    heads = "[...document.querySelectorAll('#processes tbody tr:first-child td')].map(td => td.dataset.head).join()"
    assert await browser.value(heads) == "process,state,events/s,finished,flush ms,oldest s,memory,restarts"

    assert up.stop() == 0
    async with asyncio.timeout(60):
        while await browser.value("document.getElementById('state').textContent") != "no answer":
            await asyncio.sleep(0.2)
    assert "these figures are as old" in await browser.value("document.getElementById('stale').textContent")
    assert await browser.value("document.body.className") == "stale"
    assert [complaint for complaint in browser.complaints if "ERR_CONNECTION" not in complaint] == []


async def assert_it_explains_itself(browser: Browser) -> None:
    """Each figure says what it means, to the eye, to the keyboard and to a screen reader."""
    assert await browser.value("[...document.querySelectorAll('figure b')].map(b => b.textContent)") == CHARTS
    mute = "[...document.querySelectorAll('dl div, figure')].filter(e => !document.getElementById(e.getAttribute('aria-describedby'))?.textContent || e.tabIndex !== 0).map(e => e.textContent)"
    assert await browser.value(mute) == []
    unnamed = "[...document.querySelectorAll('table')].filter(t => !t.getAttribute('aria-label') || t.querySelector('thead th:not([scope=col])')).length"
    assert await browser.value(unnamed) == 0
    shown = "getComputedStyle(document.activeElement.querySelector('.tip')).visibility"
    await browser.value(f"{CARD.format('lag')}.focus()")
    assert await browser.value(shown) == "visible"
    assert await browser.value("document.getElementById('state').getAttribute('role')") == "status"


async def assert_it_remembers(browser: Browser, port: int) -> None:
    """The lines are there again after a reload: the worker keeps them."""
    lines = "document.querySelectorAll('figure svg path[d^=M]').length"
    async with asyncio.timeout(60):
        while await browser.value(lines) < 6:
            await asyncio.sleep(0.2)
    await browser.send("Page.navigate", url=f"http://127.0.0.1:{port}/?again")
    async with asyncio.timeout(60):
        while await browser.value(lines) < 6:
            await asyncio.sleep(0.2)
    label = "document.querySelector('figure').getAttribute('aria-label')"
    assert re.match(
        r"Events, now appended [\d,.]+/s, finished [\d,.]+/s, at most [\d,.]+/s", await browser.value(label)
    )
    await browser.value("document.querySelector('figure').focus()")
    for key in ("ArrowLeft", "Home", "End"):
        await browser.send("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert re.match(r"Events, \d\d:\d\d", await browser.value(label)), "the arrow keys go through time"
    assert await browser.value("document.querySelector('input[name=span]:checked').value") == "0", "it is young"
    await browser.value("document.querySelector('input[name=span][value=\"2\"]').click()")
    async with asyncio.timeout(60):
        while await browser.value(lines) < 6:
            await asyncio.sleep(0.2)


async def test_nothing_foreign_runs_in_it(services: Callable[..., Service], redis_url: str) -> None:
    reader = services("reader", RELAY_URL="ws://127.0.0.1:9", REDIS_URL=redis_url, FASTWORKER_HTTP_PORT="0")
    url = reader.wait_for(r"HTTP on (http://[\d.:]+\d)", 60)[1]
    async with aiohttp.ClientSession() as session:
        for path, kind in (("/", "text/html"), ("/status.js", "text/javascript"), ("/status.css", "text/css")):
            async with session.get(url + path) as answer:
                assert answer.content_type == kind
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                text = await answer.text()
                assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)[\w.]+", text) == []
                assert not re.search(r"innerHTML|<script>|style=|onclick", text)
        async with session.get(url + "/history.json") as answer:
            hour, day = await answer.json()
        assert (len(hour["series"]["frames"]), len(day["series"]["age"])) == (360, 360)
        async with session.get(url + "/status.json") as answer:
            page = await answer.json()
    cards = [card["title"] for cards in page["cards"].values() for card in cards]
    assert {*cards, *(chart["title"] for chart in page["charts"])} <= page["explained"].keys()


@pytest.mark.extended
@pytest.mark.timeout(300)
def test_the_live_view_in_a_terminal_of_80_columns(
    services: Callable[..., Service], redis_url: str, postgres_url: str, tmp_path: Path
) -> None:
    tmux = shutil.which("tmux")
    if tmux is None:
        pytest.skip("tmux is not there: apt-get install tmux")
    relay = services("relay", "--rate", str(RATE), "--port", "0")
    env = {"RELAY_URL": relay.wait_for("RELAY_URL=(.+)")[1], "REDIS_URL": redis_url, "DATABASE_URL": postgres_url}
    up = services("up", FASTWORKER_HTTP_PORT="0", FASTWORKER_RESOLVE_HANDLES="off", FASTWORKER_SYNC="off", **env)
    up.wait_for("Processed", 60)

    def ask(*args: str) -> str:
        command = [tmux, "-S", str(tmp_path / "tmux.sock"), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    watch = f"env REDIS_URL={redis_url} PYTHONPATH={ROOT} {sys.executable} -m fastworker status --watch"

    def is_the_rate(shown: str) -> bool:
        found = re.search(r"rate +(\d+)/s in, (\d+)/s out", shown)
        return (
            found is not None
            and "out/s" in shown
            and all(0.7 * RATE < int(rate) < 1.3 * RATE for rate in found.groups())
        )

    ask("new-session", "-d", "-s", "view", "-x", "80", "-y", "30", watch)
    try:
        until(lambda: is_the_rate(ask("capture-pane", "-p", "-t", "view")), 60)
        shown = ask("capture-pane", "-p", "-t", "view")
    finally:
        ask("kill-server")
    assert "\u2026" not in shown, "nothing is cut"
    assert re.search(r"rate +\d+/s in, \d+/s out", shown), shown
    assert re.match(r"fastworker status [\d.]+ +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +well", shown), shown
    assert re.search(r"^out/s +[\u2581-\u2588]+ +\d+, max \d+", shown, re.MULTILINE), shown
    assert re.search(r"Changes/s: likes \d", shown), shown
    assert re.search(r"worker-1 +running +\d+ +[\d,]+ +\d+ +[\d.]+ s +\d+ MB +0", shown), shown
    assert "ledger balances" in shown, "also while entries come and go"
    assert up.stop() == 0

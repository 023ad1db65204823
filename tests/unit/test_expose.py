"""Who the status page answers to."""

from __future__ import annotations

import socket

import aiohttp
import pytest

from fastworker.metrics import Figures
from fastworker.monitor.http import is_ours, serve


class Quiet:
    def figures(self) -> Figures:
        return Figures(())

    def why_not_live(self) -> list[str]:
        return []

    def why_not_ready(self) -> list[str]:
        return []

    def status_json(self) -> bytes:
        return b'{"dead_letters": []}'

    def history_json(self) -> bytes:
        return b"{}"


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1:9400", True),
        ("10.2.3.4", True),
        ("[::1]:9400", True),
        ("[fe80::1%eth0]", True),
        ("localhost", True),
        ("LocalHost.:9400", True),
        ("worker.localhost:9400", True),
        ("Python-Worker:9400", True),
        ("evil.example", False),
        ("evil.example:9400", False),
        ("127.0.0.1.evil.example:9400", False),
        ("localhost.evil.example", False),
        ("python-worker.evil.example", False),
        ("evil.example#localhost", False),
        ("localhost@evil.example", False),
        ("2130706433", False),
        ("[evil.example]", False),
        ("", False),
    ],
)
def test_which_names_are_ours(host: str, ours: bool) -> None:
    assert is_ours(host, ["python-worker"]) is ours
    assert is_ours(host, ["*"])


async def test_the_page_is_for_its_own_names_and_figures_for_all() -> None:
    async with serve(Quiet(), "127.0.0.1", 0, ["status.example.org"]) as port, aiohttp.ClientSession() as session:

        async def ask(path: str, host: str) -> tuple[int, str]:
            async with session.get(f"http://127.0.0.1:{port}{path}", headers={"Host": host}) as response:
                return response.status, await response.text()

        for path in ("/", "/status.json"):
            for host in (f"127.0.0.1:{port}", "localhost", socket.gethostname(), "status.example.org"):
                assert (await ask(path, host))[0] == 200, host
            status, words = await ask(path, "evil.example")
            assert (status, "FASTWORKER_HTTP_HOSTS" in words, "dead_letters" in words) == (421, True, False)
        for path in ("/metrics", "/livez", "/readyz"):
            assert (await ask(path, "worker.svc.cluster.local"))[0] == 200

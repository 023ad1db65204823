"""`fastworker` as an operator runs it: a command and its words, a service and its log, its HTTP port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(env: dict[str, str]) -> dict[str, str]:
    """Nothing of the tests' own environment but what a process needs to run; HOME does not exist. No test asks the
    network (test_syncer.py has servers), so no authority is trusted: reading the machine's certificates takes each
    process 0.1 s of CPU time."""
    usual = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": os.environ.get("SSL_CERT_FILE", os.devnull)}
    return {**usual, "HOME": "/nonexistent", "COLUMNS": "80", "PYTHONPATH": str(ROOT), "FASTWORKER_SYNC": "off", **env}


def run(*args: str, timeout: float | str = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """`timeout` in seconds (a text, too, since `**env` may have any name, as types go)."""
    return subprocess.run(
        [sys.executable, "-m", "fastworker", *args],
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=float(timeout),
        check=False,
    )


class Service:
    """A running `fastworker` service whose log can be waited for."""

    def __init__(self, *args: str, **env: str) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False  # and everything it said is in `lines`: a process may be gone before that
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastworker", *args],
            env=environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, timeout)
            match = found()
        assert match, f"no line like {pattern!r} in\n" + "\n".join(self.lines)
        return match

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def until(condition: Callable[[], object], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()

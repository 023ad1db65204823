"""`fastworker demo` as a user starts it: it verifies every table, and Ctrl-C at any moment leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastworker.commands import outage
from fastworker.config import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo puts its temporary folder; short, for the sockets."""
    with tempfile.TemporaryDirectory(prefix="fw") as path:
        Path(path).chmod(0o711)
        yield Path(path)


def demo(folder: Path, *args: str) -> subprocess.Popen[str]:
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "fastworker", "demo", *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # where the suite runs in the background, its children would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one signal, before exec
    )


def left_behind(folder: Path, group: int) -> list[str]:
    """Files, and processes of the demo's session or with its folder on their command line."""
    found = [str(path) for path in folder.iterdir()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if command and (session == group or str(folder) in command):
                found.append(command)
    return found


def assert_nothing_is_left(folder: Path, group: int) -> None:
    """A process that was told to end may be at it still."""
    give_up = time.monotonic() + 30
    while (left := left_behind(folder, group)) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert left == []


def test_it_verifies_every_table_and_leaves_nothing(folder: Path) -> None:
    with demo(folder, "--events", "5000", "--seed", "5") as process:
        said, _ = process.communicate(timeout=90)
    assert process.returncode == 0, said
    assert "Verified: every row and every counter is as it must be." in said
    assert re.search(r"likes +│? *[1-9]", said), said
    assert re.search(r"^throughput .* relay to commit, all on this machine$", said, re.MULTILINE), said
    assert said.splitlines()[-1].startswith("Verified"), "nothing that ends is worth a warning"
    _, _, summary = said.partition("Comparing every table")
    assert max(map(len, summary.splitlines())) <= 80, summary
    assert_nothing_is_left(folder, process.pid)


@pytest.mark.parametrize(
    ("after", "number"),
    [
        ("Starting PostgreSQL", signal.SIGINT),
        pytest.param("Servers are ready", signal.SIGTERM, marks=pytest.mark.extended),
        ("events settled: [1-9]", signal.SIGINT),
    ],
)
def test_an_interrupt_leaves_nothing_behind(folder: Path, after: str, number: signal.Signals) -> None:
    """And it is no success: it says what was done and that nothing was verified."""
    with demo(folder, "--events", "3000", "--rate", "300") as process:
        assert process.stdout is not None
        heard: list[str] = []
        for line in process.stdout:
            heard.append(line)
            if re.search(after, line):
                break
        assert re.search(after, heard[-1]), heard
        if after.startswith("events"):
            assert re.search(r"settled: [\d,]+ \([\d,]+/s, [\d.]+ (s|min) left\)", heard[-1]), heard
        os.killpg(process.pid, number)  # as a terminal does: to all of them
        rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in "".join(heard) + rest
    assert process.returncode == 130, rest
    assert "NOT verified: interrupted" in rest, rest
    assert re.search(r"^events +[\d,]+ of 3,000 made, [\d,]+ settled", rest, re.MULTILINE), rest
    assert "Verified:" not in rest
    if after.startswith("events"):
        assert ", 0 settled" not in rest
    assert_nothing_is_left(folder, process.pid)


@pytest.mark.extended
def test_an_outage_is_repaired_from_the_hosts(folder: Path) -> None:
    process = demo(folder, "--outage", "--events", "1500")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Verified:" in output
    shares = [(float(before), float(after)) for before, after in re.findall(r"│ +([\d.]{6}) │ +([\d.]{6}) │", output)]
    assert len(shares) > 10
    assert min(before for before, _ in shares) < 0.9
    assert {after for _, after in shares} == {1.0}
    before = dict(re.findall(r"│ ([\w.]+) +│ +([\d.]{6}) │", output))
    assert float(before["users"]) < 1  # handles that changed
    assert float(before["fastworker.accounts"]) < 1  # and who came back
    assert_nothing_is_left(folder, process.pid)


def test_a_repair_after_an_outage_writes_by_the_rules_of_the_demos_worker() -> None:
    """Else it hides every handle that it finds: nobody verifies them here."""
    places = outage.Places("http://plc.test", "ws://relay.test", [])
    found = outage.settings(places, "redis://127.0.0.1", "postgresql://127.0.0.1/a").rules
    assert found == Config(redis_url="redis://127.0.0.1", resolve_handles=False).rules


def test_without_the_curves() -> None:
    """They are an extra that only an outage, and a repair, needs."""
    code = "import sys; sys.modules.update(coincurve=None, cryptography=None); import fastworker.commands.demo"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Log lines: the predecessor's form, JSON on request, no secret, no flood."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal

import pytest

from fastworker import log as fastworker_log
from fastworker.log import REPEATS_MAX, WINDOW_S, Json, NeverWaits, RepeatLimit, setup_logging
from fastworker.process.board import Heartbeats
from fastworker.redact import printable, printable_json


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_human_lines_have_the_predecessors_form(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO", "human")
    logging.getLogger("fastworker.x").info("Processed %s events", "1,000")
    logging.getLogger("fastworker.x").debug("not shown")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \[INFO\] Processed 1,000 events\n", line)


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO", "json")
    try:
        int("redis://:hunter2@h")
    except ValueError:
        logging.getLogger("fastworker.x").exception("at %s", "redis://u:hunter2@h")
    line = json.loads(capsys.readouterr().err)
    assert line["level"] == "ERROR"
    assert line["message"] == "at redis://u:***@h"
    assert line["logger"] == "fastworker.x"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert "hunter2" not in line["error"]
    assert "ValueError" in line["error"]


def test_no_secret_in_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO", "human")
    try:
        int("postgresql://u:hunter2@h/x")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["human", "json"])
def test_no_secret_of_an_option_or_an_argument(
    form: Literal["human", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("INFO", form)
    log = logging.getLogger("x")
    error = RuntimeError({"host": "h", "password": "hunter2"})
    error.__cause__ = ValueError("rediss://u:hunter2@h?ssl_password=hunter2")
    log.error("with %r", {"token": "hunter2"}, exc_info=error)
    log.warning("dsn %s", "host=h password=hunter2 dbname=x")
    said = capsys.readouterr().err
    assert "hunter2" not in said
    assert said.count("***") == 5
    assert "dbname=x" in said


def test_no_secret_in_a_status_that_is_cut() -> None:
    """Half a URL does not look like one."""
    slot = Heartbeats(1)[0]
    slot.open("worker-0")
    for before in range(140, 200):
        slot.failed(RuntimeError(f"{'x' * before} redis://u:hunter2hunter2@h"))
        assert "hunter2" not in slot.snapshot().error
    assert slot.snapshot().gauges.error_ms > 0


def _record(message: str, created: float) -> logging.LogRecord:
    record = logging.LogRecord("x", logging.WARNING, "", 0, message, (int(created),), None)
    record.created = created
    return record


def test_repeats_of_one_template_are_limited_and_counted() -> None:
    limit = RepeatLimit()
    passed = [limit.filter(_record("attempt %d", n / 100)) for n in range(100)]
    assert passed.count(True) == REPEATS_MAX
    assert limit.filter(_record("another %d", 1.0))
    late = _record("attempt %d", WINDOW_S + 1)
    assert limit.filter(late)
    assert late.getMessage() == f"attempt 11 (and {100 - REPEATS_MAX} more like it since)"
    assert limit.filter(_record("attempt %d", WINDOW_S + 2))


def test_templates_remembered_are_bounded() -> None:
    limit = RepeatLimit()
    for n in range(fastworker_log.TEMPLATES_MAX * 3):
        assert limit.filter(_record(f"{n} %d", 0.0))
    assert len(limit._windows) <= fastworker_log.TEMPLATES_MAX


EVIL = "x\n[2026-11-27 00:00:00] [CRITICAL] lost\r\x1b[31m\x9b1m\x00\x7f\u2028\u202e\u2066\ufeff\ud800"
ESCAPED = r"x\n[2026-11-27 00:00:00] [CRITICAL] lost\r\x1b[31m\x9b1m\x00\x7f\u2028\u202e\u2066\ufeff\ud800"


@pytest.mark.parametrize("form", ["human", "json"])
def test_what_others_wrote_is_one_line(form: Literal["human", "json"], capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("INFO", form)
    logging.getLogger("x").warning("Set aside: %s", EVIL)
    try:
        raise ValueError(EVIL)  # noqa: TRY301
    except ValueError:
        logging.getLogger("x").exception("at %s", EVIL, extra={"lines": ["stack", EVIL]})
    said = capsys.readouterr().err
    assert not set(said) & set("\r\x1b\x9b\x00\x7f\u2028\u202e\u2066\ufeff\ud800")
    if form == "human":
        first, second, *rest = said.splitlines()
        assert first.endswith(f"[WARNING] Set aside: {ESCAPED}")
        assert second.endswith(f"[ERROR] at {ESCAPED}")
        assert rest[:2] == ["  stack", f"  {ESCAPED}"]
        assert all(line.startswith("  ") for line in rest), "only a record begins at the margin"
        assert "  Traceback (most recent call last):" in rest
    else:
        first, second = map(json.loads, said.splitlines())
        assert first["message"] == f"Set aside: {ESCAPED}"
        assert second["lines"] == ["stack", ESCAPED]
        assert r"\x1b[31m" in second["error"]


def test_printable_leaves_text_alone() -> None:
    for text in ("", "Grüße 日本語 👩‍👩‍👧 \\n [x]", "العربية"):
        assert printable(text) == text
    assert json.loads(printable_json(json.dumps({"a": EVIL[:-1]}, ensure_ascii=False, indent=1))) == {"a": EVIL[:-1]}


def test_lines_that_nobody_reads_are_counted_and_told() -> None:
    reading, writing = os.pipe()
    handler = NeverWaits(writing)
    handler.setFormatter(Json())
    for n in range(3_000):
        handler.emit(logging.makeLogRecord({"msg": f"{n} {'x' * 100}", "levelname": "INFO", "name": "n"}))
    assert os.get_blocking(writing)
    said = b""

    def read() -> None:
        nonlocal said
        os.set_blocking(reading, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(reading, 65_536):
                said += data

    read()
    handler.flush()
    read()
    handler.emit(logging.makeLogRecord({"msg": "the last", "levelname": "INFO", "name": "n"}))
    handler.close()
    read()
    lines = [json.loads(line)["message"] for line in said.splitlines()]
    [at] = [n for n, line in enumerate(lines) if "log lines are lost" in line]
    assert lines[:at] == [f"{n} {'x' * 100}" for n in range(at)], "in order, whole"
    assert int(lines[at].split()[0]) == 3_000 - at
    assert lines[at + 1 :] == ["the last"]
    os.close(reading)
    os.close(writing)


def test_a_reader_that_is_gone_costs_nothing_but_lines() -> None:
    reading, writing = os.pipe()
    handler = NeverWaits(writing)
    os.close(reading)
    handler.write("one\n")
    handler.close()
    os.close(writing)


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_closed_descriptors_become_the_null_device(closed: str) -> None:
    """Or the next file or socket would be it, and get what we print."""
    code = (
        "import os, sys; from fastworker.log import open_standard_descriptors; open_standard_descriptors(); "
        "print('x'); print('y', file=sys.stderr); sys.stdout.flush(); "
        f"assert all(os.readlink(f'/proc/self/fd/{{n}}') == '/dev/null' for n in [{closed.replace(' ', ', ')}]); "
        "sys.exit(7)"
    )
    close = " ".join(f"{n}{'<' if n == '0' else '>'}&-" for n in closed.split())
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {close}', sys.executable, code], check=False)
    assert done.returncode == 7

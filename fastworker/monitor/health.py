"""What `fastworker health` asks. It starts every ten seconds beside each service, so it imports next to nothing."""

from __future__ import annotations

import http.client
import os
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

ANSWER_S: Final = 3.0
"""Of the image's health check, which has five seconds with our start, and none of our words after them."""


def note_of(default: int) -> Path:
    """Where a service that could not have the default port notes which one it has."""
    return Path(tempfile.gettempdir()) / f"fastworker-{os.getuid()}-http-{default}"


def real_port(default: int) -> int:
    """The port of the service that left a note, while it lives; else the default."""
    with suppress(OSError, ValueError):
        fd = os.open(note_of(default), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, encoding="ascii") as note:  # noqa: PTH123 - a descriptor
            port, pid = map(int, note.read(40).split())
            if os.fstat(fd).st_uid == os.getuid() and Path(f"/proc/{pid}").exists():
                return port
    return default


def ask_health(host: str, ports: Sequence[int], path: str) -> tuple[bool, str]:
    """Whether every service that answers on these ports is well (at least one must), and what they say."""
    answers = [answer for port in ports if (answer := _ask(host, port, path)) is not None]
    if not answers:
        return False, f"nobody answers on {host}, port {' or '.join(map(str, ports))}"
    return all(well for well, _ in answers), "; ".join(words for _, words in answers)


def _ask(host: str, port: int, path: str) -> tuple[bool, str] | None:
    """Whether a service's own port says that it is well, and its words; None when nobody listens."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    with closing(http.client.HTTPConnection(address, port, timeout=ANSWER_S)) as connection:
        try:
            connection.connect()
        except TimeoutError:
            return False, "no answer in time"
        except OSError:
            return None
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status == 200, response.read(2000).decode(errors="replace").strip()
        except TimeoutError:
            return False, "no answer in time"
        except (OSError, http.client.HTTPException) as error:
            return False, str(error) or "no answer"

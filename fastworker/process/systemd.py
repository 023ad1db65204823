"""What systemd is told (sd_notify): one datagram, no connection kept, because the parent holds no sockets."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

WATCHDOG_S: Final = 1.0


class Systemd:
    def __init__(self, address: str | None) -> None:
        """`address`: NOTIFY_SOCKET; None: nobody listens."""
        self._address = address
        self._said_ready = False
        self._at = 0.0

    def alive(self, now: float, *, is_ready: bool) -> None:
        if is_ready and not self._said_ready:
            self._said_ready = True
            self.tell("READY=1")
        if now - self._at >= WATCHDOG_S:
            self._at = now
            self.tell("WATCHDOG=1")

    def tell(self, message: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode(), address)

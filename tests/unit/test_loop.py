"""What is left open is told at once; with uvloop's own loop the first of these waits until its time is up."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from tests.loop import Loop


def test_a_transport_that_is_left_open_fails_the_test() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = Loop()
        left = loop.run_until_complete(loop.create_connection(asyncio.Protocol, sock=ours.dup()))
        with pytest.raises(AssertionError, match="unclosed resource <UnixTransport closed=False"):
            loop.close()
        assert loop.is_closed()
        del left


def test_what_was_closed_is_fine() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop = Loop()
        made: Any = loop.run_until_complete(loop.create_connection(asyncio.Protocol, sock=ours.dup()))
        made[0].close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

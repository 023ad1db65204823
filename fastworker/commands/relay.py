"""`fastworker relay`: recorded or simulated frames, served as a relay serves them."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path
from typing import Literal

import msgspec

from fastworker.errors import ConfigError, ExitCode, Unreachable
from fastworker.event.recording import FramesFile
from fastworker.process.signals import stop_on_signals
from fastworker.simulator.network import LiveClock, Network, SimFrame
from fastworker.simulator.relay import SimRelay, serve


class RelayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`file` None: a simulated network, of `events` frames or without end."""

    file: Path | None
    little_endian: bool
    host: str
    port: int
    rate: float | None
    events: int | None
    seed: int
    mix: Literal["production", "adversarial", "surge"]


async def serve_relay(options: RelayOptions) -> ExitCode:
    """Until a signal. Raises Unreachable and ConfigError where it cannot listen."""
    is_endless = options.file is None and options.events is None

    def tell(relay: SimRelay) -> None:
        sys.stdout.write(f"RELAY_URL={relay.url}\n")
        sys.stdout.flush()

    try:
        with stop_on_signals() as stop:
            await serve(
                _frames(options),
                stop,
                host=options.host,
                port=options.port,
                rate=options.rate,
                start="oldest",
                window=20_000 if is_endless else 50_000,
                on_ready=tell,
            )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unreachable(
                f"Port {options.port} of {options.host} is in use: give --port another one, or 0"
            ) from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES) or isinstance(error, socket.gaierror):
            why = error.strerror or error
            raise ConfigError(f"Cannot listen on {options.host} port {options.port}: {why}") from error
        raise
    return ExitCode.DONE


def _frames(options: RelayOptions) -> Iterable[SimFrame | bytes | str]:
    if options.file is not None:
        return FramesFile(options.file, little_endian=options.little_endian)
    records_max = None if options.events else 60_000
    network = Network(options.seed, mix=options.mix, clock=LiveClock(), records_max=records_max)
    if options.events:
        return network.frames(options.events)
    return chain.from_iterable(network.step() for _ in count())

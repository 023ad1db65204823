"""OpenTelemetry, where it is asked for: a span per flush, sent in batches by a thread of the SDK's.

Nothing of OpenTelemetry is imported before `start`, which is called in the process that traces, after the fork. What
the SDK can be told, it is told by its own OTEL_* variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from threading import Thread
from typing import Final, Protocol

from fastworker import __version__
from fastworker.errors import ConfigError, how_to_install

STOP_S: Final = 2.0
"""How long the end waits for spans that are not sent yet."""


class Span(Protocol):
    def set_attribute(self, key: str, value: int | str) -> None: ...


OpenSpan = Callable[[str], AbstractContextManager[Span]]


class _NoSpan:
    def set_attribute(self, key: str, value: int | str) -> None:
        """A span that records nothing: tracing is off."""


_NO_SPAN: Final = _NoSpan()


@contextmanager
def no_span(_name: str) -> Iterator[Span]:
    yield _NO_SPAN


def require() -> None:
    """Raises ConfigError where the extra is not installed."""
    try:
        found = find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(f"FASTWORKER_TRACING=on needs OpenTelemetry: {how_to_install('otel')}")


@contextmanager
def spans(*, on: bool) -> Iterator[OpenSpan]:
    """How to open a span, until the block ends."""
    if not on:
        yield no_span
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
        resource = resource.merge(Resource({SERVICE_NAME: "fastworker"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield provider.get_tracer("fastworker", __version__).start_as_current_span
    finally:
        sending = Thread(target=provider.shutdown, daemon=True)
        sending.start()
        sending.join(STOP_S)

"""HTTP for operators: /metrics, /livez, /readyz, /status.json and a page at /.

Shows what a `Source` says; knows nothing of where the figures come from. Answers come from the latest reading, so
that a scrape never waits for Redis or PostgreSQL.

The page and /status.json show what the network wrote (dead letters), so they answer only to names that are ours: a web
site whose name is pointed at this port (DNS rebinding) could read them otherwise. /metrics, /livez and /readyz hold
figures and our own sentences, and scrapers and probes ask by any name: they answer to all.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from fastworker.errors import ConfigError, Unreachable
from fastworker.metrics import Figures

log = logging.getLogger(__name__)

SHUTDOWN_S = 1.0
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing but this port's own files runs, styles or is asked; nothing frames the page."""
CONNECTIONS_MAX = 32
"""More would cost the monitor the descriptors that it needs for Redis: the oldest go."""
CONNECTION_S = 60.0
"""Longest life of one: whoever sends half a request holds it no longer. A scraper connects again."""


class Source(Protocol):
    """What is shown. All are immediate: they return the latest reading."""

    def figures(self) -> Figures: ...

    def why_not_live(self) -> list[str]:
        """Reasons, as sentences, why this process is beyond help; empty when it is well."""

    def why_not_ready(self) -> list[str]:
        """Reasons why it is not connected, fresh and progressing; empty when it is."""

    def status_json(self) -> bytes: ...

    def history_json(self) -> bytes: ...


class _Collector:
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        figures = self._source.figures()
        for metric, values in figures:
            family: Metric
            if not values:
                continue
            if metric.kind == "histogram":
                family = HistogramMetricFamily(metric.name, metric.why)
                buckets = [(bound, value) for (bound,), value in values.items()]
                family.add_metric([], buckets, sum_value=figures.sum_of(metric))
                yield family
                continue
            if metric.kind == "counter":
                family = CounterMetricFamily(metric.name, metric.why, labels=metric.labels)
            else:
                family = GaugeMetricFamily(metric.name, metric.why, labels=metric.labels)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


def is_ours(host_header: str, names: Iterable[str]) -> bool:
    """Whether a request meant this server: by an address, as localhost, or by one of the names (`*`: any)."""
    host = host_header.strip().lower()
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    host = host.rstrip(".")
    allowed = {name.lower().rstrip(".") for name in names}
    if "*" in allowed or host in allowed or host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _named(answer: Callable[[web.Request], Awaitable[web.Response]], names: Iterable[str]) -> Any:
    async def guarded(request: web.Request) -> web.Response:
        headers = request.headers.getall("Host", [])  # none: HTTP/1.0, which no browser speaks
        if all(is_ours(header, names) for header in headers):
            return await answer(request)
        return web.Response(
            text="This page answers to addresses, localhost and its host's own name only. Another name must be in "
            "FASTWORKER_HTTP_HOSTS.\n",
            status=421,
        )

    return guarded


def _application(source: Source, names: Iterable[str]) -> web.Application:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(source))
    page = resources.files("fastworker.monitor").joinpath("status.html").read_bytes()

    def answer(reasons: list[str]) -> web.Response:
        return web.Response(text="\n".join(reasons or ["ok"]) + "\n", status=503 if reasons else 200)

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def livez(_request: web.Request) -> web.Response:
        return answer(source.why_not_live())

    async def readyz(_request: web.Request) -> web.Response:
        return answer(source.why_not_ready())

    async def status(_request: web.Request) -> web.Response:
        return web.Response(body=source.status_json(), content_type="application/json")

    async def history(_request: web.Request) -> web.Response:
        return web.Response(body=source.history_json(), content_type="application/json")

    async def index(_request: web.Request) -> web.Response:
        return web.Response(body=page, content_type="text/html", headers=_PAGE_HEADERS)

    def shipped(name: str, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        body = resources.files("fastworker.monitor").joinpath(name).read_bytes()

        async def answer(_request: web.Request) -> web.Response:
            return web.Response(body=body, content_type=content_type, headers=_PAGE_HEADERS)

        return answer

    async def as_declared(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Content-Type-Options"] = "nosniff"

    app = web.Application(client_max_size=1024)
    app.on_response_prepare.append(as_declared)
    app.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.get("/status.json", _named(status, names)),
            web.get("/", _named(index, names)),
        ]
    )
    app.router.add_get("/history.json", _named(history, names))
    app.router.add_get("/status.css", shipped("status.css", "text/css"))
    app.router.add_get("/status.js", shipped("status.js", "text/javascript"))
    return app


async def _end_old_connections(server: web.Server) -> None:
    since: dict[Any, float] = {}
    while True:
        await asyncio.sleep(1.0)
        now = time.monotonic()
        since = {one: since.get(one, now) for one in server.connections}  # the oldest first
        surplus = len(since) - CONNECTIONS_MAX
        for n, (one, begun) in enumerate(since.items()):
            if (n < surplus or now - begun > CONNECTION_S) and one.transport is not None:
                one.transport.abort()


@asynccontextmanager
async def serve(source: Source, host: str, port: int, names: Iterable[str] = ()) -> AsyncIterator[int]:
    """Listen until the block ends; yields the port, which differs from `port` where that is 0.

    `names`: those that the page answers to, beside addresses, localhost and this machine's own.
    """
    app = _application(source, {*names, socket.gethostname(), host})
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S, keepalive_timeout=30)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_is_taken(host, port) from error
            raise ConfigError(f"Cannot listen on {host} port {port}: {error.strerror or error}") from error
        bound: int = runner.addresses[0][1]
        log.info("HTTP on http://%s:%d: /metrics /livez /readyz and a status page at /", host, bound)
        assert runner.server is not None
        tidying = asyncio.create_task(_end_old_connections(runner.server), name="end old connections")
        try:
            yield bound
        finally:
            tidying.cancel()
    finally:
        await runner.cleanup()


def port_is_taken(host: str, port: int) -> Unreachable:
    return Unreachable(f"Port {port} of {host} is in use: set FASTWORKER_HTTP_PORT to another one, to 0 or to off")

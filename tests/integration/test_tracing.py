"""A span per flush for those who ask for it, and no tracing in the memory of those who do not."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import redis
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fastworker.edge import tracing
from fastworker.errors import ConfigError
from tests.services import Service, until

POST = {
    "type": "commit",
    "data": '{"repo":"did:plc:aaaaaaaaaaaaaaaaaaaaaaaa","ops":[{"action":"create","path":"app.bsky.feed.post/3k00000000001",'
    '"cid":"bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge","record":{"$type":"app.bsky.feed.post",'
    '"text":"hello","createdAt":"2024-01-01T00:00:00.000Z"}}]}',
    "seq": "1",
}


def test_nothing_is_imported_when_it_is_off() -> None:
    """By us: the Redis client imports OpenTelemetry's metrics wherever it finds them."""
    code = "import sys, fastworker.cli, fastworker.commands.up, fastworker.worker.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "google.protobuf", "requests")
    assert [name for name in done.stdout.split() if name.startswith(ours)] == []


def test_who_wants_it_without_the_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.require()
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[otel\]"'):
        tracing.require()


class Collector:
    """Takes OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        kept = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                kept.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


def test_spans_reach_a_collector(
    services: Callable[..., Service], collector: Collector, redis_url: str, postgres_url: str
) -> None:
    env = {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url, "FASTWORKER_HTTP_PORT": "off"}
    worker = services("worker", FASTWORKER_TRACING="on", OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, **env)
    with redis.Redis.from_url(redis_url, socket_timeout=10) as client:
        client.xadd("firehose:events", POST)
        until(lambda: client.hget("fastworker:ledger", "committed") == b"1")
    assert worker.stop() == 0  # what was not sent yet is sent at the end
    [sent] = [one for request in collector.requests for one in request.resource_spans]
    [span] = [span for scope in sent.scope_spans for span in scope.spans]
    about = {pair.key: pair.value for pair in span.attributes}
    assert span.name == "flush"
    assert span.end_time_unix_nano > span.start_time_unix_nano
    assert about["fastworker.entries"].int_value == about["fastworker.changes"].int_value == 1
    assert about["fastworker.consumer"].string_value.startswith("python-worker-")
    named = {pair.key: pair.value.string_value for pair in sent.resource.attributes}
    assert named["service.name"] == "fastworker"

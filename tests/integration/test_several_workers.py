"""Two workers share a stream: what each reports, and what the dashboard makes of both."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from prometheus_client.parser import text_string_to_metric_families

from fastworker import metrics
from fastworker.stream.keys import USUAL
from tests.services import ROOT, Service, get, run, until

EVENTS = 900


def scrape(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample's name to label values to value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(get(port, "/metrics")[1]):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_each_reports_the_whole_stream_and_its_own_part(
    services: Callable[..., Service], redis_url: str, postgres_url: str, tmp_path: Path
) -> None:
    env = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": postgres_url,
        "FASTWORKER_RESOLVE_HANDLES": "off",
        "FASTWORKER_SYNC": "off",
    }
    assert run("migrate", **env).returncode == 0
    relay = services("relay", "--events", str(EVENTS), "--rate", "300", "--port", "0")
    env["FASTWORKER_HTTP_PORT"] = "0"
    workers = [services("worker", CONSUMER_ID=f"w{number}", BATCH_SIZE="10", **env) for number in range(2)]
    ports = [int(worker.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1]) for worker in workers]
    until(lambda: all(get(port, "/readyz")[0] == 200 for port in ports))
    reader = services("reader", RELAY_URL=relay.wait_for("RELAY_URL=(.+)")[1], **env)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:

        def settled() -> int:
            return sum(int(client.hget("fastworker:ledger", outcome) or 0) for outcome in metrics.OUTCOMES)

        def is_all_done() -> bool:
            told = client.hgetall(USUAL.reader_stats)
            return int(told.get("frames", 0)) >= EVENTS and settled() == int(told["entries"])

        until(is_all_done)
        total = settled()
    reader_port = int(reader.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1])
    until(lambda: "fastworker_reader_cursor_age_seconds" in scrape(reader_port))
    [age] = scrape(reader_port)["fastworker_reader_cursor_age_seconds"].values()
    assert age < 300, "what the relay simulates is dated now: nobody is behind"
    of_stream = {metric.name for metric in metrics.WORKER_METRICS if metric in metrics.OF_STREAM}

    def is_told() -> bool:  # a reading is a second old
        return all(sum(scrape(port)["fastworker_entries_total"].values()) == total for port in ports)

    until(is_told)
    first, second = (scrape(port) for port in ports)
    steady = of_stream - {"fastworker_stream_bytes", "fastworker_stream_entries"}  # trimming goes on; bytes are sampled
    for name in steady & first.keys():
        assert first[name] == second[name], name
    assert {"fastworker_entries_total", "fastworker_events_total", "fastworker_drops_total"} <= first.keys()
    own = [one["fastworker_latency_seconds_count"][()] for one in (first, second)]
    assert all(own), "both had a part"
    assert sum(own) == total, "what is not of the stream adds up to it"
    if (promtool := shutil.which("promtool")) is not None:
        _assert_the_dashboard_counts_once(promtool, tmp_path, total, first, second)


def _assert_the_dashboard_counts_once(promtool: str, folder: Path, total: int, *scrapes: dict[str, Any]) -> None:
    """Prometheus evaluates the dashboard's own query on what the two workers told."""
    dashboard = json.loads((ROOT / "docs/monitoring/grafana-dashboard.json").read_text())
    [query] = [panel["targets"][0]["expr"] for panel in dashboard["panels"] if panel["title"] == "Finished"]
    query = query.replace("$__rate_interval", "1m").replace("$instance", ".*")
    lines = ["evaluation_interval: 1m", "tests:", "- interval: 1m", "  input_series:"]
    for number, one in enumerate(scrapes):
        for labels, value in one["fastworker_entries_total"].items():
            shown = ",".join(f'{name}="{text}"' for name, text in (*labels, ("instance", f"w{number}")))
            series = json.dumps(f"fastworker_entries_total{{{shown}}}")
            lines.append(f"  - {{series: {series}, values: '0+{value:g}x9'}}")  # as if it were so much a minute
    lines += ["  promql_expr_test:", f"  - expr: {json.dumps(f'round({query} * 60)')}", "    eval_time: 5m"]
    lines += [f"    exp_samples: [{{labels: '{{}}', value: {total}}}]"]
    (folder / "finished.yml").write_text("\n".join(lines))
    done = subprocess.run(
        [promtool, "test", "rules", folder / "finished.yml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

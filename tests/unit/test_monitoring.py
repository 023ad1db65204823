"""What docs/ tells Prometheus, Grafana and scripts is what the code says; the alert rules fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastworker import metrics
from fastworker.metrics import METRICS
from fastworker.monitor import facts

DOCS = Path(__file__).resolve().parents[2] / "docs"
MONITORING = DOCS / "monitoring"
ALERTS = (MONITORING / "alerts.yml").read_text()
BY_NAME = {metric.name: metric for metric in METRICS}
OF_PROMETHEUS = {"instance", "job", "service", "le"}


def queries() -> list[str]:
    """Of the dashboard; the window that Grafana fills in is five minutes."""
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [query.replace("$__rate_interval", "5m") for query in found]


def rules() -> dict[str, str]:
    """Expression by alert."""
    found = re.findall(r"- alert: (\w+)\n\s+expr: (?:>\n)?((?:.|\n)+?)\n\s+(?:for|labels):", ALERTS)
    return {name: " ".join(text.split()) for name, text in found}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bfastworker_\w+", text))


def is_known(name: str) -> bool:
    histogram = BY_NAME.get(re.sub(r"_(bucket|sum|count)$", "", name))
    return name in BY_NAME or (histogram is not None and histogram.kind == "histogram")


@pytest.mark.parametrize(("file", "text"), [("metrics.md", metrics.markdown()), ("status-json.md", facts.markdown())])
def test_the_generated_pages_are_up_to_date(file: str, text: str) -> None:
    assert (DOCS / file).read_text() == text


def test_dashboard_and_alerts_name_metrics_and_labels_that_exist() -> None:
    assert len(queries()) > 40
    assert len(rules()) == ALERTS.count("- alert:")
    for query in [*queries(), *rules().values()]:
        names = names_in(query)
        assert names or query.startswith("up{"), query
        assert {name for name in names if not is_known(name)} == set(), query
        labels = {label for name in names if name in BY_NAME for label in BY_NAME[name].labels} | OF_PROMETHEUS
        used = {label for group in re.findall(r"\b(?:by|on) \(([\w, ]+)\)", query) for label in group.split(", ")}
        used |= set(re.findall(r"[{,]\s*(\w+)=", query))
        assert used <= labels, query


def test_figures_of_the_stream_are_never_added_up_over_its_workers() -> None:
    """Several workers on one stream report the same figure each."""
    for query in [*queries(), rules()["FastworkerAbandonedEntries"]]:
        for name in names_in(query):
            if BY_NAME.get(name) in metrics.OF_STREAM:
                greatest = rf"\b(max|min)( by \([\w, ]+\))? ?\(((rate|increase)\()?{name}\b"
                assert len(re.findall(greatest, query)) == query.count(name), query


def test_the_dashboard_shows_the_chosen_instances_only() -> None:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource", "instance"]
    for query in queries():
        assert query.count("fastworker_") == query.count('{instance=~"$instance"}'), query


def test_every_metric_is_watched_or_drawn() -> None:
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for query in [*queries(), ALERTS] for name in names_in(query)}
    # A release and a cursor are told, not watched; the last one says what others say better.
    beside = {"build_info", "reader_cursor", "stream_trimmed_total"}
    assert set(BY_NAME) - seen == {f"fastworker_{name}" for name in beside}


def test_closed_labels_have_one_name_each() -> None:
    for metric in METRICS:
        assert len(set(metric.closed)) == len(metric.closed)
        assert not metric.closed or len(metric.labels) == 1
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_every_alert_is_explained() -> None:
    page = (DOCS / "monitoring.md").read_text()
    assert set(re.findall(r"`(Fastworker\w+)`", page)) == set(rules())


# --- with Prometheus' own tool


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not there: apt-get install prometheus")
    return found


def run(*args: str | Path) -> None:
    done = subprocess.run([*args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_the_files(promtool: str, tmp_path: Path) -> None:
    run(promtool, "check", "config", MONITORING / "prometheus.yml")  # and the rules that it names
    lines = [
        line for n, query in enumerate(queries()) for line in (f"  - record: q{n}", f"    expr: {json.dumps(query)}")
    ]
    (tmp_path / "queries.yml").write_text("\n".join(["groups:", "- name: dashboard", "  rules:", *lines]))
    run(promtool, "check", "rules", tmp_path / "queries.yml")


# Values of one scrape a minute. Everything at rest and well, in Prometheus' notation `from+step x times`.
WELL = {
    "up": "1x90",
    "fastworker_ready": "1x90",
    'fastworker_reader_connected{relay="h"}': "1x90",
    "fastworker_reader_silent": "0x90",
    "fastworker_reader_cursor_age_seconds": "1x90",
    "fastworker_reader_gaps_total": "0x90",
    'fastworker_reader_events_total{kind="#commit"}': "0+60000x90",
    'fastworker_verify_total{verdict="ok"}': "0+60000x90",
    'fastworker_verify_total{verdict="break"}': "0+6x90",
    'fastworker_verify_total{verdict="bad_signature"}': "3x90",
    'fastworker_verify_total{verdict="bad_commit"}': "0x90",
    'fastworker_verify_total{verdict="future_rev"}': "0+1x90",
    "fastworker_reader_reconnects_total": "3x90",
    "fastworker_reader_waits_for_room": "0x90",
    "fastworker_lag_seconds": "0.1x90",
    "fastworker_stream_full_seconds": "1e9x90",
    "fastworker_stream_entries": "1000x90",
    "fastworker_stream_entries_max": "500000x90",
    'fastworker_oldest_unsettled_seconds{process="worker-0"}': "0.2x90",
    "fastworker_pending_entries": "50x90",
    'fastworker_held_entries{process="worker-0"}': "50x90",
    "fastworker_redis_answer_age_seconds": "1x90",
    'fastworker_postgresql_answer_age_seconds{process="worker-0"}': "2x90",
    'fastworker_entries_total{outcome="committed"}': "0+60000x90",
    'fastworker_entries_total{outcome="set_aside"}': "7x90",
    'fastworker_drops_total{reason="bad_record"}': "0+600x90",
    "fastworker_process_restarts_total": "1x90",
    'fastworker_retries_total{cause="conflict"}': "0+5x90",
    'fastworker_process_memory_bytes{process="worker-0"}': "40000000x90",
    "fastworker_unaccounted_entries": "0x90",
    "fastworker_oldest_debt_seconds": "0.4x90",
    "fastworker_debts_put_back": "0x90",
    'fastworker_truth_ratio{table="posts"}': "1x90",
    "fastworker_repair_oldest_seconds": "900x90",
}
# What is otherwise when an alert should fire.
ILL = {
    "FastworkerDown": {"up": "0x90"},
    "FastworkerNotReady": {"ready": "0x90"},
    "FastworkerReaderDisconnected": {"reader_connected": "0x90"},
    "FastworkerReaderSilent": {"reader_silent": "1x90"},
    "FastworkerReaderBehind": {"reader_cursor_age_seconds": "3700+60x90"},
    "FastworkerReaderGap": {"reader_gaps_total": "0x60 1x30"},
    "FastworkerChainBreaks": {'verify_total{verdict="break"}': "0+1200x90"},
    "FastworkerForgedCommits": {'verify_total{verdict="bad_signature"}': "3x60 4x30"},
    "FastworkerFutureCommits": {'verify_total{verdict="future_rev"}': "0+30000x90"},
    "FastworkerReaderFlaps": {"reader_reconnects_total": "0+1x90"},
    "FastworkerLag": {"lag_seconds": "0+10x90"},
    "FastworkerStreamFillsUp": {"stream_full_seconds": "1800x90", "stream_entries": "200000x90"},
    "FastworkerStreamFull": {"reader_waits_for_room": "1x90"},
    "FastworkerFlushHangs": {"oldest_unsettled_seconds": "0+60x90"},
    "FastworkerAbandonedEntries": {"held_entries": "0x90"},
    "FastworkerRedisSilent": {"redis_answer_age_seconds": "0+60x90"},
    "FastworkerPostgresqlSilent": {"postgresql_answer_age_seconds": "0+60x90"},
    "FastworkerDeadLetters": {'entries_total{outcome="set_aside"}': "7x60 8x30"},
    "FastworkerDrops": {"drops_total": "0+6000x90"},
    "FastworkerRestarts": {"process_restarts_total": "0+1x90"},
    "FastworkerRetries": {"retries_total": "0+120x90"},
    "FastworkerMemory": {"process_memory_bytes": "600000000x90"},
    "FastworkerDebtsOld": {"oldest_debt_seconds": "0+60x90"},
    "FastworkerDebtsPutBack": {"debts_put_back": "1x90"},
    "FastworkerUntrue": {"truth_ratio": "0.99x90"},
    "FastworkerRepairsLate": {"repair_oldest_seconds": "20000+60x90"},
    "FastworkerUnaccounted": {"unaccounted_entries": "12x90"},
}


def test_every_alert_has_a_state_in_which_it_should_fire() -> None:
    assert set(ILL) == set(rules())


def test_every_alert_fires_when_it_should_and_no_other_does(promtool: str, tmp_path: Path) -> None:
    """One instance for each alert, ill in that way alone, and one that is well."""
    lines = [f"rule_files: [{MONITORING / 'alerts.yml'}]", "evaluation_interval: 1m", "tests:"]
    lines += ["- interval: 1m", "  input_series:"]
    for instance, changes in [("well", {}), *ILL.items()]:
        series = dict(WELL)
        for name, values in changes.items():
            [full] = [one for one in series if re.match(rf"(fastworker_)?{re.escape(name)}($|{{)", one)]
            series[full] = values
        for full, values in series.items():
            name, _, labels = full.rstrip("}").partition("{")
            here = f'instance="{instance}",job="fastworker-{instance}"'  # a job is a stream
            labels = f"{labels},{here}" if labels else here
            lines.append(f"  - {{series: {json.dumps(f'{name}{{{labels}}}')}, values: {values!r}}}")
    lines += ["  promql_expr_test:", '  - expr: count by (alertname, job) (ALERTS{alertstate="firing"})']
    lines += ["    eval_time: 80m", "    exp_samples:"]
    lines += [f"""    - {{labels: '{{alertname="{alert}",job="fastworker-{alert}"}}', value: 1}}""" for alert in ILL]
    (tmp_path / "alerts_test.yml").write_text("\n".join(lines))
    run(promtool, "test", "rules", tmp_path / "alerts_test.yml")

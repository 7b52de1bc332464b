"""Rules, dashboards and the runbook hold together, and show something when the real services are scraped."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from alora_serve.rpc.tls import ClientTls
from deployment import deployed, save_tiny_model
from every_request import everything_once
from front_door import front_door
from prometheus_pages import Scraper, bare, empty_queries, pages, panels, queries
from redis_servers import free_port, make_certificates

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yaml"))
ALERT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yaml"))
RUNBOOK = ROOT / "docs" / "operations.md"

OF_PROMETHEUS = {"up", "ALERTS"}
TARGET_LABELS = {"job", "instance", "namespace"}
_METRIC_ROW = re.compile(r"^\| `(alora_\w+)` \| (\w+) \| (?:(.*?) )?\|", re.MULTILINE)
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^{}]*)\}")
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
_MADE = re.compile(r'"(\w+)", "\$1"')
_NAME = re.compile(r"(?<![\w:.$])[a-zA-Z_:][\w:]*\b(?!\s*\()")
_WORDS = {"and", "or", "unless", "offset", "bool"}

CHOICES = ["namespace", "job", "instance"]
"""Of every dashboard; each is of those chosen before it."""

ABSENT_WHILE_WELL = {
    'alora_rpc_handled_total{code=~"INTERNAL|UNKNOWN"}',
    'alora_rpc_handled_total{method=~"/alora_serve.v1.AloraService/.+", code="FAILED_PRECONDITION"}',
    'alora_http_requests_total{route!~"(GET|HEAD) /(health|metrics)", status=~"500|503|504"}',
    'ALERTS{alertname="AloraServiceDown"}',
    'ALERTS{alertname="AloraFrontDoorMissing"}',
}
"""What alerts ask for and a deployment that is well does not have."""

COUNTED = [
    f"/alora_serve.v1.AloraService/{method}"
    for method in ("Generate", "FanOut", "Prefill", "Score", "RunIntrinsic", "RunIntrinsics")
]
"""Calls whose failures count against the objective."""

OF_THE_MACHINE = {"AloraFirstTokenBudgetBurnsFast", "AloraFirstTokenBudgetBurnsSlowly"}
"""Alerts that a slow enough machine makes fire."""

ALWAYS = "AloraAlways"
"""An alert that fires, for the panel that counts them."""

SCRAPED_SECONDS, MIN_ROUNDS = 25.0, 3
WINDOW = "10s"


# --- without a deployment ---------------------------------------------------------------------------------------------


def program(name: str) -> str:
    """Path of one of Prometheus's, or a skip."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (apt install prometheus)")
    return path


def promtool(*arguments: str | Path) -> None:
    """Fails with what it prints when it finds something wrong."""
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rules(kind: str) -> list[dict[str, Any]]:
    """All of a kind, ``alert`` or ``record``."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


ALERTS = {rule["alert"]: rule for rule in rules("alert")}


def runbook_sections() -> dict[str, str]:
    """Text by heading, of those below Alerts."""
    text = RUNBOOK.read_text()
    alerts = text[text.index("\n## Alerts\n") : text.index("\n## Sizing\n")]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in alerts.split("\n### ")[1:]}


def documented() -> dict[str, set[str]]:
    """Series names of ``docs/metrics.md`` and their labels; those that recording rules write, without."""
    series: dict[str, set[str]] = {}
    for name, kind, labels in _METRIC_ROW.findall((ROOT / "docs" / "metrics.md").read_text()):
        names = re.findall(r"`(\w+)`", labels)
        if kind == "histogram":
            series |= {f"{name}_bucket": {*names, "le"}, f"{name}_sum": set(names), f"{name}_count": set(names)}
        else:
            series[name] = set(names)
    return series


def metric_names(expression: str) -> set[str]:
    """The series that an expression asks for."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", re.sub(r'"[^"]*"', "", expression))
    return set(_NAME.findall(_GROUPING.sub("", bare))) - _WORDS


def test_prometheus_takes_configuration_and_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("file", ALERT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_on_what_is_ill_and_not_on_what_is_well(file: Path) -> None:
    promtool("test", "rules", file)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tried_both_ways(alert: str) -> None:
    tried = [
        case
        for path in ALERT_TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]
    assert {bool(case["exp_alerts"]) for case in tried} == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{alert.lower()}"
    section = runbook_sections()[alert]
    assert all(word in section.lower() for word in ("**means**", "**look at**", "**do"))


def test_the_runbook_has_alerts_that_exist_and_no_others() -> None:
    assert list(runbook_sections()) == list(ALERTS), "in the order of the rules"


def test_the_runbook_names_panels_that_exist() -> None:
    titles = {
        page["title"].partition(" / ")[2]: {panel["title"] for panel in panels(page)} for page in pages().values()
    }
    text = " ".join(RUNBOOK.read_text().split())
    named = re.findall(rf"\*({'|'.join(titles)}): ([^*]+)\*", text)
    assert len(named) > 20
    assert [(page, panel) for page, panel in named if panel not in titles[page]] == []


def test_rules_and_dashboards_ask_for_metrics_and_labels_that_exist() -> None:
    metrics, recorded = documented(), {rule["record"] for rule in rules("record")}
    labels = set[str]().union(*metrics.values()) | TARGET_LABELS
    asked = [
        (rule.get("alert") or rule["record"], rule["expr"]) for kind in ("alert", "record") for rule in rules(kind)
    ]
    asked += [(f"{page}: {panel}", expression) for page, panel, expression in queries()]
    for where, expression in asked:
        names = metric_names(expression)
        assert names or where.endswith(":objective"), where
        unknown = {
            name for name in names - metrics.keys() - recorded - OF_PROMETHEUS if not name.startswith("process_")
        }
        assert not unknown, where
        for name, matchers in _SELECTOR.findall(expression):
            matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", matchers))
            if name in metrics:
                assert matched <= metrics[name] | TARGET_LABELS, f"{where}: {name}"
        grouped = {label.strip() for found in _GROUPING.findall(expression) for label in found.split(",")} - {""}
        assert grouped <= labels | set(_MADE.findall(expression)), where


def test_questions_of_the_page_find_their_jobs_whatever_stands_before_their_names() -> None:
    """The chart's ServiceMonitors call them by their release."""
    [questions] = re.findall(r"```promql\n(.+?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL)
    jobs = re.findall(r"\bjob(=~?)\"([^\"]+)\"", questions)
    assert len(jobs) == 3
    for operator, name in jobs:
        assert operator == "=~"
        assert all(re.fullmatch(name, job) for job in ("router", "r-alora-serve-router"))


def test_no_query_is_taken_to_have_data_for_a_zero_that_it_draws_itself() -> None:
    drawn = [expression for _, _, expression in queries() if "vector(" in expression]
    assert len(drawn) > 2
    assert [expression for expression in drawn if "vector(" in bare(expression)] == []


def test_dashboards_and_the_charts_copies_are_what_the_panels_say() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "build_dashboards.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run scripts/build_dashboards.py"


def test_what_is_stale_or_nobodys_is_found_and_mended(tmp_path: Path) -> None:
    for folder in ("deploy/grafana/panels", "deploy/prometheus/rules"):
        shutil.copytree(ROOT / folder, tmp_path / folder)

    def build(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "build_dashboards.py"), "--root", str(tmp_path), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert build("--check").returncode == 1
    assert build().returncode == 0
    assert build("--check").returncode == 0
    chart = tmp_path / "deploy" / "helm" / "alora-serve" / "files"
    (chart / "rules" / "alerts.yaml").write_text("groups: []\n")
    (chart / "dashboards" / "gone.json").write_text("{}\n")
    told = build("--check")
    assert told.returncode == 1
    assert {line.rpartition("/")[2] for line in told.stdout.splitlines()} == {"alerts.yaml", "gone.json"}
    build()
    assert not (chart / "dashboards" / "gone.json").exists()
    assert build("--check").returncode == 0


@pytest.mark.parametrize("name", pages())
def test_a_dashboard_is_one_that_grafana_takes_and_people_can_read(name: str) -> None:
    page = pages()[name]
    everything = page["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert [variable["name"] for variable in page["templating"]["list"]] == ["datasource", *CHOICES]
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
    for panel in panels(page):
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert len({panel["title"] for panel in panels(page)}) == len(panels(page))
    assert len({other["uid"] for other in pages().values()}) == len(pages())


@pytest.mark.parametrize("name", pages())
def test_namespaces_are_chosen_first_and_all_of_them_are_those_without_one_too(name: str) -> None:
    """Outside of Kubernetes no series has the label, and a choice of none of its values would show nothing."""
    namespace, job, instance = pages()[name]["templating"]["list"][1:]
    assert namespace["allValue"] == ".*"
    assert 'namespace=~"$namespace"' in job["query"]["query"]
    assert 'namespace=~"$namespace", job=~"$job"' in instance["query"]["query"]


def test_every_query_keeps_to_the_chosen_namespaces_and_tells_them_apart() -> None:
    chosen = 'namespace=~"$namespace"'
    for page, panel, expression in queries():
        asked = expression.replace("and on (namespace, job, instance) alora_tasks", "")
        unbound = [name for name in metric_names(asked) if asked.count(name) != asked.count(f"{name}{{{chosen}")]
        assert all(name.endswith(":objective") for name in unbound), (page, panel)
        if "{{job}}" in panel or ":ratio" in expression:
            assert "{{namespace}}" in panel, (page, panel)
        groupings = [found for found in _GROUPING.findall(expression) if "job" in found]
        assert all(found.startswith("namespace, ") for found in groupings), (page, panel)


def test_recorded_series_keep_their_namespace() -> None:
    for rule in rules("record"):
        groupings = _GROUPING.findall(rule["expr"])
        assert groupings or rule["record"].endswith(":objective")
        assert all(found.startswith("namespace") for found in groupings), rule["record"]


def test_prometheus_scrapes_the_services_of_compose_under_jobs_that_rules_know() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    targets = set[str]()
    for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]:
        static = [target.partition(":")[0] for config in job.get("static_configs", ()) for target in config["targets"]]
        targets |= {*static, *(name for config in job.get("dns_sd_configs", ()) for name in config["names"])}
        assert re.fullmatch(r".*(router|prefill|worker|decode|openai-front)", job["job_name"])
    ours = {name for name, service in compose.items() if "ALORA_ALLOW_INSECURE" in service.get("environment", ())}
    assert targets == ours


# --- with one ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def scraped(jobs: dict[str, list[str]], directory: Path) -> AsyncIterator[Scraper]:
    """A Prometheus that scrapes these addresses and evaluates the rules, both every second."""
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [*map(str, RULES), str(directory / "firing.yaml")],
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": at}]} for job, at in jobs.items()],
    }
    (directory / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
    firing = {"groups": [{"name": "always", "rules": [{"alert": ALWAYS, "expr": "vector(1)"}]}]}
    (directory / "firing.yaml").write_text(json.dumps(firing))
    port = free_port()
    flags = (
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    )
    process = await asyncio.create_subprocess_exec(program("prometheus"), *flags)
    try:
        scraper = Scraper(port, WINDOW)
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(_scrapes, scraper, sum(map(len, jobs.values()))):
                assert process.returncode is None
                await asyncio.sleep(0.2)
        yield scraper
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _scrapes(scraper: Scraper, targets: int) -> bool:
    try:
        return len(scraper.get("query", query="up == 1")["result"]) == targets
    except OSError:
        return False


@pytest.mark.timeout(300)
async def test_every_panel_and_every_rule_has_data_while_traffic_flows_and_no_alert_fires(tmp_path: Path) -> None:
    program("prometheus")  # before the services start
    store, certificates = f"lmdb://{tmp_path / 'store'}", make_certificates(tmp_path)
    authority, server, client = (
        str(file) for file in (certificates.ca_file, certificates.server_file, certificates.client_file)
    )
    settings = {
        "block_tokens": "16",
        "tls_cert_file": server,
        "tls_key_file": server,
        "peer_tls_ca_file": authority,
        "peer_tls_cert_file": client,
        "peer_tls_key_file": client,
    }
    trusting = ClientTls(authority).credentials()
    async with (
        deployed(save_tiny_model(tmp_path), store, workers=2, credentials=trusting, **settings) as running,
        front_door(running.local.router_address, router_tls_ca_file=authority) as door,
    ):
        at = {name: process.metrics_address for name, process in running.local.processes.items()}
        jobs = {"router": [at["router"]], "prefill": [at["prefill"]], "worker": [at["worker-1"], at["worker-2"]]}
        jobs["openai-front"] = [door.listening.metrics_address]
        async with scraped(jobs, tmp_path) as prometheus:
            end, number = time.monotonic() + SCRAPED_SECONDS, 0
            while number < MIN_ROUNDS or time.monotonic() < end:
                number += 1
                await everything_once(running.client, running.model, number)
                assert [model async for model in await door.openai.models.list()]
                await asyncio.sleep(0.5)
            await asyncio.to_thread(_check_all, prometheus)


def _check_all(prometheus: Scraper) -> None:
    empty = empty_queries(prometheus)
    series = [f'alora_rpc_handled_total{{method="{method}"}}' for method in COUNTED]
    empty += [one for one in series if not prometheus.has_values(one)]
    empty += [rule["record"] for rule in rules("record") if not prometheus.has_values(rule["record"])]
    # An alert's expression is empty while all is well; what it asks for is not, but for what only happens otherwise.
    asked_for = {selector for rule in ALERTS.values() for selector in _selectors(rule["expr"])}
    assert asked_for >= ABSENT_WHILE_WELL
    empty += sorted(selector for selector in asked_for - ABSENT_WHILE_WELL if not prometheus.has_values(selector))
    assert empty == []
    evaluated = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule for rule in evaluated if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in evaluated} >= ALERTS.keys()
    assert {rule["name"] for rule in evaluated if rule.get("state") == "firing"} - {ALWAYS} <= OF_THE_MACHINE


def _selectors(expression: str) -> set[str]:
    selected = {f"{name}{{{matchers}}}" for name, matchers in _SELECTOR.findall(expression)}
    return selected | {name for name in metric_names(expression) if not re.search(rf"\b{name}\{{", expression)}

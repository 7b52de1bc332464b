"""What Kubernetes, its operators and checkov say of the rendered chart."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.utils import floatToGoString

from alora_serve.metrics.buckets import REQUEST_SECONDS

ROOT = Path(__file__).resolve().parents[2]
HELM = ROOT / "deploy" / "helm"
CHART = HELM / "alora-serve"

CUSTOM = {
    "cert-manager.io/v1": "@kubernetes-models/cert-manager",
    "gateway.networking.k8s.io/v1": "@kubernetes-models/gateway-api",
    "keda.sh/v1alpha1": "@kubernetes-models/keda",
    "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator",
}
"""Groups whose definitions are checked; that of Envoy Gateway is in no package."""
UNCHECKED = {"gateway.envoyproxy.io/v1alpha1"}

RUNBOOK = "https://docs.example.com/alora-serve/operations/"
"""Where hpa-values.yaml says that the runbook is published."""

VALIDATE_KUBERNETES = """
import json, sys
import kubernetes_validate
for manifest in json.load(sys.stdin):
    try:
        kubernetes_validate.validate(manifest, sys.argv[1], strict=True)
    except kubernetes_validate.ValidationError as error:
        print(manifest["kind"], manifest["metadata"]["name"], error.message[:500])
"""
VALIDATE_CUSTOM = """
import {readFileSync} from "node:fs";
const given = JSON.parse(readFileSync(0, "utf8"));
for (const {group, manifest} of given) {
  const models = await import(`${group}/${manifest.apiVersion}/${manifest.kind}`);
  try { new models[manifest.kind](manifest).validate(); }
  catch (error) { console.log(manifest.kind, manifest.metadata.name, error.message); }
}
"""


@pytest.fixture
def python(tools: Callable[[str], Path]) -> Path:
    return tools("python") / "bin" / "python"


def _validate(python: Path, manifests: list[dict[str, Any]], version: str) -> str:
    command = [python, "-c", VALIDATE_KUBERNETES, version]
    plain = [m for m in manifests if m["apiVersion"] not in CUSTOM.keys() | UNCHECKED]
    given = json.dumps(list({json.dumps(manifest): manifest for manifest in plain}.values()))  # most files share most
    result = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("newest", [False, True], ids=["oldest", "newest"])
def test_kubernetes_takes_every_object(
    newest: bool, every_values: list[str], render: Any, python: Path, versions: Callable[[str], tuple[str, str]]
) -> None:
    for version in {versions(values)[newest] for values in every_values}:
        of_version = [values for values in every_values if versions(values)[newest] == version]
        manifests = [manifest for values in of_version for manifest in render(values, kubernetes=version)]
        assert _validate(python, manifests, version) == ""


def test_the_check_would_find_a_field_that_kubernetes_does_not_have(render: Any, python: Path) -> None:
    manifests = json.loads(json.dumps(render("minimal")))
    next(m for m in manifests if m["kind"] == "Deployment")["spec"]["replica"] = 1
    assert "replica" in _validate(python, manifests, "1.37")


def _custom(manifests: list[dict[str, Any]]) -> str:
    return json.dumps(
        [{"group": CUSTOM[m["apiVersion"]], "manifest": m} for m in manifests if m["apiVersion"] in CUSTOM]
    )


def test_operators_take_every_object(every_values: list[str], render: Any, node: Callable[[str, str], str]) -> None:
    manifests = [manifest for values in every_values for manifest in render(values)]
    assert node(VALIDATE_CUSTOM, _custom(manifests)) == ""


def test_the_check_would_find_a_monitor_without_endpoints(render: Any, node: Callable[[str, str], str]) -> None:
    manifests = json.loads(json.dumps([m for m in render("hpa") if m["kind"] == "ServiceMonitor"]))
    for manifest in manifests:
        del manifest["spec"]["endpoints"]
    assert "endpoints" in node(VALIDATE_CUSTOM, _custom(manifests))


def _rules(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m["spec"] for m in manifests if m["kind"] == "PrometheusRule"]


def test_rules_and_dashboards_are_those_of_the_files(render: Any) -> None:
    manifests = render("hpa")
    texts = [path.read_text() for path in (CHART / "files" / "rules").glob("*.yaml")]
    files = [
        yaml.safe_load(text.replace("runbook_url: docs/operations.md", f"runbook_url: {RUNBOOK}")) for text in texts
    ]
    assert sorted(_rules(manifests), key=str) == sorted(files, key=str)
    boards = [m for m in manifests if m["metadata"]["labels"].get("grafana_dashboard") == "1"]
    shown = {name: json.loads(text) for board in boards for name, text in board["data"].items()}
    pages = [json.loads(path.read_text()) for path in (CHART / "files" / "dashboards").glob("*.json")]
    # In the folder of Grafana's sidecar a name such as overview.json would take the place of others'.
    assert shown == {f"{page['uid']}.json": page for page in pages}
    assert all(name.startswith("alora-serve-") for name in shown)


@pytest.mark.parametrize("seconds", REQUEST_SECONDS)
def test_alerts_hold_the_service_to_the_objectives_of_the_values(seconds: float, render: Any) -> None:
    objectives = {"firstTokenSeconds": seconds, "lateShare": 0.02, "failedShare": 0.0005}
    manifests = render("hpa", "--set-json", f"monitoring.prometheusRule.objectives={json.dumps(objectives)}")
    rules = [rule for spec in _rules(manifests) for group in spec["groups"] for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
    assert recorded["alora:first_tokens_late:objective"] == "vector(0.02)"
    assert recorded["alora:requests_failed:objective"] == "vector(0.0005)"
    late = {name: text for name, text in recorded.items() if name.startswith("alora:first_tokens_late:ratio")}
    assert len(late) == 5
    for text in late.values():
        assert re.findall(r'le="([^"]+)"', text) == [floatToGoString(seconds)], "as /metrics writes it"
    budgets = [rule["expr"] for rule in rules if "Budget" in rule.get("alert", "")]
    assert len(budgets) == 4
    bounds = [bound for text in budgets for bound in re.findall(r"> (?:[\d.]+ \* )?(\S+)", text)]
    assert all(bound.startswith("scalar(alora:") for bound in bounds), "no number of their own"


def test_one_objective_may_be_what_the_other_is_as_installed(render: Any) -> None:
    objectives = {"lateShare": 0.001, "failedShare": 0.05}
    manifests = render("hpa", "--set-json", f"monitoring.prometheusRule.objectives={json.dumps(objectives)}")
    rules = [rule for spec in _rules(manifests) for group in spec["groups"] for rule in group["rules"]]
    told = {rule["record"]: rule["expr"] for rule in rules if rule.get("record", "").endswith(":objective")}
    late, failed = "alora:first_tokens_late:objective", "alora:requests_failed:objective"
    assert told == {late: "vector(0.001)", failed: "vector(0.05)"}


@pytest.mark.parametrize("base", [RUNBOOK, ""])
def test_an_alert_links_to_its_section_of_the_runbook_or_has_no_link(base: str, render: Any) -> None:
    """A path of the repository would be a link to nothing in Alertmanager."""
    manifests = render("hpa", "--set", f"monitoring.prometheusRule.runbookBase={base}")
    alerts = [
        rule for spec in _rules(manifests) for group in spec["groups"] for rule in group["rules"] if "alert" in rule
    ]
    assert len(alerts) > 20
    for alert in alerts:
        section = f"{base or 'docs/operations.md'}#{alert['alert'].lower()}"
        told = {key: value for key, value in alert["annotations"].items() if key.startswith("runbook")}
        assert told == {"runbook_url" if base else "runbook": section}


def _checkov(python: Path, manifests: Mapping[str, list[dict[str, Any]]], folder: Path) -> tuple[int, str]:
    """Its exit status for these, by name, and what it says."""
    for name, rendered in manifests.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(rendered))
    command = [python, "-m", "checkov.main", "--config-file", str(HELM / "checkov.yaml"), "--directory", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    return result.returncode, result.stdout + result.stderr


def test_checkov_finds_nothing_that_is_not_explained(
    every_values: list[str], render: Any, python: Path, tmp_path: Path
) -> None:
    status, told = _checkov(python, {values: render(values) for values in every_values}, tmp_path)
    assert status == 0, told


def test_checkov_would_find_a_container_that_may_do_more_than_it_must(
    render: Any, python: Path, tmp_path: Path
) -> None:
    manifests = json.loads(json.dumps(render("minimal")))
    router = next(m for m in manifests if m["kind"] == "Deployment" and m["metadata"]["name"].endswith("-router"))
    router["spec"]["template"]["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    status, told = _checkov(python, {"minimal": manifests}, tmp_path)
    assert status == 1
    assert {"CKV_K8S_16", "CKV_K8S_22"} <= set(re.findall(r"CKV\w+", told)), told
    assert set(re.findall(r"\S+\.(r-alora-serve-\S+)", told)) == {"r-alora-serve-router"}, told

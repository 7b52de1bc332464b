"""What values add to pods, or take from them, reaches every service of the chart; budgets, scales and Ingresses too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "deploy" / "helm" / "alora-serve" / "ci"
COMPONENTS = {"router": "router", "base-prefill": "basePrefill", "adapter-decode": "adapterDecode"}
"""Names of the three services, and of their values."""
BACKEND_PROTOCOL = "nginx.ingress.kubernetes.io/backend-protocol"


@pytest.fixture(params=COMPONENTS)
def component(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _named(manifests: list[dict[str, Any]], component: str, *kinds: str) -> dict[str, Any]:
    [found] = [m for m in manifests if m["kind"] in kinds and m["metadata"]["name"].endswith(f"-{component}")]
    return found


def _workload(manifests: list[dict[str, Any]], component: str) -> dict[str, Any]:
    return _named(manifests, component, "Deployment", "StatefulSet")


def _of_all(value: str) -> tuple[str, str]:
    """Arguments that give all three services a value."""
    return "--set", ",".join(f"{name}.{value}" for name in COMPONENTS.values())


def _given(component: str) -> dict[str, Any]:
    """What extras-values.yaml says of a component."""
    found: dict[str, Any] = yaml.safe_load((CI / "extras-values.yaml").read_text())[COMPONENTS[component]]
    return found


# --- additions --------------------------------------------------------------------------------------------------------


def test_variables_volumes_and_containers_are_added(component: str, render: Any) -> None:
    given, pod = _given(component), _workload(render("extras"), component)["spec"]["template"]["spec"]
    [container] = pod["containers"]
    for added, place in (
        ("extraEnv", container["env"]),
        ("extraVolumes", pod["volumes"]),
        ("extraVolumeMounts", container["volumeMounts"]),
        ("extraInitContainers", pod["initContainers"]),
    ):
        assert given[added], added
        assert [one for one in place if one in given[added]] == given[added], added


def test_labels_and_annotations_are_added(component: str, render: Any) -> None:
    given, metadata = _given(component), _workload(render("extras"), component)["spec"]["template"]["metadata"]
    assert metadata["labels"].items() >= given["podLabels"].items() > set()
    assert metadata["annotations"].items() >= given["podAnnotations"].items() > set()


# --- where they go, and how they are replaced -------------------------------------------------------------------------


def test_places_and_priority_are_as_given(component: str, render: Any) -> None:
    given, pod = _given(component), _workload(render("extras"), component)["spec"]["template"]["spec"]
    assert pod["priorityClassName"] == given["priorityClassName"]
    assert pod["topologySpreadConstraints"] == given["topologySpreadConstraints"]
    assert pod["affinity"] == given["affinity"], "antiAffinity is none there"


def test_replicas_avoid_each_others_nodes_at_all_costs_where_it_is_asked(component: str, render: Any) -> None:
    workload = _workload(render("minimal", *_of_all("antiAffinity=hard")), component)
    affinity = workload["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    assert affinity == {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": workload["spec"]["selector"]}
        ]
    }


def test_pods_are_replaced_as_given(component: str, render: Any) -> None:
    assert _workload(render("minimal"), component)["spec"]["strategy"]["rollingUpdate"] == {
        "maxSurge": 1,
        "maxUnavailable": 0,
    }
    changed = _workload(render("minimal", *_of_all("updateStrategy.type=Recreate")), component)
    assert changed["spec"]["strategy"] == {"type": "Recreate"}
    sets = ("--set", "basePrefill.kind=StatefulSet,adapterDecode.kind=StatefulSet")
    if component != "router":
        # A GPU more than there are would be waited for, for ever.
        assert _workload(render("gpu"), component)["spec"]["strategy"]["rollingUpdate"] == {
            "maxSurge": 0,
            "maxUnavailable": 1,
        }
        given = _workload(render("gpu", *_of_all("updateStrategy.type=Recreate")), component)
        assert given["spec"]["strategy"] == {"type": "Recreate"}
        kept = _workload(render("minimal", *sets, *_of_all("updateStrategy.type=OnDelete")), component)
        assert kept["spec"]["updateStrategy"] == {"type": "OnDelete"}


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "most"), [("openai-front", 1), ("extras", "25%")])
def test_a_drain_of_nodes_takes_so_many_pods_of_a_component_at_a_time(
    values: str, most: int | str, render: Any
) -> None:
    manifests = render(values)
    for component in (*COMPONENTS, "openai-front") if values == "openai-front" else COMPONENTS:
        budget = _named(manifests, component, "PodDisruptionBudget")["spec"]
        assert budget["maxUnavailable"] == most
        assert budget["selector"] == _workload(manifests, component)["spec"]["selector"]
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_a_budget_can_be_left_out(render: Any) -> None:
    assert not [m for m in render("minimal", *_of_all("pdb.enabled=false")) if m["kind"] == "PodDisruptionBudget"]


def test_each_service_scales_on_what_it_runs_out_of(render: Any) -> None:
    scaled = (*_of_all("autoscaling.enabled=true"), "--set", "openaiFront.autoscaling.enabled=true")
    manifests = render("openai-front", *scaled)
    metrics = {
        component: [
            (one["type"], one["pods"]["metric"]["name"], one["pods"]["target"]["type"])
            for one in _named(manifests, component, "HorizontalPodAutoscaler")["spec"]["metrics"]
        ]
        for component in (*COMPONENTS, "openai-front")
    }
    names = {component: [name for _, name, _ in found] for component, found in metrics.items()}
    assert names == {
        "router": ["alora_router_in_flight"],
        "base-prefill": ["alora_engine_queued_prefill_tokens"],
        "adapter-decode": ["alora_engine_waiting_sequences", "alora_tail_bytes"],
        "openai-front": ["alora_http_in_flight"],
    }
    assert {(kind, target) for found in metrics.values() for kind, _, target in found} == {("Pods", "AverageValue")}


# --- Ingresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "of_router", "of_front"), [("openai-front", "GRPC", "HTTP"), ("openai-front-tls", "GRPCS", "HTTPS")]
)
def test_an_ingress_says_what_the_pods_speak(values: str, of_router: str, of_front: str, render: Any) -> None:
    hosts = (
        "ingress.enabled=true,ingress.host=a.example.com,openaiFront.ingress.enabled=true,openaiFront.ingress.host=b"
    )
    manifests = render(values, "--set", hosts, "--set", "tls.clientCaSecret=")
    told = {name: _named(manifests, name, "Ingress")["metadata"]["annotations"] for name in ("router", "openai-front")}
    assert {name: annotations[BACKEND_PROTOCOL] for name, annotations in told.items()} == {
        "router": of_router,
        "openai-front": of_front,
    }

"""Pods of the chart: what they may do, how they are probed, how they end, what they mount, how they are scaled."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {
    "router": "alora_serve.v1.AloraService",
    "base-prefill": "alora_serve.v1.BasePrefillService",
    "adapter-decode": "alora_serve.v1.AdapterDecodeService",
}
MODEL_SERVICES = ("base-prefill", "adapter-decode")
WORKLOADS = ("Deployment", "StatefulSet")


def _pods(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for manifest in manifests:
        if manifest["kind"] in WORKLOADS:
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]
        elif manifest["kind"] == "Pod":
            yield manifest["metadata"]["name"], manifest["spec"]


def _workload(manifests: list[dict[str, Any]], component: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        m for m in manifests if m["kind"] in WORKLOADS and m["metadata"]["name"].endswith(component)
    )
    return found


def _pod(manifests: list[dict[str, Any]], component: str) -> dict[str, Any]:
    pod: dict[str, Any] = _workload(manifests, component)["spec"]["template"]["spec"]
    return pod


def _environment(pod: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in pod["containers"][0].get("env", [])}


# --- traces -----------------------------------------------------------------------------------------------------------


def test_all_services_send_their_traces_where_values_say(render: Any) -> None:
    manifests = render("extras")
    for component in SERVICES:
        entries = _pod(manifests, component)["containers"][0]["env"]
        told = {entry["name"]: entry for entry in entries}
        assert told["OTEL_EXPORTER_OTLP_ENDPOINT"]["value"] == "http://collector.observability:4317"
        assert told["OTEL_TRACES_SAMPLER"]["value"] == "parentbased_traceidratio"
        assert told["OTEL_TRACES_SAMPLER_ARG"]["value"] == "0.05"
        assert told["OTEL_RESOURCE_ATTRIBUTES"]["value"].split(",") == [
            "k8s.pod.name=$(POD_NAME)",
            "k8s.namespace.name=serving",
            "service.namespace=alora",
            "deployment.environment.name=staging%2C%20east",
        ]
        names = list(told)
        assert names.index("POD_NAME") < names.index("OTEL_RESOURCE_ATTRIBUTES"), "only what stands before is put in"


def test_without_an_endpoint_nothing_is_said_of_traces(render: Any) -> None:
    for component in SERVICES:
        assert not any(name.startswith("OTEL_") for name in _environment(_pod(render("minimal"), component)))


# --- what they may do -------------------------------------------------------------------------------------------------


def test_every_container_is_restricted(values: str, render: Any) -> None:
    """The restricted Pod Security standard, and a root file system that cannot be written."""
    for name, pod in _pods(render(values)):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}, name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }, (name, container["name"])
            assert container["resources"]["limits"]["memory"], (name, container["name"])
            assert container["resources"]["requests"]["cpu"], (name, container["name"])


def test_no_pod_holds_a_token_or_sees_links_to_services(values: str, render: Any) -> None:
    manifests = render(values)
    for name, pod in _pods(manifests):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
    accounts = [m for m in manifests if m["kind"] == "ServiceAccount"]
    assert all(account["automountServiceAccountToken"] is False for account in accounts)


def test_the_user_is_that_of_the_images_unless_the_cluster_may_choose(values: str, render: Any) -> None:
    ids = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), 10001)
    for name, pod in _pods(render(values)):
        found = {key: pod["securityContext"][key] for key in ids.keys() & pod["securityContext"].keys()}
        assert found == ({} if values == "openshift" else ids), name


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", SERVICES)
def test_probes_speak_to_the_plain_text_health_port(component: str, values: str, render: Any) -> None:
    pod = _pod(render(values), component)
    container, port = pod["containers"][0], int(_environment(pod)["ALORA_HEALTH_LISTEN"].rpartition(":")[2])
    assert port in [declared["containerPort"] for declared in container["ports"]]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == port


@pytest.mark.parametrize("component", SERVICES)
def test_liveness_asks_whether_the_process_answers_and_readiness_whether_it_serves(component: str, render: Any) -> None:
    container = _pod(render("minimal"), component)["containers"][0]
    assert container["livenessProbe"]["grpc"]["service"] == "liveness"
    assert container["startupProbe"]["grpc"]["service"] == "startup", "which serves once the model is loaded"
    assert container["readinessProbe"]["grpc"]["service"] == SERVICES[component]


def test_the_start_may_take_as_long_as_it_is_given(render: Any) -> None:
    manifests = render("minimal", "--set", "adapterDecode.startupSeconds=1800")
    probe = _pod(manifests, "adapter-decode")["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800
    assert _workload(manifests, "adapter-decode")["spec"]["progressDeadlineSeconds"] > 1800


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", SERVICES)
def test_the_grace_covers_letting_go_and_draining(component: str, render: Any) -> None:
    pod = _pod(render("minimal"), component)
    program, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain = float(_environment(pod)["ALORA_DRAIN_SECONDS"])
    assert program == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + drain


def test_a_pod_that_ends_sooner_than_routers_look_is_refused(render: Any) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render("minimal", "--set", "settings.resolve_seconds=10")
    assert "must be longer than the router's resolve_seconds" in refused.value.stderr


# --- memory and volumes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", MODEL_SERVICES)
def test_shared_memory_is_part_of_the_memory_limit(component: str, render: Any) -> None:
    pod = _pod(render("lmdb"), component)
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render("lmdb", "--set", "store.lmdb.size=6Gi")
    assert "must hold /dev/shm" in refused.value.stderr


def test_what_variables_and_commands_name_is_mounted(values: str, render: Any) -> None:
    roots = ("/etc/", "/srv/", "/var/cache/", "/dev/shm")
    manifests = render(values)
    for name, pod in _pods(manifests):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        claims = [
            m["spec"].get("volumeClaimTemplates", [])
            for m in manifests
            if m["metadata"]["name"] == name and m["kind"] in WORKLOADS
        ]
        volumes |= {claim["metadata"]["name"] for templates in claims for claim in templates}
        for container in pod["containers"] + pod.get("initContainers", []):
            mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
            assert {mount["name"] for mount in mounts.values()} <= volumes, (name, container["name"])
            texts = [entry.get("value", "") for entry in container.get("env", [])]
            texts += container.get("command", []) + container.get("args", [])
            paths = [
                path for text in texts for path in re.findall(r"(?<![\w:/])/[\w./-]+", text) if path.startswith(roots)
            ]
            for path in paths:
                assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), (name, path)


def test_two_volumes_of_a_pod_never_share_a_name(values: str, render: Any) -> None:
    for name, pod in _pods(render(values)):
        for key in ("volumes", "initContainers", "containers"):
            names = [item["name"] for item in pod.get(key, [])]
            assert len(names) == len(set(names)), (name, key)


def test_a_stateful_set_keeps_what_a_deployment_fetches_again(render: Any) -> None:
    kept, fetched = _workload(render("statefulset"), "adapter-decode"), _workload(render("minimal"), "adapter-decode")
    claim = kept["spec"]["volumeClaimTemplates"][0]
    assert claim["metadata"]["name"] == "cache"
    assert claim["spec"]["resources"]["requests"]["storage"] == "50Gi"
    assert "cache" not in [volume["name"] for volume in kept["spec"]["template"]["spec"]["volumes"]]
    cache = next(v for v in fetched["spec"]["template"]["spec"]["volumes"] if v["name"] == "cache")
    assert cache["emptyDir"] == {"sizeLimit": "10Gi"}


@pytest.mark.parametrize("component", MODEL_SERVICES)
def test_the_digest_of_weights_is_kept_where_they_are_kept(component: str, render: Any) -> None:
    """And can be written, though the model beside it cannot."""

    def place(*arguments: str) -> tuple[str, dict[str, Any]]:
        pod = _pod(render("statefulset", *arguments), component)
        told = _environment(pod)
        folder = told.get("ALORA_DIGEST_CACHE_DIR", told["ALORA_CACHE_DIR"])
        mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        return folder, next(mounts[path] for path in (folder, "/tmp") if path in mounts)

    folder, mount = place()
    assert mount == {"name": "cache", "mountPath": folder, "subPath": "digests"}
    deployments = "basePrefill.kind=Deployment,adapterDecode.kind=Deployment"
    assert place("--set", deployments)[1]["name"] == "tmp", "its cache is fetched anew anyway"
    written = place("--set", "store.type=lmdb,store.lmdb.medium=Cache")
    assert written == ("/var/cache/alora-serve", {"name": "cache", "mountPath": "/var/cache/alora-serve"})


def test_only_workers_read_adapters(render: Any) -> None:
    manifests = render("gpu")
    claims = {
        component: [
            v["persistentVolumeClaim"]["claimName"]
            for v in _pod(manifests, component)["volumes"]
            if "persistentVolumeClaim" in v
        ]
        for component in SERVICES
    }
    assert claims == {"router": [], "base-prefill": ["models"], "adapter-decode": ["models", "adapters"]}
    assert (
        _environment(_pod(manifests, "adapter-decode"))["ALORA_ADAPTER_ROOTS"] == "/srv/alora-serve/adapters/intrinsics"
    )


def test_the_demo_model_brings_its_adapters(render: Any) -> None:
    environment = _environment(_pod(render("demo"), "adapter-decode"))
    assert environment["ALORA_MODEL"] == "/var/cache/alora-serve/demo/model"
    assert environment["ALORA_ADAPTER_ROOTS"] == "/var/cache/alora-serve/demo/adapters"


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_air_gapped_release_has_one_registry_and_downloads_nothing(render: Any) -> None:
    for name, pod in _pods(render("air-gapped")):
        containers = pod["containers"] + pod.get("initContainers", [])
        assert all(c["image"].startswith("registry.internal:5000/mirror/") for c in containers), name
        assert pod["imagePullSecrets"] == [{"name": "registry"}], name
        assert "initContainers" not in pod, name


@pytest.mark.parametrize(
    ("reference", "mirrored"),
    [
        ("registry.example.com/models/granite:1", "registry.internal:5000/mirror/models/granite:1"),
        ("localhost:5000/granite:1", "registry.internal:5000/mirror/granite:1"),
        ("models/granite:1", "registry.internal:5000/mirror/models/granite:1"),
        ("granite@sha256:0123", "registry.internal:5000/mirror/granite@sha256:0123"),
    ],
)
def test_the_image_of_a_volume_comes_from_the_one_registry_too(reference: str, mirrored: str, render: Any) -> None:
    def references(*arguments: str) -> set[str]:
        source = f"model.image.reference={reference},adapters[0].image.reference={reference}"
        pods = _pods(render("oci-image-volume", "--set", source, *arguments))
        return {
            volume["image"]["reference"] for _, pod in pods for volume in pod.get("volumes", []) if "image" in volume
        }

    assert references("--set", "global.imageRegistry=registry.internal:5000/mirror/") == {mirrored}
    assert references() == {reference}


@pytest.mark.parametrize("component", MODEL_SERVICES)
def test_only_an_init_container_that_was_asked_for_downloads(component: str, values: str, render: Any) -> None:
    pod = _pod(render(values), component)
    assert _environment(pod)["HF_HUB_OFFLINE"] == "1"
    online = [
        c["name"] for c in pod.get("initContainers", []) if {"name": "HF_HUB_OFFLINE", "value": "0"} in c.get("env", [])
    ]
    assert bool(online) == (values == "statefulset")


def test_an_image_may_be_pinned_by_digest(render: Any) -> None:
    digest = f"sha256:{'0' * 64}"
    pod = _pod(render("minimal", "--set", f"router.image.digest={digest}"), "router")
    assert pod["containers"][0]["image"] == f"docker.io/alora-serve/adapter-router@{digest}"


# --- where and how many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", MODEL_SERVICES)
def test_gpus_come_with_the_device_and_go_to_containers_that_compute(component: str, render: Any) -> None:
    pod = _pod(render("gpu"), component)
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert _environment(pod)["ALORA_DEVICE"] == "cuda"
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"]
    assert pod["tolerations"]
    assert "nvidia.com/gpu" not in str(_pod(render("gpu"), "router")["containers"])


@pytest.mark.parametrize("component", SERVICES)
def test_replicas_are_spread_over_nodes_and_zones(component: str, render: Any) -> None:
    workload = _workload(render("minimal"), component)
    labels = workload["spec"]["selector"]["matchLabels"]
    pod = workload["spec"]["template"]["spec"]
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    (preferred,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["podAffinityTerm"]["labelSelector"]["matchLabels"] == labels


@pytest.mark.parametrize("values", ["hpa", "keda"])
def test_an_autoscaler_alone_decides_how_many(values: str, render: Any) -> None:
    manifests = render(values)
    scalers = [m for m in manifests if m["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert len(scalers) == len(SERVICES)
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        (scaled,) = [m for m in manifests if m["kind"] == target["kind"] and m["metadata"]["name"] == target["name"]]
        assert "replicas" not in scaled["spec"]


@pytest.mark.parametrize("values", ["hpa", "keda"])
def test_what_is_scaled_on_is_a_gauge_that_the_service_has(values: str, render: Any) -> None:
    gauges = set(re.findall(r"^\| `(alora_\w+)` \| gauge", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    for manifest in render(values):
        if manifest["kind"] == "HorizontalPodAutoscaler":
            used = {metric["pods"]["metric"]["name"] for metric in manifest["spec"]["metrics"]}
        elif manifest["kind"] == "ScaledObject":
            queries = [trigger["metadata"]["query"] for trigger in manifest["spec"]["triggers"]]
            assert all(f'job="{manifest["metadata"]["name"]}"' in query for query in queries)
            used = {query.removeprefix("sum(").partition("{")[0] for query in queries}
        else:
            continue
        assert used <= gauges
        assert all(name.startswith("alora_router_") == manifest["metadata"]["name"].endswith("router") for name in used)


def test_keda_does_not_take_missing_series_for_no_load(render: Any) -> None:
    """As it would without being told, and end all pods but the fewest while scraping is broken."""
    scalers = [m for m in render("keda") if m["kind"] == "ScaledObject"]
    triggers = [trigger for scaler in scalers for trigger in scaler["spec"]["triggers"]]
    assert {trigger["metadata"]["ignoreNullValues"] for trigger in triggers} == {"false"}


def test_keda_shows_prometheus_what_it_is_told_to(render: Any) -> None:
    """Of a TriggerAuthentication it shows nothing by itself."""
    scalers = [m for m in render("keda") if m["kind"] == "ScaledObject"]
    triggers = [trigger for scaler in scalers for trigger in scaler["spec"]["triggers"]]
    assert {trigger["authenticationRef"]["name"] for trigger in triggers} == {"prometheus"}
    assert {trigger["metadata"]["authModes"] for trigger in triggers} == {"tls,bearer"}


def test_the_rule_given_for_prometheus_adapter_serves_all_that_is_scaled_on(render: Any) -> None:
    readme = (ROOT / "deploy" / "helm" / "alora-serve" / "README.md").read_text()
    (series,) = re.findall(r'seriesQuery: \'\{__name__=~"([^"]+)"', readme)
    scalers = [m for m in render("hpa") if m["kind"] == "HorizontalPodAutoscaler"]
    used = {metric["pods"]["metric"]["name"] for scaler in scalers for metric in scaler["spec"]["metrics"]}
    assert {name for name in used if not re.fullmatch(series, name)} == set()
    assert "alora_engine_queued_prefill_tokens" in used


def test_a_new_version_of_the_chart_alone_replaces_no_pod(render: Any) -> None:
    for manifest in render("minimal"):
        if manifest["kind"] in WORKLOADS:
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert not labels.keys() & {"helm.sh/chart", "app.kubernetes.io/version"}

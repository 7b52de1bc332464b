"""Who finds and reaches whom in the chart: Services, network policies, certificates, routes from outside."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

WORKLOADS = ("Deployment", "StatefulSet")
CLIENT = {"app": "some-client"}
"""Labels of a pod that is not of the release."""


def _of_kind(manifests: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def _named(manifests: list[dict[str, Any]], kind: str, ending: str) -> dict[str, Any]:
    (found,) = [m for m in _of_kind(manifests, kind) if m["metadata"]["name"].endswith(ending)]
    return found


def _templates(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m["spec"]["template"] for m in _of_kind(manifests, *WORKLOADS)}


def _selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


# --- Services ---------------------------------------------------------------------------------------------------------


def test_every_selector_finds_the_pods_of_one_workload(values: str, render: Any) -> None:
    manifests = render(values)
    labels = {name: template["metadata"]["labels"] for name, template in _templates(manifests).items()}
    for manifest in _of_kind(manifests, "Service", "PodDisruptionBudget", "NetworkPolicy", *WORKLOADS):
        spec = manifest["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        selector = selector.get("matchLabels", selector)
        found = [name for name in labels if _selects(selector, labels[name])]
        assert len(found) == 1, manifest["metadata"]["name"]
        assert manifest["metadata"]["name"].startswith(found[0])


def test_every_port_of_a_service_is_one_its_pods_listen_on(values: str, render: Any) -> None:
    manifests = render(values)
    for service in _of_kind(manifests, "Service"):
        (pod,) = [
            template["spec"] for template in _templates(manifests).values()
            if _selects(service["spec"]["selector"], template["metadata"]["labels"])
        ]  # fmt: skip
        listening = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in listening
            if service["spec"].get("clusterIP") == "None":  # nothing translates ports there
                assert port["port"] == listening[port["targetPort"]]


def test_ports_are_those_the_processes_are_told(values: str, render: Any) -> None:
    for name, template in _templates(render(values)).items():
        container = template["spec"]["containers"][0]
        told = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for variable, port in (
            ("ALORA_LISTEN", "http" if name.endswith("openai-front") else "grpc"),
            ("ALORA_HEALTH_LISTEN", "health"),
            ("ALORA_METRICS_LISTEN", "metrics"),
        ):
            if not name.endswith("store"):
                assert told[variable].rpartition(":")[2] == str(ports[port])


def test_the_router_looks_where_every_pod_has_an_address(values: str, render: Any) -> None:
    manifests = render(values)
    container = _named(manifests, "Deployment", "-router")["spec"]["template"]["spec"]["containers"][0]
    told = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    for variable, component in (
        ("ALORA_BASE_PREFILL_ENDPOINTS", "base-prefill"),
        ("ALORA_DECODE_ENDPOINTS", "adapter-decode"),
    ):
        service = _named(manifests, "Service", f"-{component}")
        assert service["spec"]["clusterIP"] == "None"
        assert told[variable] == f"dns:///{service['metadata']['name']}:50051"


def test_plain_text_is_announced_as_http_2(render: Any) -> None:
    for values, protocol in (("minimal", "kubernetes.io/h2c"), ("tls-cert-manager", "https")):
        ports = [p for s in _of_kind(render(values), "Service") for p in s["spec"]["ports"] if p["name"] == "grpc"]
        assert {port["appProtocol"] for port in ports} == {protocol}


def test_prometheus_sees_each_pod_once_under_the_name_the_rules_know(render: Any) -> None:
    manifests = render("hpa")
    for monitor in _of_kind(manifests, "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        found = [
            service for service in _of_kind(manifests, "Service")
            if _selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
            and endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
        ]  # fmt: skip
        assert len(found) == 1
        (job,) = [rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"]
        assert job.endswith(("router", "prefill", "decode"))
        assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_prometheus_leaves_to_endpoint_pickers_what_is_new_series_all_the_time(render: Any) -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (worker,) = [job for job in compose["scrape_configs"] if job["job_name"] == "worker"]
    rules = [(rule["action"], rule["source_labels"], rule["regex"]) for rule in worker["metric_relabel_configs"]]
    for monitor in _of_kind(render("hpa"), "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        rules += [(rule["action"], rule["sourceLabels"], rule["regex"]) for rule in endpoint["metricRelabelings"]]
    assert rules == [("drop", ["__name__"], "vllm:.*")] * 4


# --- network policies -------------------------------------------------------------------------------------------------


def _reaches(
    manifests: list[dict[str, Any]], client: dict[str, str], server: str, port: int, *, own: bool = True
) -> bool:
    """Whether policies let a pod with these labels reach a component; ``own``: it is in the release's namespace."""
    labels = next(t["metadata"]["labels"] for n, t in _templates(manifests).items() if n.endswith(f"-{server}"))

    def admits(rules: list[dict[str, Any]], key: str, other: dict[str, str]) -> bool:
        return any(
            port in [allowed["port"] for allowed in rule["ports"]]
            and (key not in rule or any(matches(peer, other) for peer in rule[key]))
            for rule in rules
        )

    def matches(peer: dict[str, Any], other: dict[str, str]) -> bool:
        return "namespaceSelector" not in peer and own and _selects(peer["podSelector"]["matchLabels"], other)

    for policy in _of_kind(manifests, "NetworkPolicy"):
        spec, selector = policy["spec"], policy["spec"]["podSelector"]["matchLabels"]
        if _selects(selector, labels) and not admits(spec["ingress"], "from", client):
            return False
        if _selects(selector, client) and not admits(spec["egress"], "to", labels):
            return False
    return True


def _components(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, str]]]:
    for name, template in _templates(manifests).items():
        yield name.removeprefix("r-alora-serve-"), template["metadata"]["labels"]


def test_each_component_has_a_policy_for_both_directions(values: str, render: Any) -> None:
    manifests = render(values)
    policies = {p["metadata"]["name"]: p["spec"]["policyTypes"] for p in _of_kind(manifests, "NetworkPolicy")}
    assert policies == {name: ["Ingress", "Egress"] for name in _templates(manifests)}


def test_only_the_router_is_reachable_and_only_services_reach_the_store(render: Any) -> None:
    manifests = render("minimal")
    may = {
        (client, server)
        for client, labels in [*_components(manifests), ("client", CLIENT)]
        for server, port in (("router", 50051), ("base-prefill", 50051), ("adapter-decode", 50051), ("store", 6379))
        if client != server and _reaches(manifests, labels, server, port)
    }
    assert may == {
        ("client", "router"),
        ("router", "base-prefill"),
        ("router", "adapter-decode"),
        ("base-prefill", "store"),
        ("adapter-decode", "store"),
    }


def test_each_end_alone_keeps_others_out(render: Any) -> None:
    """What a server lets in does not lean on what clients may do."""
    admitted = {
        "router": None,
        "base-prefill": {"router"},
        "adapter-decode": {"router"},
        "store": {"base-prefill", "adapter-decode"},
    }
    for policy in _of_kind(render("minimal"), "NetworkPolicy"):
        component = policy["metadata"]["labels"]["app.kubernetes.io/component"]
        peers = policy["spec"]["ingress"][0].get("from")
        found = peers and {peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in peers}
        assert found == admitted[component]


def test_clients_may_be_named_and_the_releases_own_test_is_one(render: Any) -> None:
    manifests = render("network-policies")
    test = _named(manifests, "Pod", "-test")["metadata"]["labels"]
    assert _reaches(manifests, {"alora-serve-client": "true"}, "router", 50051)
    assert _reaches(manifests, test, "router", 50051)
    assert not _reaches(manifests, CLIENT, "router", 50051)
    assert not _reaches(manifests, {"alora-serve-client": "true"}, "base-prefill", 50051)


def test_http_clients_reach_the_front_door_alone_and_this_one_the_router(render: Any) -> None:
    manifests = render("openai-front")
    client = {"app": "client"}
    front = dict(_components(manifests))["openai-front"]
    assert _reaches(manifests, front, "router", 50051)
    assert not _reaches(manifests, front, "base-prefill", 50051)
    assert not _reaches(manifests, front, "store", 6379)
    assert not _reaches(manifests, client, "openai-front", 8000)


def test_names_traces_and_metrics_get_through(values: str, render: Any) -> None:
    manifests = render(values)
    for policy in _of_kind(manifests, "NetworkPolicy"):
        if policy["metadata"]["name"].endswith("-store"):
            continue
        out = {(port["port"], port["protocol"]) for rule in policy["spec"]["egress"] for port in rule["ports"]}
        assert {(port, protocol) for port in (53, 5353) for protocol in ("UDP", "TCP")} <= out
        assert ((4317, "TCP") in out) == (values != "air-gapped")
        assert 9090 in [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]


def _ports_out(manifests: list[dict[str, Any]], component: str) -> list[int]:
    """Where its policy lets it out to, but for name servers."""
    rules = _named(manifests, "NetworkPolicy", f"-{component}")["spec"]["egress"]
    return [port["port"] for rule in rules[1:] for port in rule["ports"]]


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector.observability:14317", 14317),
        ("https://otlp.example.com", 443),
        ("https://[2001:db8::1]:9443/v1", 9443),
        ("https://[2001:db8::1]", 443),
    ],
)
def test_traces_get_out_to_the_port_of_their_collector(endpoint: str, port: int, render: Any) -> None:
    manifests = render("minimal", "--set", f"tracing.endpoint={endpoint}")
    for component in ("router", "base-prefill", "adapter-decode"):
        assert _ports_out(manifests, component)[:2] == [4317, port]
    named = render("minimal", "--set", f"tracing.endpoint={endpoint},networkPolicy.otlp.ports={{{port}}}")
    assert _ports_out(named, "router") == [port, 50051], "none twice"


@pytest.mark.parametrize(
    ("url", "ports"),
    [
        ("redis://:p%40ss@cache.example.com:7000/0", [6379, 26379, 7000]),
        ("rediss://cache.example.com/0", [6379, 26379]),
        ("redis+cluster://a:7000\\,b:7001", [6379, 26379, 7000, 7001]),
        ("redis+sentinel://:$(STORE_PASSWORD)@a:5000\\,b/mymaster/0?sentinel_password=x", [6379, 26379, 5000]),
    ],
)
def test_the_ports_of_an_external_store_are_those_of_its_url_too(url: str, ports: list[int], render: Any) -> None:
    manifests = render("minimal", "--set", f"store.type=external,store.external.url={url}")
    assert _ports_out(manifests, "base-prefill")[1:] == _ports_out(manifests, "adapter-decode")[1:] == ports
    assert _ports_out(manifests, "router") == [4317, 50051]


def test_a_download_gets_out_to_the_port_of_its_endpoint(render: Any) -> None:
    manifests = render("statefulset")
    assert _ports_out(manifests, "base-prefill") == [4317, 6379, 443]
    assert _ports_out(manifests, "adapter-decode") == [4317, 6379, 443, 9000]
    mirror = render("statefulset", "--set", "model.hub.endpoint=http://mirror.internal")
    assert _ports_out(mirror, "base-prefill") == [4317, 6379, 80]


def test_only_pods_that_download_may_leave_the_cluster(values: str, render: Any) -> None:
    for policy in _of_kind(render(values), "NetworkPolicy"):
        out = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
        downloads = values == "statefulset" and policy["metadata"]["name"].endswith(("prefill", "decode"))
        assert (443 in out) == downloads


# --- certificates -----------------------------------------------------------------------------------------------------


def test_certificates_name_what_they_are_verified_by(render: Any) -> None:
    manifests = render("tls-cert-manager")
    container = _named(manifests, "Deployment", "-router")["spec"]["template"]["spec"]["containers"][0]
    peer = next(e["value"] for e in container["env"] if e["name"] == "ALORA_PEER_TLS_SERVER_NAME")
    for component in ("base-prefill", "adapter-decode"):
        certificate = _named(manifests, "Certificate", f"-{component}")["spec"]
        assert peer in certificate["dnsNames"]
        assert certificate["usages"] == ["server auth", "client auth"]  # to the router, and to the store
    assert _named(manifests, "Certificate", "-router-peer")["spec"]["usages"] == ["client auth"]
    assert "r-alora-serve-store" in _named(manifests, "Certificate", "-store")["spec"]["dnsNames"]


def _server_names(manifests: list[dict[str, Any]]) -> set[str]:
    """What the front door, helm test and the gateway find in the router's certificate."""
    pods = [_named(manifests, "Deployment", "-openai-front")["spec"]["template"], _named(manifests, "Pod", "-test")]
    told = {e["name"]: e.get("value", "") for pod in pods for e in pod["spec"]["containers"][0]["env"]}
    addresses = [told["ALORA_ROUTER_ADDRESS"], told["ALORA_ADDRESS"]]
    chosen = [told.get(name) for name in ("ALORA_ROUTER_TLS_SERVER_NAME", "ALORA_CLIENT_TLS_SERVER_NAME")]
    names = {name or address.rpartition(":")[0] for name, address in zip(chosen, addresses, strict=True)}
    return names | {_named(manifests, "BackendTLSPolicy", "-router")["spec"]["validation"]["hostname"]}


@pytest.mark.parametrize(
    ("given", "issuer", "names"),
    [
        ("", "internal", None),
        ("routerServerName=alora.internal", "internal", {"alora.internal"}),
        ("certManager.routerIssuerRef.name=public", "public", {"alora.example.com"}),
        ("certManager.routerIssuerRef.name=public,tls.routerServerName=alora.org", "public", {"alora.org"}),
    ],
)
def test_the_routers_certificate_is_verified_by_a_name_in_it_and_a_public_issuer_sees_no_names_of_the_cluster(
    given: str, issuer: str, names: set[str] | None, render: Any
) -> None:
    public = "tls.certManager.routerDnsNames={alora.example.com},openaiFront.enabled=true"
    manifests = render("gateway-tls", "--set", f"{public},tls.{given}" if given else public)
    certificate = _named(manifests, "Certificate", "-router")["spec"]
    assert certificate["issuerRef"]["name"] == issuer
    expected = _server_names(manifests)
    assert expected <= set(certificate["dnsNames"])
    assert expected == (names or {"r-alora-serve-router", "r-alora-serve-router.serving.svc"})
    assert any(".svc" in name for name in certificate["dnsNames"]) == (issuer == "internal")


def test_another_issuer_of_the_routers_certificate_needs_names_to_put_in_it(render: Any) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render("tls-cert-manager", "--set", "tests.enabled=false,tls.certManager.routerDnsNames=null")
    assert "needs tls.certManager.routerDnsNames" in refused.value.stderr


def test_every_mounted_certificate_is_one_that_is_issued(render: Any) -> None:
    manifests = render("tls-cert-manager")
    issued = {certificate["spec"]["secretName"] for certificate in _of_kind(manifests, "Certificate")}
    given = {"clients-ca", "alora-serve-access", "alora-serve-test-client"}
    for template in _templates(manifests).values():
        mounted = {volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume}
        assert mounted <= issued | given


@pytest.mark.parametrize("component", ["base-prefill", "adapter-decode"])
def test_mutual_tls_asks_for_certificates_on_every_hop(component: str, render: Any) -> None:
    def told(values: str, of: str) -> dict[str, Any]:
        container = _named(render(values), "Deployment", of)["spec"]["template"]["spec"]["containers"][0]
        return {entry["name"]: entry.get("value") for entry in container.get("env", [])}

    model, router = told("tls-cert-manager", f"-{component}"), told("tls-cert-manager", "-router")
    assert {"ALORA_TLS_CLIENT_CA_FILE", "ALORA_STORE_TLS_CERT_FILE", "ALORA_STORE_TLS_KEY_FILE"} <= model.keys()
    assert {"ALORA_PEER_TLS_CERT_FILE", "ALORA_PEER_TLS_KEY_FILE", "ALORA_TLS_CLIENT_CA_FILE"} <= router.keys()
    assert model["ALORA_STORE_URL"].startswith("rediss://")
    assert "ALORA_ALLOW_INSECURE" not in model.keys() | router.keys()
    one_way = told("tls-existing-secrets", f"-{component}")
    assert "ALORA_TLS_CERT_FILE" in one_way
    assert not one_way.keys() & {"ALORA_TLS_CLIENT_CA_FILE", "ALORA_STORE_TLS_CERT_FILE"}


@pytest.mark.parametrize("checked", ["true", "false"])
def test_an_external_stores_certificate_need_not_name_its_host_where_values_say_so(checked: str, render: Any) -> None:
    """Whoever signed it: with the system's certificates nothing else of TLS is told."""
    store = f"store.type=external,store.external.url=rediss://redis:6379/0,store.tls.checkHostname={checked}"
    pod = _named(render("minimal", "--set", store), "Deployment", "-adapter-decode")["spec"]["template"]["spec"]
    told = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert (told.get("ALORA_STORE_TLS_CHECK_HOSTNAME") == "false") == (checked == "false")


# --- from outside -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["gateway", "gateway-tls", "ingress"])
def test_what_comes_from_outside_goes_to_the_router(values: str, render: Any) -> None:
    manifests = render(values)
    router = _named(manifests, "Service", "-router")
    for route in _of_kind(manifests, "GRPCRoute", "HTTPRoute"):
        assert route["spec"]["rules"][0]["backendRefs"] == [{"name": router["metadata"]["name"], "port": 50051}]
    for ingress in _of_kind(manifests, "Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert backend == {"name": router["metadata"]["name"], "port": {"name": "grpc"}}


def test_no_gateway_ends_a_stream(render: Any) -> None:
    policy = _named(render("gateway"), "BackendTrafficPolicy", "-router")["spec"]
    assert policy["timeout"]["http"]["requestTimeout"] == "0s"
    assert policy["targetRefs"][0]["kind"] == "GRPCRoute"
    route = _named(render("gateway-tls"), "HTTPRoute", "-router")["spec"]
    assert route["rules"][0]["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert (
        int(
            _named(render("ingress"), "Ingress", "-router")["metadata"]["annotations"][
                "nginx.ingress.kubernetes.io/proxy-read-timeout"
            ]
        )
        >= 3600
    )


def test_a_gateway_verifies_a_router_with_a_certificate(render: Any) -> None:
    policy = _named(render("gateway-tls"), "BackendTLSPolicy", "-router")["spec"]
    assert (
        policy["validation"]["hostname"] in _named(render("gateway-tls"), "Certificate", "-router")["spec"]["dnsNames"]
    )
    assert _of_kind(render("gateway"), "BackendTLSPolicy") == []

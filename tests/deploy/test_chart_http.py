"""The HTTP front door of the chart: off unless asked for, without the services' secrets, reached from outside."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

NAME = "r-alora-serve-openai-front"


def _named(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == NAME]
    return found


def _container(render: Any, values: str) -> dict[str, Any]:
    (container,) = _named(render(values), "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_it_is_off_and_holds_no_secret_of_the_services(render: Any) -> None:
    assert not [m for m in render("minimal") if m["metadata"]["name"] == NAME]
    for values in ("openai-front", "openai-front-tls"):
        told = {entry["name"] for entry in _container(render, values)["env"]}
        assert not told & {"ALORA_HANDLE_SECRETS", "ALORA_TENANT_SALT", "ALORA_STORE_URL"}
        assert "ALORA_ROUTER_ADDRESS" in told
        assert ("ALORA_ROUTER_TLS_CA_FILE" in told) == (values == "openai-front-tls")
        assert ("ALORA_ALLOW_INSECURE" in told) == (values == "openai-front")


def test_it_calls_every_router_and_verifies_each_by_the_name_of_their_service(render: Any) -> None:
    for values in ("openai-front", "openai-front-tls"):
        told = {entry["name"]: entry.get("value") for entry in _container(render, values)["env"]}
        assert told["ALORA_ROUTER_ADDRESS"] == "dns:///r-alora-serve-router-headless:50051"
        expected = "r-alora-serve-router" if values == "openai-front-tls" else None
        assert told.get("ALORA_ROUTER_TLS_SERVER_NAME") == expected
    services = {m["metadata"]["name"]: m["spec"] for m in render("openai-front") if m["kind"] == "Service"}
    assert services["r-alora-serve-router-headless"]["clusterIP"] == "None"
    assert services["r-alora-serve-router-headless"]["ports"][0]["port"] == 50051


def test_a_router_that_asks_for_certificates_must_get_one(render: Any) -> None:
    """Else the front door would be ready, and fail every request."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render("openai-front-tls", "--set", "openaiFront.routerClientSecret=")
    assert "tls.clientCaSecret needs openaiFront.routerClientSecret" in refused.value.stderr
    assert render("openai-front-tls", "--set", "openaiFront.routerClientSecret=,tls.clientCaSecret=")


def test_readiness_asks_for_what_the_process_tells(render: Any) -> None:
    assert _container(render, "openai-front")["readinessProbe"]["grpc"] == {"port": 50052, "service": "openai_front"}


def test_an_ingress_leads_to_it_and_ends_no_stream(render: Any) -> None:
    ingress = _named(render("openai-front"), "Ingress")
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": NAME, "port": {"name": "http"}}
    told = ingress["metadata"]["annotations"]
    assert told["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert int(told["nginx.ingress.kubernetes.io/proxy-read-timeout"]) >= 3600


def test_a_route_leads_to_it_verifies_it_and_ends_no_stream(render: Any) -> None:
    manifests = render("openai-front-tls")
    rule = _named(manifests, "HTTPRoute")["spec"]["rules"][0]
    assert rule["backendRefs"] == [{"name": NAME, "port": 8000}]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    names = _named(manifests, "Certificate")["spec"]["dnsNames"]
    assert "openai.example.com" in names
    assert _named(manifests, "BackendTLSPolicy")["spec"]["validation"]["hostname"] in names


def test_clients_may_be_named(render: Any) -> None:
    rule = _named(render("openai-front"), "NetworkPolicy")["spec"]["ingress"][0]
    assert rule["ports"] == [{"port": 8000, "protocol": "TCP"}]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]

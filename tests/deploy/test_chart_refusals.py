"""Values that Kubernetes would take, and that would fail once the pods run, are refused with what to do."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

EXTERNAL = "store.type=external"
ROUTE = "gateway.enabled=true,gateway.parentRefs[0].name=public"
INGRESS = "ingress.enabled=true,ingress.host=a.example.com"
SHOWN = r"ingress.annotations.nginx\.ingress\.kubernetes\.io/proxy-ssl-secret=serving/nginx"
GATEWAY = "gateway.networking.k8s.io/v1"


@pytest.fixture
def refused(render: Any) -> Any:
    """What is said of values that do not render."""

    def why(values: str, *arguments: str) -> str:
        with pytest.raises(subprocess.CalledProcessError) as error:
            render(values, *arguments)
        return str(error.value.stderr)

    return why


def _adapters(*names: str) -> tuple[str, str]:
    roots = [{"name": name, "source": "pvc", "pvc": {"claimName": "adapters"}} for name in names]
    return "--set-json", f"adapters={json.dumps(roots)}"


def _set_json(path: str, value: object) -> tuple[str, str]:
    return "--set-json", f"{path}={json.dumps(value)}"


# --- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["caSecret", "clientSecret"])
@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "redis+sentinel"])
def test_certificates_for_a_store_in_plain_text(scheme: str, secret: str, render: Any, refused: Any) -> None:
    given = (EXTERNAL, f"store.tls.{secret}=certificates")
    plain = ",".join((*given, f"store.external.url={scheme}://host/primary"))
    assert "begins with rediss" in refused("minimal", "--set", plain)
    assert render("minimal", "--set", plain.replace("redis", "rediss"))


@pytest.mark.parametrize("secret", ["caSecret", "clientSecret"])
def test_certificates_for_a_store_of_files(secret: str, render: Any, refused: Any) -> None:
    assert "store.tls is for store.type external" in refused("lmdb", "--set", f"store.tls.{secret}=certificates")
    assert render("lmdb")


def test_a_password_without_a_place(render: Any, refused: Any) -> None:
    told = f"{EXTERNAL},store.password=true,store.external.url="
    assert "redis://:$(STORE_PASSWORD)@host" in refused("minimal", "--set", f"{told}redis://host:6379/0")
    assert render("minimal", "--set", f"{told}redis://:$(STORE_PASSWORD)@host:6379/0")


def test_a_password_beside_a_secret_with_the_whole_url(refused: Any) -> None:
    assert "leave store.password false" in refused("redis-cluster", "--set", "store.password=true")


def test_a_store_that_outgrows_the_volume_it_lies_in(render: Any, refused: Any) -> None:
    def given(size: str, medium: str = "Cache") -> tuple[str, str]:
        return "--set", f"store.type=lmdb,store.lmdb.medium={medium},store.lmdb.size={size},cache.size=2Gi"

    assert "at most seven tenths of cache.size, 2Gi" in refused("lmdb", *given("1434Mi"))
    assert render("lmdb", *given("1433Mi"))
    assert render("lmdb", *given("3Gi", "Memory"))


# --- clients that show certificates -----------------------------------------------------------------------------------


def test_ways_to_a_router_that_asks_for_certificates_without_one(render: Any, refused: Any) -> None:
    asks = ("tls-cert-manager", "--set", "tls.clientCaSecret=clients-ca")
    assert "needs tests.clientSecret" in refused(*asks, "--set", "tests.clientSecret=")
    assert render(*asks, "--set", "tests.clientSecret=,tests.enabled=false")
    assert "gateway.enabled exclude each other" in refused(*asks, "--set", ROUTE)
    assert "proxy-ssl-secret" in refused(*asks, "--set", INGRESS)
    assert render(*asks, "--set", INGRESS, "--set", SHOWN)
    open_to_all = ("tls-cert-manager", "--set", "tls.clientCaSecret=,tests.clientSecret=")
    assert render(*open_to_all, "--set", f"{ROUTE},{INGRESS}")


@pytest.mark.parametrize("values", ["gateway-tls", "openai-front-tls"])
def test_a_gateway_api_that_cannot_say_how_a_backend_is_verified(values: str, render: Any, refused: Any) -> None:
    """A cluster's own answer counts; ``helm template`` has none."""
    assert "Gateway API 1.4" in refused(values, "--api-versions", GATEWAY)
    both = ("--api-versions", GATEWAY, "--api-versions", f"{GATEWAY}/BackendTLSPolicy")
    assert render(values, *both) == render(values)
    assert render("gateway", "--api-versions", GATEWAY), "without TLS none is needed"


# --- names and numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["a-b", "A.B", "a.b"])
def test_adapters_whose_volumes_have_one_name(other: str, render: Any, refused: Any) -> None:
    assert f"adapters a.b and {other} would both be the volume adapters-a-b" in refused(
        "minimal", *_adapters("a.b", other)
    )
    assert render("minimal", *_adapters("a.b", "a-c"))


@pytest.mark.parametrize("service", ["router", "basePrefill", "adapterDecode", "openaiFront"])
def test_more_replicas_at_least_than_at_most(service: str, render: Any, refused: Any) -> None:
    given = f"{service}.autoscaling.enabled=true,{service}.autoscaling.minReplicas=9"
    assert f"{service}.autoscaling: minReplicas, 9, is more than maxReplicas" in refused(
        "hpa", "--set", f"{given},{service}.autoscaling.maxReplicas=8"
    )
    assert render("hpa", "--set", f"{given},{service}.autoscaling.maxReplicas=9")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("router.podLabels", {"app.kubernetes.io/name": "mine"}),
        ("basePrefill.podLabels", {"app.kubernetes.io/instance": "mine"}),
        ("openaiFront.podLabels", {"app.kubernetes.io/component": "mine"}),
        ("ingress.annotations", {"nginx.ingress.kubernetes.io/backend-protocol": "GRPCS"}),
        ("openaiFront.ingress.annotations", {"nginx.ingress.kubernetes.io/backend-protocol": "HTTP"}),
        ("router.resources", None),
        ("adapterDecode.resources", None),
        ("openaiFront.resources", None),
        ("store.valkey.resources", None),
    ],
)
def test_what_the_chart_writes_itself_or_cannot_do_without(path: str, value: object, refused: Any) -> None:
    assert "specifications of the schema" in refused("minimal", *_set_json(path, value))

"""The Helm chart renders, with both Helms, nothing but what was asked for, and refuses what it does not know."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml

from alora_serve.config import GROUPS, env_name, known_names
from alora_serve.config.loading import OTHER_VARIABLES, load_settings
from alora_serve.kv.redis_url import REDIS_SCHEMES, parse_redis_url

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "alora-serve"
TEMPLATES = sorted(path for path in (CHART / "templates").rglob("*") if path.is_file())
NEWEST = "1.37"
REGISTRY = ("--set", "global.imageRegistry=registry")
PASSED_ON = {"kubernetes", "stringMap"}
"""Definitions of the schema for what Kubernetes itself checks, or whose keys are free."""


# --- every version of Helm and Kubernetes -----------------------------------------------------------------------------


def test_lint_finds_nothing(helm: str, values: str, chart_helm: Callable[..., str]) -> None:
    file = CHART / "ci" / f"{values}-values.yaml"
    assert "0 chart(s) failed" in chart_helm(helm, "lint", "--strict", str(CHART), "--values", str(file))


def test_both_majors_of_helm_render_the_same(values: str, render: Any) -> None:
    assert render(values, helm="helm3") == render(values, helm="helm4")


def test_no_image_volumes_where_kubernetes_has_none(render: Any) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render("oci-image-volume", kubernetes="1.30")
    assert "needs Kubernetes 1.31" in refused.value.stderr


def test_no_part_of_an_image_volume_where_kubernetes_mounts_all_of_it(render: Any) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render("oci-image-volume", kubernetes="1.32")
    assert "image.subPath of intrinsics needs Kubernetes 1.33" in refused.value.stderr
    assert render("oci-image-volume", "--set", "adapters[0].image.subPath=", kubernetes="1.32")


@pytest.fixture
def notes(helm: str, chart_helm: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """What an installation says, by either Helm: rendered into an object, as Helm 3 shows it to a cluster alone."""
    chart = shutil.copytree(CHART, tmp_path / "alora-serve")
    notes = '{{ include (print .Template.BasePath "/NOTES.txt") . | toJson }}'
    (chart / "templates" / "notes.yaml").write_text(f"{{apiVersion: v1, kind: Notes, notes: {notes}}}")

    def said(*arguments: str) -> str:
        given = ("--namespace", "serving", "--values", str(chart / "ci" / "minimal-values.yaml"), *arguments)
        rendered = chart_helm(helm, "template", "r", str(chart), "--show-only", "templates/notes.yaml", *given)
        return str(yaml.safe_load(rendered)["notes"])

    return said


def test_the_release_says_what_to_do_next(notes: Callable[..., str]) -> None:
    told = notes()
    # Not `wait pod`: an upgrade's old pods are ready at once, and the pod of a test that failed never is.
    assert "kubectl --namespace serving rollout status deployment,statefulset" in told
    assert "helm test r --namespace serving --logs" in told


def test_the_pod_of_a_test_stays_until_its_log_is_read(render: Any) -> None:
    """Helm 3 deletes what is to go with success before ``--logs`` asks for it, and fails."""
    hooks = [manifest["metadata"].get("annotations", {}) for manifest in render("minimal")]
    [test] = [annotations for annotations in hooks if annotations.get("helm.sh/hook") == "test"]
    assert test["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_the_release_says_how_it_is_called(notes: Callable[..., str]) -> None:
    plain, sure = notes(), str(CHART / "ci" / "tls-cert-manager-values.yaml")
    assert "dns:///r-alora-serve-router-headless.serving.svc:50051" in plain
    assert "ALORA_CLIENT_TLS" not in plain
    secure = notes("--values", sure)
    assert (
        "get secret r-alora-serve-router-tls --output 'jsonpath={.data.ca\\.crt}' | base64 --decode > ca.crt" in secure
    )
    for told in ("CA_FILE=ca.crt", "SERVER_NAME=alora.example.com", "CERT_FILE=tls.crt", "KEY_FILE=tls.key"):
        assert f"ALORA_CLIENT_TLS_{told}" in secure
    assert "export ALORA_API_KEY=" in secure
    asks_nobody = notes("--values", sure, "--set", "tls.clientCaSecret=,access.fileSecret=,access.jwt.jwksConfigMap=")
    assert "ALORA_CLIENT_TLS_CERT_FILE" not in asks_nobody
    assert all("alora-serve generate" in told for told in (plain, secure, asks_nobody))


def test_the_release_says_that_its_alerts_link_to_nothing(notes: Callable[..., str]) -> None:
    rules = "monitoring.prometheusRule.enabled=true"
    base = "monitoring.prometheusRule.runbookBase=https://docs.example.com/operations/"
    assert "monitoring.prometheusRule.runbookBase" in notes("--set", rules)
    assert "runbook" not in notes("--set", rules, "--set", base)
    assert "runbook" not in notes()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["fullnameOverride", "nameOverride"])
def test_the_longest_names_fit_where_kubernetes_puts_them(given: str, values: str, render: Any) -> None:
    """In names of Services, which are labels of DNS, and in labels that are made of names."""
    for manifest in render(values, "--set", f"{given}={'n' * 36}-{'n' * 40}"):
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        pods = manifest.get("spec", {}).get("template", {}).get("metadata", {}).get("labels", {})
        labels = [*manifest["metadata"].get("labels", {}).values(), *pods.values()]
        labels += {
            "Service": [name],
            "StatefulSet": [f"{name}-0123456789"],  # controller-revision-hash
            "ScaledObject": [f"keda-hpa-{name}"],
        }.get(kind, [])
        assert [label for label in labels if not re.fullmatch(r"(\w([\w.-]{0,61}\w)?)?", label)] == [], (kind, name)


# --- values -----------------------------------------------------------------------------------------------------------


def _objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, value in schema.items():
            yield from _objects(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from _objects(value, f"{path}/{index}")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


def test_no_object_of_values_takes_unknown_keys(schema: dict[str, Any]) -> None:
    free = [path for path, found in _objects(schema) if found.get("additionalProperties", True) is not False]
    allowed = {f"/definitions/{name}" for name in PASSED_ON}
    assert [path for path in free if path not in allowed and not path.startswith("/definitions/resources/")] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "replicas=2",
        "global.imageRegisty=x",
        "router.replica=2",
        "adapterDecode.autoscaling.min=1",
        "settings.max_quue=1",
        "settings.store_url=lmdb:",
        "settings.handle_secrets=0123456789abcdef",
        "router.extraEnv[0].name=ALORA_MAX_QUEUE",
        "dtype=auto",
        "dtype=",
        "model.source=ftp",
        "adapters[0].name=a",
        "store.type=memcached",
        "store.external.url=http://x",
        "secrets.handleSecrets[0]=short",
        "monitoring.prometheusRule.runbookBase=docs/operations.md",
        "monitoring.prometheusRule.objectives.firstTokenSeconds=2",
        "monitoring.prometheusRule.objectives.lateShare=1",
        "monitoring.prometheusRule.objectives.failed=0",
    ],
)
def test_a_wrong_value_is_refused(helm: str, wrong: str, chart_helm: Callable[..., str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        chart_helm(helm, "template", "r", str(CHART), "--set", "secrets.existingSecret=s", "--set", wrong)
    assert "specifications of the schema" in refused.value.stderr


def _without_definition(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return root["definitions"][reference.removeprefix("#/definitions/")] if reference else schema


def test_values_and_schema_name_the_same_things(schema: dict[str, Any], defaults: dict[str, Any]) -> None:
    def compare(value: Any, described: dict[str, Any], path: str) -> Iterator[str]:
        described = _without_definition(described, schema)
        properties = described.get("properties")
        free = ("settings", "resources", "behavior", "issuerRef", "routerIssuerRef", "podLabels", "annotations")
        if properties is None or path.endswith(free):
            return
        yield from (f"{path}.{name}" for name in properties.keys() ^ value.keys())
        for name in properties.keys() & value.keys():
            yield from compare(value[name], properties[name], f"{path}.{name}")

    assert list(compare(defaults, schema, "")) == []


def test_the_table_of_values_names_each(defaults: dict[str, Any]) -> None:
    table = (CHART / "README.md").read_text()
    assert [name for name in defaults if f"`{name}" not in table] == []


def test_the_page_says_which_images_an_installation_pulls(render: Any) -> None:
    """Under which tags, too: nobody publishes them, so whoever installs has pushed them before."""
    told = (CHART / "README.md").read_text()
    (images,) = re.findall(r"for image in ([a-z -]+);", told)
    (pattern,) = re.findall(r"docker push \$(registry/\S+)", told)
    pushed = {pattern.replace("$image", image) for image in images.split()}
    manifests = render("minimal", *REGISTRY) + render("statefulset", *REGISTRY)
    pods = [m["spec"].get("template", m).get("spec", {}) for m in manifests if "spec" in m]
    containers = [one for pod in pods for kind in ("containers", "initContainers") for one in pod.get(kind, [])]
    pulled = {container["image"] for container in containers}
    others = pulled - pushed
    assert {other.rpartition("/")[2].partition(":")[0] for other in others} == {"valkey", "rclone"}
    assert [other for other in others if f"`{other.removeprefix('registry/')}`" not in told] == []
    assert pushed < pulled


# --- settings ---------------------------------------------------------------------------------------------------------


def _containers(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for manifest in manifests:
        pod = manifest["spec"].get("template", manifest).get("spec") if "spec" in manifest else None
        for container in (pod or {}).get("containers", []):
            yield manifest["metadata"]["name"], container


def _variables(container: dict[str, Any]) -> dict[str, str]:
    """What the container's process would see; secrets have some value."""
    variables: dict[str, str] = {}
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {})
        if "resourceFieldRef" in source:
            requested = str(container["resources"]["requests"]["cpu"])
            variables[entry["name"]] = str(
                ceil(int(requested[:-1]) / 1000 if requested.endswith("m") else int(requested))
            )
        elif source:
            is_url = entry["name"] == "ALORA_STORE_URL"
            variables[entry["name"]] = "redis+cluster://a,b" if is_url else "0123456789abcdef0123456789abcdef"
        else:
            variables[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], entry["value"])
    return variables


def test_every_variable_is_a_setting_with_a_value_that_fits(
    values: str, render: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the services read them: an unknown name, or a value that does not parse, would stop their start."""
    everything: Any = type("Everything", GROUPS, {})
    for name, container in _containers(render(values)):
        variables = {key: value for key, value in _variables(container).items() if key.startswith("ALORA_")}
        with monkeypatch.context() as environment:
            for key in variables:
                environment.setenv(key, variables[key])
            settings = load_settings(everything, [])
        assert variables.keys() <= {env_name(known) for known in known_names()} | OTHER_VARIABLES, name
        scheme = settings.store_url.partition(":")[0]
        assert scheme == "lmdb" or (scheme in REDIS_SCHEMES and parse_redis_url(settings.store_url))


def test_no_variable_is_given_twice(values: str, render: Any) -> None:
    for name, container in _containers(render(values)):
        names = [entry["name"] for entry in container.get("env", [])]
        assert len(names) == len(set(names)), name


def test_values_take_every_setting_that_the_chart_does_not_decide(schema: dict[str, Any]) -> None:
    rendered = "".join(path.read_text() for path in TEMPLATES)
    decided = {name.lower() for name in re.findall(r"name\"?:? \"?ALORA_([A-Z_]+)", rendered)}
    offered = set(schema["definitions"]["settings"]["properties"])
    assert offered == (known_names() - decided - {"config"}) | {"threads"}


def test_the_dtype_is_set_and_never_detected(render: Any) -> None:
    for name, container in _containers(render("minimal")):
        if name.endswith(("base-prefill", "adapter-decode")):
            assert _variables(container)["ALORA_DTYPE"] == "float32"


def test_no_single_pod_as_installed_is_needed_to_take_a_request(render: Any) -> None:
    """The store's loss costs time alone."""
    manifests = render("minimal")
    alone = {
        manifest["metadata"]["name"].removeprefix("r-alora-serve-")
        for manifest in manifests
        if manifest["kind"] == "Deployment" and manifest["spec"]["replicas"] == 1
    }
    assert alone == {"base-prefill", "store"}
    for name, container in _containers(manifests):
        if name.endswith(("router", "adapter-decode")):
            assert _variables(container)["ALORA_WORKERS_PREFILL"] == "true", "who stand in for base prefill"


def test_numbers_stay_numbers(render: Any) -> None:
    """YAML's numbers are floating point to Helm, and 4294967296 would become 4.294967296e+09."""
    manifests = render(
        "minimal", "--set", "settings.prefix_cache_bytes=4294967296", "--set", "settings.store_ttl_seconds=1000000"
    )
    for name, container in _containers(manifests):
        if name.endswith("base-prefill"):
            assert _variables(container)["ALORA_PREFIX_CACHE_BYTES"] == "4294967296"
            assert _variables(container)["ALORA_STORE_TTL_SECONDS"] == "1000000"


def test_a_services_own_setting_counts_more(render: Any) -> None:
    manifests = render("minimal", "--set", "settings.reflection=true,router.settings.reflection=false")
    seen = {name: _variables(container).get("ALORA_REFLECTION") for name, container in _containers(manifests)}
    assert seen["r-alora-serve-router"] == "false"
    assert seen["r-alora-serve-base-prefill"] == "true"


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_no_template_makes_a_secret_up() -> None:
    """Made-up ones would change with every upgrade, and with every rendering under GitOps."""
    makers = re.compile(r"\b(rand[A-Z]\w+|gen[A-Z]\w+|derivePassword|htpasswd|uuidv4|lookup|now)\b")
    assert [path.name for path in TEMPLATES if path.suffix != ".txt" and makers.search(path.read_text())] == []


def test_secrets_are_those_given_and_none_besides(values: str, render: Any) -> None:
    secrets = [manifest for manifest in render(values) if manifest["kind"] == "Secret"]
    if values == "demo":
        assert [secret["stringData"]["handle-secrets"] for secret in secrets] == ["only-for-trying-it-out"]
    else:
        assert secrets == []


def test_without_secrets_the_command_that_makes_them_is_told(helm: str, chart_helm: Callable[..., str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        chart_helm(helm, "template", "r", str(CHART), "--namespace", "serving")
    assert "kubectl create secret generic r-alora-serve-secrets --namespace serving" in refused.value.stderr
    assert "--set secrets.existingSecret=r-alora-serve-secrets" in refused.value.stderr


def test_without_certificates_the_command_that_makes_their_secret_is_told(
    helm: str, chart_helm: Callable[..., str]
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        chart_helm(helm, "template", "r", str(CHART), "--set", "secrets.existingSecret=s,tls.enabled=true")
    assert "--from-file=tls.crt --from-file=tls.key --from-file=ca.crt" in refused.value.stderr


@pytest.mark.parametrize(
    ("needing", "needed"),
    [
        ("access.fileSecret=access", "secrets.tenantSalt"),
        ("store.protection=mac", "secrets.storeSecrets"),
        ("store.password=true", "secrets.storePassword"),
    ],
)
def test_secrets_as_values_are_complete(needing: str, needed: str, render: Any) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render("demo", "--set", needing, "--set", "secrets.tenantSalt=")
    assert needed in refused.value.stderr


def test_a_changed_secret_of_the_values_restarts_what_reads_it_and_nothing_else(render: Any) -> None:
    """The store least of all: it would come back empty, at each step of a rotation."""

    def annotations(*arguments: str) -> dict[str, Any]:
        said = ("--set", "store.password=true,secrets.storePassword=a-password-of-the-store", *arguments)
        workloads = {m["metadata"]["name"]: m for m in render("demo", *said) if m["kind"] == "Deployment"}
        return {name: m["spec"]["template"]["metadata"]["annotations"] for name, m in workloads.items()}

    before = annotations()

    def restarted(secret: str) -> set[str]:
        after = annotations("--set", f"secrets.{secret}=another-one-of-them")
        return {name.partition("alora-serve-")[2] for name in before if before[name] != after[name]}

    services = {"router", "base-prefill", "adapter-decode"}
    assert restarted("handleSecrets[0]") == restarted("tenantSalt") == restarted("storeSecrets[0]") == services
    assert restarted("storePassword") == {*services, "store"}


def test_tenants_need_a_salt(render: Any) -> None:
    """The services would refuse tenants without one; so the pod does not start without it."""
    for values, optional in (("minimal", True), ("tls-cert-manager", None)):
        for name, container in _containers(render(values)):
            for entry in container.get("env", []):
                if entry["name"] == "ALORA_TENANT_SALT":
                    assert entry["valueFrom"]["secretKeyRef"].get("optional") is optional, name

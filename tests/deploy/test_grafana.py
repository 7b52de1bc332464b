"""What Grafana is provisioned with fits docker-compose.yml and the dashboards, as far as files can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from prometheus_pages import DASHBOARDS, pages, panels

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
LOOKED_INTO = "/etc/grafana/provisioning"
"""By Grafana, unless GF_PATHS_PROVISIONING says otherwise."""


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


@pytest.fixture
def mounts(services: dict[str, Any]) -> dict[str, Path]:
    """Folders of this repository by where Grafana has them."""
    split = [volume.split(":") for volume in services["grafana"]["volumes"]]
    assert all(mode == "ro" for _, _, mode in split)
    return {target: (ROOT / source).resolve() for source, target, _ in split}


def provisioned(kind: str) -> list[dict[str, Any]]:
    """All of a kind, ``datasources`` or ``providers``, in the folders that Grafana reads."""
    folder = {"datasources": "datasources", "providers": "dashboards"}[kind]
    files = [yaml.safe_load(path.read_text()) for path in (GRAFANA / "provisioning" / folder).glob("*.yaml")]
    assert all(file["apiVersion"] == 1 for file in files)
    return [one for file in files for one in file[kind]]


def test_grafana_finds_what_it_is_provisioned_with(services: dict[str, Any], mounts: dict[str, Path]) -> None:
    assert mounts[LOOKED_INTO] == GRAFANA / "provisioning"
    assert "GF_PATHS_PROVISIONING" not in services["grafana"]["environment"]
    folders = {path.name for path in (GRAFANA / "provisioning").iterdir()}
    assert folders == {"datasources", "dashboards"}, "those that Grafana knows"


def test_dashboards_are_read_from_where_they_are_mounted(mounts: dict[str, Path]) -> None:
    [provider] = provisioned("providers")
    assert provider["type"] == "file"
    assert mounts[provider["options"]["path"]] == DASHBOARDS


def test_the_default_source_is_the_prometheus_of_compose(services: dict[str, Any]) -> None:
    [source] = [one for one in provisioned("datasources") if one.get("isDefault")]
    url = urlsplit(source["url"])
    assert source["type"] == "prometheus"
    assert (url.scheme, source["access"]) == ("http", "proxy")
    service = services[url.hostname]
    assert url.hostname in services["grafana"]["depends_on"]
    assert str(url.port) in {port.rpartition(":")[2] for port in service["ports"]}
    assert not any("listen-address" in word for word in service["command"]), "9090, as Prometheus has it"
    assert url.port == 9090


@pytest.mark.parametrize("name", pages())
def test_a_dashboard_asks_sources_that_are_provisioned(name: str) -> None:
    """A variable of Grafana's stands for the default source of its kind until another one is chosen."""
    page, sources = pages()[name], provisioned("datasources")
    chosen = {one["name"]: one["query"] for one in page["templating"]["list"] if one["type"] == "datasource"}
    kinds = {one["uid"]: one["type"] for one in sources} | {f"${{{name}}}": kind for name, kind in chosen.items()}
    asked = [target["datasource"] for panel in panels(page) for target in panel["targets"]]
    asked += [panel["datasource"] for panel in panels(page)]
    asked += [one["datasource"] for one in page["templating"]["list"] if "datasource" in one]
    assert asked
    assert all(kinds[one["uid"]] == one["type"] for one in asked)
    assert set(chosen.values()) <= {one["type"] for one in sources if one.get("isDefault")}

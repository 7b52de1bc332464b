"""Builds Grafana's dashboards from ``deploy/grafana/panels`` and copies them, and the rules, into the Helm chart.

A page of panels is YAML: title, description, ``anchor``, and rows of panels. A panel has a title, a description that
says what to read from it, a unit, and ``queries``: legends with their PromQL, in which

- ``SELECTED`` stands for the namespaces, jobs and instances chosen above, of those that have the metric ``anchor``;
- ``NAMESPACE`` stands for the namespaces alone, for what other jobs have;
- ``zero: LABEL`` adds a flat line ``none`` while nothing has that label: what never went wrong has no series.

Further keys: ``type`` (timeseries, stat, heatmap), ``width`` of 24, ``stacked``, ``max``, and ``thresholds`` as
[value, colour].
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
PANELS: Final = Path("deploy/grafana/panels")
RULES: Final = Path("deploy/prometheus/rules")
DASHBOARDS: Final = Path("deploy/grafana/dashboards")
CHART_DASHBOARDS: Final = Path("deploy/helm/alora-serve/files/dashboards")
CHART_RULES: Final = Path("deploy/helm/alora-serve/files/rules")

TAG: Final = "alora-serve"
SCHEMA_VERSION: Final = 42
"""Of Grafana 12; older ones are migrated by Grafana, newer ones by no one."""
GRID_COLUMNS: Final = 24
HEIGHTS: Final = {"stat": 4, "timeseries": 8, "heatmap": 8}
WIDTHS: Final = {"stat": 4, "timeseries": 8, "heatmap": 8}
NAMESPACE: Final = 'namespace=~"$namespace"'
SELECTED: Final = f'{NAMESPACE}, job=~"$job", instance=~"$instance"'
EVERY: Final = {"namespace": ".*"}
"""What All stands for, where what is asked may lack the label: Prometheus has none outside of Kubernetes."""
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(name: str, page: dict[str, Any]) -> dict[str, Any]:
    """What Grafana loads for one page of panels."""
    return {
        "uid": f"{TAG}-{name.replace('_', '-')}",
        "title": f"{TAG} / {page['title']}",
        "description": page["description"],
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "tags": [TAG], "title": TAG, "asDropdown": True, "keepTime": True}],
        "templating": {"list": list(variables(page["anchor"]))},
        "panels": list(panels(page["rows"])),
    }


def variables(anchor: str) -> Iterator[dict[str, Any]]:
    """The choices above a dashboard: where from, which namespace, which job, which of its instances."""
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    for name, label, query in (
        ("namespace", "Namespace", f"label_values({anchor}, namespace)"),
        ("job", "Job", f"label_values({anchor}{{{NAMESPACE}}}, job)"),
        ("instance", "Instance", f'label_values({anchor}{{{NAMESPACE}, job=~"$job"}}, instance)'),
    ):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,  # when the time range changes: pods come and go
            "sort": 1,
            "multi": True,
            "includeAll": True,
            **({"allValue": EVERY[name]} if name in EVERY else {}),
            "current": {"text": "All", "value": "$__all"},
        }


def panels(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows and their panels, numbered and placed from left to right."""
    number, top = 0, 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": top, "w": GRID_COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row["title"], "collapsed": False, "panels": [], "gridPos": place}
        top, left, height = top + 1, 0, 0
        for spec in row["panels"]:
            kind = spec.get("type", "timeseries")
            width = spec.get("width", WIDTHS[kind])
            if left + width > GRID_COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            yield panel(number, kind, spec, {"x": left, "y": top, "w": width, "h": HEIGHTS[kind]})
            left, height = left + width, max(height, HEIGHTS[kind])
        top += height


def panel(number: int, kind: str, spec: dict[str, Any], place: dict[str, int]) -> dict[str, Any]:
    """One panel as Grafana has it."""
    zero = f'\nor on () label_replace(vector(0), "{spec["zero"]}", "none", "", "")' if "zero" in spec else ""
    targets = [
        {
            "refId": chr(ord("A") + position),
            "datasource": DATASOURCE,
            "expr": expression.strip().replace("SELECTED", SELECTED).replace("NAMESPACE", NAMESPACE) + zero,
            "legendFormat": legend,
            "range": True,
            "format": "heatmap" if kind == "heatmap" else "time_series",
        }
        for position, (legend, expression) in enumerate(spec["queries"].items())
    ]
    return {
        "id": number,
        "type": kind,
        "title": spec["title"],
        "description": " ".join(spec["description"].split()),
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": defaults(kind, spec), "overrides": []},
        "options": options(kind, spec),
    }


def defaults(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """How values are written and drawn."""
    limits = spec.get("thresholds", [])
    steps = [{"value": None, "color": "green"}, *({"value": value, "color": colour} for value, colour in limits)]
    chosen: dict[str, Any] = {
        "unit": spec["unit"],
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if kind == "stat" else "palette-classic"},
    }
    if "max" in spec:
        chosen["max"] = spec["max"]
    if kind == "timeseries":
        chosen["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if spec.get("stacked") else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if spec.get("stacked") else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if limits else "off"},
        }
    return chosen


def options(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What a kind of panel can be told besides."""
    if kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
        }
    if kind == "heatmap":
        return {
            "calculate": False,  # Prometheus's buckets are the cells
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 32},
            "yAxis": {"unit": spec["unit"]},
            "legend": {"show": True},
            "tooltip": {"mode": "single"},
        }
    return {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def wanted_files(root: Path) -> dict[Path, str]:
    """Every file that this script owns, with its content."""
    files = {}
    for source in sorted((root / PANELS).glob("*.yaml")):
        text = json.dumps(dashboard(source.stem, yaml.safe_load(source.read_text())), indent=2) + "\n"
        for folder in (DASHBOARDS, CHART_DASHBOARDS):
            files[root / folder / f"{source.stem}.json"] = text
    for rules in sorted((root / RULES).glob("*.yaml")):
        files[root / CHART_RULES / rules.name] = rules.read_text()
    return files


def stale_files(root: Path, wanted: dict[Path, str]) -> list[Path]:
    """Files that are missing, other than wanted, or nobody's any more."""
    owned = {path for folder in {path.parent for path in wanted} for path in folder.glob("*") if path.is_file()}
    changed = {path for path, text in wanted.items() if not path.exists() or path.read_text() != text}
    return sorted(changed | (owned - wanted.keys()))


def main(arguments: list[str] | None = None) -> int:
    """Write what is stale, or with ``--check`` only say so; 1 if a check found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    chosen = parser.parse_args(arguments)
    wanted = wanted_files(chosen.root)
    stale = stale_files(chosen.root, wanted)
    for path in stale:
        print(f"{'stale' if chosen.check else 'written'}: {path.relative_to(chosen.root)}")
        if chosen.check:
            continue
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()
    return 1 if chosen.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

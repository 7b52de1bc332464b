"""Grafana's dashboards, their queries as Grafana sends them, and a running Prometheus that is asked them."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

DASHBOARDS = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards"
ZERO = re.compile(r"\s*or on \(\) (vector\(0\)|label_replace\(vector\(0\).*)")
"""What draws a 0 where there is nothing."""
FAILED = 'code=~"UNAVAILABLE|INTERNAL|UNKNOWN|DEADLINE_EXCEEDED"'
"""Of calls that there are none of while all is well."""


def pages() -> dict[str, dict[str, Any]]:
    """Dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(page: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in page["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel and expression of every query."""
    for name, page in pages().items():
        for panel in panels(page):
            for target in panel["targets"]:
                yield name, f"{panel['title']} ({target['legendFormat']})", target["expr"]


class Scraper:
    """A running Prometheus, asked over HTTP.

    Args:
        port: of its API, on loopback.
        window: over which queries take rates: several scrapes.
    """

    def __init__(self, port: int, window: str) -> None:
        self._port, self._window, self._began = port, window, time.time()

    def get(self, path: str, **parameters: str) -> Any:
        """The ``data`` of an answer of its API."""
        with urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def has_values(self, expression: str) -> bool:
        """Whether it gave a number at any moment since the start."""
        span = {"start": str(self._began), "end": str(time.time()), "step": "1"}
        series = self.get("query_range", query=expression, **span)["result"]
        return any(math.isfinite(float(value)) for one in series for _, value in one["values"])

    def variables(self, page: dict[str, Any]) -> dict[str, str]:
        """What Grafana fills into a dashboard's queries where all namespaces, jobs and instances are chosen."""
        values = {"__rate_interval": self._window}
        for variable in page["templating"]["list"]:
            if "allValue" in variable:
                values[variable["name"]] = variable["allValue"]
            elif variable["type"] == "query":
                metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
                found = self.get("query", query=f"group by ({label}) ({filled_in(metric, values)})")["result"]
                values[variable["name"]] = "|".join(one["metric"][label] for one in found)
        return values


def filled_in(expression: str, variables: dict[str, str]) -> str:
    """An expression as Grafana sends it."""
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], expression)


def bare(expression: str) -> str:
    """What an expression shows of what there is: without zeros for what there is not, and of calls of any status."""
    return ZERO.sub("", expression).replace(FAILED, 'code=~".+"')


def empty_queries(prometheus: Scraper) -> list[str]:
    """Queries of dashboards that never gave a number."""
    chosen = {name: prometheus.variables(page) for name, page in pages().items()}
    asked = [(f"{name}: {panel}", filled_in(bare(expression), chosen[name])) for name, panel, expression in queries()]
    return [f"{where}: {expression}" for where, expression in asked if not prometheus.has_values(expression)]

"""The documentation holds: links resolve, tables are those of the code, and named files and tests exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import grpc
import pytest
from prometheus_client import CollectorRegistry

from alora_serve import errors, metrics
from alora_serve.config.reference import configuration_table
from alora_serve.errors import AloraServeError, ConfigError, ModelUnsupportedError, StoreError
from alora_serve.metrics.process import CertificateUse

_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_MODULE = re.compile(r"`((?:kv|model|adapters|engine|rpc|client|cli|config|endpoints)/[\w/]*(?:\.py)?|[a-z_]+\.py)`")
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
_CELL_EDGE = re.compile(r"(?<!\\)\|")
_METRIC_ROW = re.compile(r"^\| `((?:alora_|vllm:)\w+)` \| (\w+) \| (?:(.*?) )?\| (.*) \|$", re.MULTILINE)
_LABEL_LINE = re.compile(r"^`(\w+)` is (.*)\.$", re.MULTILINE)
_CODE = re.compile(r"`(\w+)`")
_CODE_SPAN = re.compile(r"`[^`]*`")
_PLACEHOLDER = re.compile(r"\b[A-Z]+_[A-Z_]+\b")
_ERROR_ROW = re.compile(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \|", re.MULTILINE)


@pytest.fixture(scope="module")
def root(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath


def _pages(root: Path) -> list[Path]:
    return [*root.glob("*.md"), *(page for folder in ("docs", "examples") for page in (root / folder).rglob("*.md"))]


def _links(page: Path) -> Iterator[str]:
    yield from _LINK.findall(_CODE_BLOCK.sub("", page.read_text()))


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_resolve(root: Path) -> None:
    broken = []
    for page in _pages(root):
        for link in _links(page):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.append(f"{page.relative_to(root)}: {link}")
    assert not broken


def test_rows_of_tables_have_as_many_cells_as_their_heads(root: Path) -> None:
    """A bar ends a cell even inside code, unless it is written \\|: what follows the last cell is not shown."""
    broken = []
    for page in _pages(root):
        for table in _TABLE.findall(_CODE_BLOCK.sub("", page.read_text())):
            head, *rows = table.splitlines()
            cells = len(_CELL_EDGE.findall(head))
            broken += [f"{page.relative_to(root)}: {row}" for row in rows if len(_CELL_EDGE.findall(row)) != cells]
    assert not broken


def test_no_figure_is_still_to_be_filled_in(root: Path) -> None:
    """A name in capitals that is neither code nor anybody's stands for something that nobody wrote."""
    left = [
        f"{page.relative_to(root)}: {name}"
        for page in _pages(root)
        for name in _PLACEHOLDER.findall(_CODE_SPAN.sub("", _CODE_BLOCK.sub("", page.read_text())))
        if name not in NAMES_IN_CAPITALS
    ]
    assert not left


def test_the_notice_says_where_the_licences_of_data_and_weights_are(root: Path) -> None:
    named = re.findall(r"examples/[\w./-]+\.md", (root / "NOTICE").read_text())
    cards = [card.relative_to(root).as_posix() for card in (root / "examples" / "intrinsics").glob("*/README.md")]
    assert sorted(named) == sorted(["examples/data/README.md", *cards])


def test_the_index_links_every_page(root: Path) -> None:
    docs = root / "docs"
    linked = {(docs / link.partition("#")[0]).resolve() for link in _links(docs / "index.md")}
    assert set(docs.rglob("*.md")) - linked == {docs / "index.md"}


def test_decisions_are_numbered_without_a_gap(root: Path) -> None:
    pages = sorted((root / "docs" / "adr").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"# {int(page.name[:4])}. ")
        assert {"Context", "Decision", "Consequences"} <= set(re.findall(r"^## (.+)$", text, re.MULTILINE))


def test_the_configuration_page_is_what_the_settings_say(root: Path) -> None:
    page = (root / "docs" / "configuration.md").read_text()
    assert page.endswith(f"\n\n{configuration_table()}"), "regenerate its end: python -m alora_serve.config"


class Metric(NamedTuple):
    """What is promised of one.

    Attributes:
        values: of labels, all that the code knows beforehand.
    """

    kind: str
    labels: tuple[str, ...]
    values: frozenset[str]


OPEN_LABELS = {"method", "code", "route", "status", "adapter", "digest", "model_name"}
OPEN_LABELS |= {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
"""Their values come with what happens."""
NOT_FROM_THE_START = {
    "alora_router_endpoints": {*get_args(metrics.EndpointRole), *get_args(metrics.EndpointState)},
    "alora_certificate_expiry_timestamp_seconds": {*get_args(CertificateUse)},
}
"""Values of gauges whose series come with what they tell of."""
MEANT_OTHERWISE = {
    "alora_router_requests_total": {"base", "other"},
    "alora_adapter_loaded": {"other"},
    "vllm:kv_cache_usage_perc": {"prefix_cache_bytes"},
}
"""Words of the page that look like values of labels."""


NAMES_IN_CAPITALS = {status.name for status in grpc.StatusCode} | {"NOT_SERVING", "RST_STREAM", "OMP_NUM_THREADS"}
"""Of gRPC, HTTP/2 and OpenMP, which prose may use."""


def _documented_metrics(page: str) -> dict[str, Metric]:
    defined = {label: _CODE.findall(values) for label, values in _LABEL_LINE.findall(page)}
    found = {}
    for name, kind, cell, meaning in _METRIC_ROW.findall(page):
        labels = tuple(_CODE.findall(cell))
        values = {*_CODE.findall(meaning), *(value for label in labels for value in defined.get(label, ()))}
        found[name] = Metric(kind, labels, frozenset(values - MEANT_OTHERWISE.get(name, set())))
    return found


def _declared_metrics() -> dict[str, Metric]:
    found = {}
    for owner in vars(metrics).values():
        if not inspect.isclass(owner) or not owner.__name__.endswith("Metrics") or owner is metrics.CoreMetrics:
            continue
        registry = CollectorRegistry()
        owner(registry)
        samples = {family.name: family.samples for family in registry.collect()}
        for collector in registry._collector_to_names:
            for family in collector.describe():  # type: ignore[attr-defined]
                # The library lists labels only with their values; a collector of our own says which it will give.
                labels = tuple(getattr(collector, "_labelnames", ()) or getattr(family, "_labelnames", ()))
                values = {sample.labels[label] for sample in samples.get(family.name, ()) for label in labels}
                values |= NOT_FROM_THE_START.get(family.name, set())
                assert values or OPEN_LABELS.issuperset(labels), f"{family.name}: no series from the start"
                name = family.name + ("_total" if family.type == "counter" else "")
                found[name] = Metric(family.type, labels, frozenset(values))
    return found


def test_the_metrics_page_names_every_metric_with_type_labels_and_their_values(root: Path) -> None:
    documented = _documented_metrics((root / "docs" / "metrics.md").read_text())
    declared = _declared_metrics()
    assert documented.keys() == declared.keys()
    for name, metric in declared.items():
        assert documented[name] == metric, name


def test_the_api_page_names_every_error_that_a_client_can_get(root: Path) -> None:
    documented = _ERROR_ROW.findall((root / "docs" / "api.md").read_text())
    ours = [found for found in vars(errors).values() if inspect.isclass(found) and issubclass(found, AloraServeError)]
    internal = (StoreError, ConfigError, ModelUnsupportedError)
    assert sorted(documented) == sorted((e.status, e.reason) for e in ours if not issubclass(e, internal))


def test_named_tests_exist(root: Path) -> None:
    cited = [(page, *found) for page in _pages(root) for found in _TEST.findall(page.read_text())]
    assert cited
    for page, file, test in cited:
        tree = ast.parse((root / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert test in functions, f"{page.relative_to(root)} names {file}::{test}"


def test_modules_named_in_the_architecture_exist(root: Path) -> None:
    places = (root / "shared" / "alora_serve", root / "services" / "adapter_router")
    named = set(_MODULE.findall((root / "docs" / "architecture.md").read_text()))
    assert len(named) > 20
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()

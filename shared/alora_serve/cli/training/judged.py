"""Shows an evaluation, and how two compare."""

from __future__ import annotations

from collections.abc import Mapping

from alora_serve.cli.output import console, print_table
from alora_serve.evaluation.bootstrap import Difference
from alora_serve.evaluation.report import Report


def show_report(report: Report) -> None:
    """Figures with their intervals, then by source, then what calls cost."""
    rows = [
        {"metric": name, "value": f"{e.value:.4f}", "95 % interval": f"{e.low:.4f} to {e.high:.4f}"}
        for name, e in report.metrics.items()
    ]
    print_table(f"{report.adapter or 'base model'}, {report.items} items", rows)
    out = console()
    if report.majority is not None:
        out.print(f"always the most frequent answer: accuracy {report.majority:.4f}", markup=False)
    if len(report.by_source) > 1:
        main = next(iter(report.metrics))
        sources = [{"source": s, main: f"{value:.4f}", "items": n} for s, (value, n) in report.by_source.items()]
        print_table("", sources)
    out.print(
        f"a call: {report.mean_seconds:.3f} s, first token after {report.mean_first_token_seconds:.3f} s, "
        f"{report.mean_prompt_tokens:.0f} prompt tokens, {report.mean_cached_tokens:.0f} of them cached",
        markup=False,
    )


def show_differences(differences: Mapping[str, Difference]) -> None:
    """First minus second, for each figure."""
    rows = [
        {
            "metric": name,
            "first minus second": f"{d.value:+.4f}",
            "95 % interval": f"{d.low:+.4f} to {d.high:+.4f}",
            "p": f"{d.p_value:.3f}",
        }
        for name, d in differences.items()
    ]
    print_table("paired bootstrap over items", rows)

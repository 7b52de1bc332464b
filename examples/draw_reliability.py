"""The reliability diagram: how often the base model's answers were right, against how likely they were said to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from alora_serve.evaluation.report import Evaluation
from alora_serve.evaluation.scores import calibration_error, label_reliability

SURE: Final = "certain"
"""The label whose probability is the intrinsic's answer."""


def draw_reliability(runs: Mapping[int, Evaluation], file: Path) -> None:
    """Draw evaluations of uncertainty, by their seeds, into an SVG file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "alora-serve"  # the same answers give the same file
    from matplotlib import pyplot as plt

    figure, (axes, below) = plt.subplots(
        2, 1, figsize=(5.5, 6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="as likely as said")
    for seed, run in runs.items():
        bins = label_reliability(run.items, SURE)
        said = [likelihoods / count for count, likelihoods, _ in bins]
        error = calibration_error(bins)
        axes.plot(said, [right / count for count, _, right in bins], marker="o", label=f"seed {seed}: ECE {error:.3f}")
        below.plot(said, [count for count, _, _ in bins], marker="o")
    axes.set(ylabel="share of right answers", title="uncertainty, aLoRA, test set")
    below.set(xlabel="certainty: how likely the answer is right", ylabel="answers")
    axes.legend(fontsize=8)
    for each in (axes, below):
        each.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)

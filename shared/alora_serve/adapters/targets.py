"""Which modules of the base model an adapter changes, by which rank and scaling: PEFT's matching rules, exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from alora_serve.adapters.config import ALL_LINEAR, AdapterConfig, Names
from alora_serve.adapters.patterns import Patterns
from alora_serve.errors import AdapterRefusedError

T = TypeVar("T")

_LITERAL_END: Final = re.compile(r"(?:[\w.^]*[.^])?(\w+)", re.ASCII)
"""Of a key that is a name, what the names that it matches end in: a dot stands for any character."""


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear module of the base model.

    Attributes:
        in_features: width of its input.
        out_features: width of its output.
        is_conv1d: GPT-2's ``Conv1D``, whose weight lies transposed. An adapter's A and B do not.
        is_output_layer: makes the logits.
    """

    in_features: int
    out_features: int
    is_conv1d: bool = False
    is_output_layer: bool = False


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """How one module is adapted. ``scaling`` multiplies ``B(A(x))``."""

    rank: int
    scaling: float


def resolve_targets(config: AdapterConfig, module_shapes: Mapping[str, ModuleShape]) -> dict[str, ResolvedTarget]:
    """The modules that PEFT would adapt, by full name, in the order of ``module_shapes``.

    ``module_shapes`` holds every Linear and Conv1D of the base model, the output layer included.

    Raises:
        AdapterRefusedError: nothing matches, the output layer does, a pattern is not a regular expression, or matching
            them all takes too long.
    """
    patterns = Patterns()
    names = _matching_names(config, module_shapes, patterns)
    ranks = _values(config.rank_pattern, names, config.rank, patterns)
    alphas = _values(config.alpha_pattern, names, config.alpha, patterns)
    targets = {name: _resolved(config, ranks[name], alphas[name]) for name in names}
    for name in names:
        if module_shapes[name].is_output_layer:
            raise AdapterRefusedError(
                f"it adapts the output layer {name!r}; logits of a step are made for all its sequences at once by the "
                "base model's, so this cannot be served"
            )
    if not targets:
        raise AdapterRefusedError(
            f"target_modules = {config.target_modules!r} (exclude_modules = {config.exclude_modules!r}, "
            f"layers_to_transform = {config.layers_to_transform!r}) matches no linear module of the base model"
        )
    return targets


def _matching_names(config: AdapterConfig, module_shapes: Mapping[str, ModuleShape], patterns: Patterns) -> list[str]:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = tuple(name for name, shape in module_shapes.items() if not shape.is_output_layer)
    return [
        name
        for name in module_shapes
        if not _matches(config.exclude_modules, name, patterns)
        and _matches(targets, name, patterns)
        and _in_layers(config, targets, name, patterns)
    ]


def _matches(names: Names, module_name: str, patterns: Patterns) -> bool:
    if isinstance(names, str):
        return bool(names) and patterns.fullmatch(names, module_name)
    return any(module_name == name or module_name.endswith(f".{name}") for name in names)


def _in_layers(config: AdapterConfig, targets: Names, module_name: str, patterns: Patterns) -> bool:
    # A module named in full is adapted whatever layers_to_transform says. PEFT shortens lists of 20 names and more to
    # suffixes first, which can undo that; then the weights file lacks a tensor that we expect, and loading refuses it.
    if config.layers_to_transform is None or module_name in targets:
        return True
    # The lazy quantifier takes the first number in the name: of `layers.1.experts.0`, the layer and not the expert.
    named = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in config.layers_pattern]
    for pattern in named or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if (found := patterns.match(pattern, module_name)) is not None:
            index = found["idx"]  # None where a `|` in the pattern leaves it out
            return index is not None and int(index) in config.layers_to_transform
    return False


def _values(by_key: Mapping[str, T], names: Sequence[str], default: T, patterns: Patterns) -> dict[str, T]:
    """What PEFT takes for each of the modules ``names``: the value of the first key that matches."""
    # Of hundreds of keys, one for each module, most end in what the name at hand does not.
    endings = {key: found[1] if (found := _LITERAL_END.fullmatch(key)) else "" for key in by_key}

    def matches(key: str, name: str) -> bool:
        # `{key}$` inside the group and `re.match`, as PEFT does: a key matches at any dot, and `a|b` stays one
        # alternative.
        return name.endswith(endings[key]) and patterns.match(rf"(.*\.)?({key})$", name) is not None

    return {name: by_key.get(next((key for key in by_key if matches(key, name)), name), default) for name in names}


def _resolved(config: AdapterConfig, rank: int, alpha: float) -> ResolvedTarget:
    return ResolvedTarget(rank=rank, scaling=alpha / (math.sqrt(rank) if config.use_rslora else rank))

"""What the endpoints serve between them: adapters by name, and base models. Pure, from their reports alone."""

from __future__ import annotations

import difflib
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, replace
from typing import Final

from adapter_router.policy import EndpointSnapshot
from alora_serve.errors import AdapterNotFoundError, AdapterRefusedError, UnavailableError
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.types import AdapterInfo, ModelInfo

NO_MODEL: Final = "no base prefill and decode worker of one model are known yet; retry later"

_NEAREST_NAMES: Final = 3
_COMPARED_NAMES: Final = 100


def merged_adapters(workers: Iterable[EndpointSnapshot]) -> list[AdapterInfo]:
    """One entry per name, sorted.

    While workers disagree about a name, one that can be served is shown, then the lower digest, then one that is an
    intrinsic. It is resident when any worker has those very weights in memory.
    """
    reported: dict[str, list[AdapterInfo]] = {}
    for worker in workers:
        for adapter in worker.adapters.values():
            reported.setdefault(adapter.name, []).append(adapter)
    return [_shown(reported[name]) for name in sorted(reported)]


def find_adapter(name: str, workers: Sequence[EndpointSnapshot]) -> AdapterInfo:
    """The adapter of that name, whether or not a worker can take a request for it now.

    Raises:
        AdapterNotFoundError: no worker knows it; names the nearest ones.
        AdapterRefusedError: the workers that know it cannot serve it; says why.
        UnavailableError: no worker has reported yet.
    """
    if not any(worker.model_digest for worker in workers):
        raise UnavailableError("no decode worker has reported its adapters yet; retry later")
    known = {adapter.name: adapter for adapter in merged_adapters(workers)}
    adapter = known.get(name)
    if adapter is None:
        # Of thousands, those of about its length: each comparison takes time from everybody's streams.
        alike = heapq.nsmallest(_COMPARED_NAMES, known, key=lambda other: abs(len(other) - len(name)))
        nearest = difflib.get_close_matches(name, alike, n=_NEAREST_NAMES, cutoff=0)
        hint = f"nearest: {', '.join(nearest)}" if nearest else "no adapter is served at all"
        raise AdapterNotFoundError(f"no adapter named {excerpt(name)}; {hint}", metadata={"nearest": ",".join(nearest)})
    if adapter.problem:
        raise AdapterRefusedError(f"adapter {name!r} cannot be served: {adapter.problem}")
    return adapter


def live_models(
    prefills: Iterable[EndpointSnapshot], workers: Iterable[EndpointSnapshot], adapters: Collection[str] = ("",)
) -> frozenset[bytes]:
    """Digests of the models that have both a base prefill and workers taking requests now.

    Of those, the ones whose workers serve the most of ``adapters``: what is asked on one prefill runs on one model. The
    empty name is the base model. None where no adapter of them is served.
    """
    return _paired(filter(_takes_requests, prefills), filter(_takes_requests, workers), adapters)


def paired_models(
    prefills: Sequence[EndpointSnapshot], workers: Sequence[EndpointSnapshot], adapters: Collection[str] = ("",)
) -> frozenset[bytes]:
    """The live models or, while there is none, those that endpoints served when they last reported."""
    return live_models(prefills, workers, adapters) or _paired(prefills, workers, adapters)


def prevailing_model(
    prefills: Sequence[ModelInfo], workers: Sequence[ModelInfo], served: Collection[bytes]
) -> ModelInfo:
    """The model that most workers have, while a rollout runs two; of what differs between them, what most of them say.

    Its context is the shortest of all its endpoints, since a prompt needs a base prefill and a worker, whichever.

    Args:
        prefills: one a base prefill.
        workers: one a worker.
        served: digests of the models that have both.

    Raises:
        UnavailableError: none is served.
    """
    counts = Counter(model.model_digest for model in workers if model.model_digest in served)
    if not counts:
        raise UnavailableError(NO_MODEL)
    digest = max(counts, key=lambda digest: (counts[digest], digest))
    context_tokens = min(model.context_tokens for model in (*prefills, *workers) if model.model_digest == digest)
    told = Counter(replace(model, context_tokens=context_tokens) for model in workers if model.model_digest == digest)
    return max(told, key=lambda model: (told[model], astuple(model)))


def _takes_requests(endpoint: EndpointSnapshot) -> bool:
    return endpoint.healthy and not endpoint.draining


def _paired(
    prefills: Iterable[EndpointSnapshot], workers: Iterable[EndpointSnapshot], adapters: Collection[str]
) -> frozenset[bytes]:
    prefilled = {endpoint.model_digest for endpoint in prefills if endpoint.model_digest}
    decoding = [endpoint for endpoint in workers if endpoint.model_digest in prefilled]
    served = Counter(
        model
        for adapter in set(adapters)
        for model in {endpoint.model_digest for endpoint in decoding if endpoint.serves(adapter)}
    )
    most = max(served.values(), default=0)
    return frozenset(model for model, count in served.items() if count == most)


def _shown(candidates: list[AdapterInfo]) -> AdapterInfo:
    shown = min(
        candidates,
        key=lambda adapter: (
            bool(adapter.problem),
            adapter.digest,
            not adapter.intrinsic_digest,
            adapter.intrinsic_digest,
        ),
    )
    return replace(shown, resident=any(a.resident and a.digest == shown.digest for a in candidates))

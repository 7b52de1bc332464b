"""What endpoints serve between them, from their reports."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import replace

import pytest

from adapter_router.catalog import find_adapter, live_models, merged_adapters, paired_models, prevailing_model
from adapter_router.policy import EndpointSnapshot
from alora_serve.errors import AdapterNotFoundError, AdapterRefusedError, UnavailableError
from alora_serve.types import AdapterDigest, AdapterInfo, ModelInfo
from fake_services import adapter, model


def endpoint(*adapters: AdapterInfo, name: str = "m", **changes: bool) -> EndpointSnapshot:
    known = {info.name: info for info in adapters}
    return dataclasses.replace(
        EndpointSnapshot("h:1", model_digest=model(name).model_digest, adapters=known), **changes
    )


def other(info: AdapterInfo, digest: str) -> AdapterInfo:
    return dataclasses.replace(info, digest=AdapterDigest(digest))


def test_of_workers_with_and_without_a_definition_one_that_has_it_is_shown() -> None:
    bare = adapter("a")
    known = [replace(bare, intrinsic_digest=digest) for digest in ("1", "2")]
    assert merged_adapters([endpoint(bare), endpoint(known[1]), endpoint(known[0])]) == [known[0]]


def test_an_adapter_that_any_worker_can_serve_is_shown_as_served() -> None:
    refused, served = adapter("a", problem="old"), adapter("a")
    assert merged_adapters([endpoint(refused), endpoint(served)]) == [served]


def test_residency_counts_only_for_the_weights_that_are_shown() -> None:
    cold, warm = other(adapter("a"), "1"), other(adapter("a", resident=True), "2")
    assert not merged_adapters([endpoint(warm), endpoint(cold)])[0].resident
    assert merged_adapters([endpoint(adapter("a")), endpoint(adapter("a", resident=True))])[0].resident


def test_adapters_are_sorted_by_name() -> None:
    assert [a.name for a in merged_adapters([endpoint(adapter("b")), endpoint(adapter("a"))])] == ["a", "b"]


def test_an_adapter_known_only_to_an_unreachable_worker_is_still_known() -> None:
    assert find_adapter("a", [endpoint(adapter("a"), healthy=False)]) == adapter("a")


def test_an_unknown_adapter_is_answered_with_the_nearest_names() -> None:
    workers = [endpoint(*(adapter(name) for name in ("answerability", "certainty", "jailbreak", "rewrite")))]
    with pytest.raises(AdapterNotFoundError, match="no adapter named 'jailbraek'; nearest: jailbreak, ") as caught:
        find_adapter("jailbraek", workers)
    assert len(caught.value.metadata["nearest"].split(",")) == 3


def test_of_thousands_only_some_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def nearest(name: str, names: Collection[str], **_: object) -> list[str]:
        compared.append(len(names))
        return [other for other in names if other == "jailbreak"]

    monkeypatch.setattr(difflib, "get_close_matches", nearest)
    workers = [endpoint(*(adapter(name) for name in ("jailbreak", *(f"rewrite-{i}" for i in range(1000)))))]
    with pytest.raises(AdapterNotFoundError, match="nearest: jailbreak"):
        find_adapter("jailbraek", workers)
    assert compared == [100]


def test_an_unknown_name_is_told_by_its_beginning() -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        find_adapter("x" * 255, [endpoint(adapter("a"))])
    assert len(str(caught.value)) < 200


def test_where_no_adapter_exists_the_answer_says_so() -> None:
    with pytest.raises(AdapterNotFoundError, match="no adapter is served at all"):
        find_adapter("a", [endpoint()])


def test_a_refused_adapter_says_why() -> None:
    with pytest.raises(AdapterRefusedError, match="use_dora"):
        find_adapter("a", [endpoint(adapter("a", problem="use_dora"))])


def test_before_any_report_nothing_is_known_to_be_missing() -> None:
    with pytest.raises(UnavailableError):
        find_adapter("a", [EndpointSnapshot("h:1", healthy=False)])


def test_a_model_needs_both_services() -> None:
    assert live_models([endpoint(name="m")], [endpoint(name="n")]) == frozenset()
    assert live_models([endpoint(name="m"), endpoint(name="n")], [endpoint(name="n")]) == {model("n").model_digest}


@pytest.mark.parametrize("why", ["unhealthy", "draining"])
def test_endpoints_that_take_nothing_make_no_live_model(why: str) -> None:
    changes = {"healthy": False} if why == "unhealthy" else {"draining": True}
    assert live_models([endpoint()], [endpoint(**changes)]) == frozenset()
    # While nothing lives, what was last known says which endpoints to wait for.
    assert paired_models([endpoint()], [endpoint(**changes)]) == {model().model_digest}
    assert paired_models([endpoint(), endpoint(name="n")], [endpoint(**changes), endpoint(name="n")]) == {
        model("n").model_digest
    }


def test_a_models_workers_must_serve_the_adapter() -> None:
    assert live_models([endpoint()], [endpoint(adapter("a", problem="no"))], ["a"]) == frozenset()
    assert live_models([endpoint()], [endpoint(adapter("a"))], ["a"]) == {model().model_digest}


def test_of_models_those_whose_workers_serve_the_most_of_what_is_asked_will_do() -> None:
    prefills = [endpoint(name="m"), endpoint(name="n")]
    workers = [endpoint(adapter("a")), endpoint(adapter("b")), endpoint(adapter("b"), adapter("c"), name="n")]
    m, n = model("m").model_digest, model("n").model_digest
    assert live_models(prefills, workers, ["", "a", "b"]) == {m}, "between its workers"
    assert live_models(prefills, workers, ["b", "c"]) == {n}
    assert live_models(prefills, workers, ["a", "c"]) == {m, n}, "neither serves both"
    assert live_models(prefills, workers, ["b", "c", "c", "a", "a", "a"]) == {n, m}, "asked twice is served once"
    gone = [dataclasses.replace(worker, healthy=worker.model_digest == m) for worker in workers]
    assert paired_models(prefills, gone, ["b", "c"]) == {m}, "some of them now rather than all of them later"
    assert paired_models(prefills, gone, ["c"]) == {n}


def test_the_model_of_most_workers_prevails() -> None:
    old, new = model("old"), model("new")
    both = {old.model_digest, new.model_digest}
    assert prevailing_model([], [old, new, new], both) == new
    assert prevailing_model([], [old, new, new], {old.model_digest}) == old
    assert prevailing_model([], [old, new], both) == prevailing_model([], [new, old], both)
    with pytest.raises(UnavailableError):
        prevailing_model([old], [old], set())


def test_the_context_is_the_shortest_of_every_endpoint_of_the_model() -> None:
    def of(context_tokens: int, name: str = "m") -> ModelInfo:
        return dataclasses.replace(model(name), context_tokens=context_tokens)

    served = {model().model_digest}
    assert prevailing_model([of(100)], [of(300), of(200)], served) == of(100), "no longer prompt is prefilled"
    assert prevailing_model([of(300), of(200)], [of(200), of(100)], served) == of(100), "no longer one is decoded"
    assert prevailing_model([of(300), of(10, "n")], [of(300), of(10, "n")], served) == of(300), "another model"


def test_what_workers_of_one_model_tell_differently_is_as_most_of_them_say() -> None:
    float32 = dataclasses.replace(model(), context_tokens=300)
    bfloat16 = dataclasses.replace(float32, dtype="bfloat16", storage_digest=b"t" * 32, kv_bytes_per_token=32)
    served = {model().model_digest}
    # Contexts of their own must not hide that two say the same.
    workers = [float32, bfloat16, dataclasses.replace(bfloat16, context_tokens=200)]
    expected = dataclasses.replace(bfloat16, context_tokens=200)
    assert prevailing_model([float32], workers, served) == expected
    pair = [float32, bfloat16]
    assert prevailing_model([], pair, served) == prevailing_model([], pair[::-1], served), "whoever reports first"

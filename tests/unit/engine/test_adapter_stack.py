"""Deltas of stacked adapters against real PEFT layers, bit for bit, and slots that never mix two adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from alora_serve.adapters.lora import LoadedAdapter, LoraPair
from alora_serve.engine import adapter_stack
from alora_serve.engine.adapter_stack import AdapterStack, shape_of
from alora_serve.engine.lora_rows import LoraRows
from alora_serve.model.padding import pad_rows
from alora_serve.model.projections import Projection
from alora_serve.types import AdapterDigest, AdapterInfo

torch.set_num_threads(1)
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
ROWS = 64


def a_pair(seed: int = 3, scaling: float = 3.0 / 7.0) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator)
    return LoraPair(a=a, b=b, scaling=scaling)


def an_adapter(name: str, pairs: dict[str, LoraPair], digest: str = "") -> LoadedAdapter:
    info = AdapterInfo(name, AdapterDigest(digest or name * 64), "alora", 4, (), (1,), "", 0, resident=True)
    return LoadedAdapter(info, pairs)


def a_projection(*names: str) -> Projection:
    return Projection(names, [nn.Linear(32, 48, bias=False) for _ in names], "plain")


def rows_of(dtype: torch.dtype, rows: int = ROWS, columns: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(rows, size, generator=generator).to(dtype) for size in (32, columns))  # type: ignore[return-value]


def peft_layer(pair: LoraPair, output: Tensor, *, alora: bool) -> LoraLayer:
    """A real PEFT layer of ``pair`` over a base module that answers ``output``, whatever its input."""

    class Answer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return output.clone()

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Answer(pair.a.shape[1], pair.b.shape[0], bias=False, dtype=output.dtype)

    config = peft.LoraConfig(target_modules=["proj"], r=4, alora_invocation_tokens=[1] if alora else None)
    layer = peft.inject_adapter_in_model(config, Host()).proj
    layer.lora_A["default"].weight = nn.Parameter(pair.a)
    layer.lora_B["default"].weight = nn.Parameter(pair.b)
    layer.scaling["default"] = pair.scaling
    return layer.eval()


def adapted(x: Tensor, output: Tensor, pair: LoraPair, rows: Sequence[int]) -> Tensor:
    projection = a_projection("proj")
    adapter = an_adapter("a", {"proj": pair})
    stack = AdapterStack(shape_of(adapter), [projection], 4, CPU)
    (slot,) = stack.place([adapter])
    out = output.clone()
    stack.add_deltas(projection, pad_rows([(slot, rows)], CPU), x, out)
    return out


@pytest.mark.parametrize("scaling", [3.0 / 7.0, 2.0, 0.25, -1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_and_activated_lora_round_alike_and_so_do_we(dtype: torch.dtype, scaling: float) -> None:
    (x, output), pair = rows_of(dtype), a_pair(scaling=scaling)
    with torch.no_grad():
        plain = peft_layer(pair, output, alora=False)(x)
        activated = peft_layer(pair, output.unsqueeze(0), alora=True)(x.unsqueeze(0), alora_offsets=[ROWS])[0]
    ours = adapted(x, output, pair, range(ROWS))
    assert plain.dtype == activated.dtype == ours.dtype == dtype
    assert torch.equal(plain, activated)
    assert torch.equal(ours, plain)


def delta_rounded_before_adding(x: Tensor, output: Tensor, pair: LoraPair) -> Tensor:
    return output + (linear(linear(x.float(), pair.a), pair.b) * pair.scaling).to(output.dtype)


def delta_in_the_base_dtype(x: Tensor, output: Tensor, pair: LoraPair) -> Tensor:
    return output + linear(linear(x, pair.a.to(x.dtype)), pair.b.to(x.dtype)) * pair.scaling


def scaling_before_b(x: Tensor, output: Tensor, pair: LoraPair) -> Tensor:
    return output + linear(linear(x, pair.a) * pair.scaling, pair.b)


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (delta_rounded_before_adding, torch.bfloat16),
        (delta_in_the_base_dtype, torch.bfloat16),
        (scaling_before_b, torch.float32),
    ],
)
def test_other_roundings_differ_from_peft(wrong: Callable[..., Tensor], dtype: torch.dtype) -> None:
    (x, output), pair = rows_of(dtype), a_pair()
    right = adapted(x, output, pair, range(ROWS))
    assert not torch.equal(wrong(x, output, pair), right), "then this simpler rounding would do"


@pytest.mark.parametrize("rows", [range(10, 20), [3, 9, 40, 41]], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_rows_keep_their_base_output(rows: Sequence[int], dtype: torch.dtype) -> None:
    (x, output), pair = rows_of(dtype), a_pair()
    whole, some = adapted(x, output, pair, range(ROWS)), adapted(x, output, pair, rows)
    others = [row for row in range(ROWS) if row not in rows]
    assert torch.equal(some[others], output[others])
    assert torch.allclose(
        some[list(rows)].float(), whole[list(rows)].float(), rtol=1e-5 if dtype == DTYPES[0] else 1e-2
    )
    assert not torch.equal(some[list(rows)], output[list(rows)])


def test_modules_of_one_projection_get_their_own_columns() -> None:
    projection = a_projection("q", "k", "v")
    pairs = {"q": a_pair(1), "v": a_pair(2)}
    adapter = an_adapter("a", pairs)
    stack = AdapterStack(shape_of(adapter), [projection], 4, CPU)
    x, output = rows_of(torch.float32, columns=3 * 48)
    out = output.clone()
    stack.add_deltas(projection, pad_rows([(stack.place([adapter])[0], range(ROWS))], CPU), x, out)
    for name, columns in zip(projection.names, projection.columns, strict=True):
        expected = adapted(x, output[:, columns], pairs[name], range(ROWS)) if name in pairs else output[:, columns]
        assert torch.allclose(out[:, columns], expected, atol=1e-5)


def test_projections_without_adapted_modules_are_left_alone() -> None:
    adapter = an_adapter("a", {"q": a_pair()})
    both = [a_projection("q"), a_projection("other")]
    assert list(AdapterStack(shape_of(adapter), both, 4, CPU).projections) == both[:1]


NAMES = "abcdefg"


@given(
    steps=st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True), min_size=1, max_size=12),
    first_slots=st.sampled_from([None, 1]),
)
def test_whatever_came_before_every_adapter_of_a_step_adds_its_own_delta(
    steps: list[list[str]], first_slots: int | None
) -> None:
    """Slots are fewer than adapters: they are taken over, grown and found again, and never mixed up."""
    adapters = {name: an_adapter(name, {"proj": a_pair(index)}) for index, name in enumerate(NAMES)}
    projection = a_projection("proj")
    stack = AdapterStack(shape_of(adapters["a"]), [projection], 3, CPU, first_slots)
    x, output = rows_of(torch.float32, rows=3)
    for names in steps:
        slots = stack.place([adapters[name] for name in names])
        assert len(set(slots)) == len(names)
        assert max(slots) < 3
        out = output[: len(names)].clone()
        rows = sorted((slot, [row]) for row, slot in enumerate(slots))
        stack.add_deltas(projection, pad_rows(rows, CPU), x, out)
        for row, name in enumerate(names):
            expected = adapted(x, output, adapters[name].pairs["proj"], [row])[row]
            assert torch.allclose(out[row], expected, atol=1e-5)


@pytest.mark.parametrize(("first_slots", "copies"), [(None, 0), (1, 3)])
def test_on_a_processor_no_adapter_is_moved_to_make_room_for_another(first_slots: int | None, copies: int) -> None:
    """Copying all of them would hold up a step. Where memory is not free for the taking, room doubles: 1, 2, 4, 7."""
    adapters = [an_adapter(name, {"proj": a_pair(index)}) for index, name in enumerate(NAMES)]
    projection = a_projection("proj")
    stack = AdapterStack(shape_of(adapters[0]), [projection], len(adapters), CPU, first_slots)
    held = []  # so that no address comes again
    for adapter in adapters:
        stack.place([adapter])
        held.append(stack._stacked[projection].a)
    assert len({a.data_ptr() for a in held}) == 1 + copies


def test_an_adapter_of_equal_digest_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    copy = AdapterStack._copy
    monkeypatch.setattr(AdapterStack, "_copy", lambda *args: (copied.append(args[1].info.name), copy(*args)))
    adapters = [an_adapter(name, {"proj": a_pair(index)}) for index, name in enumerate("ab")]
    stack = AdapterStack(shape_of(adapters[0]), [a_projection("proj")], 4, CPU)
    for _ in range(3):
        stack.place(adapters)
    assert copied == ["a", "b"]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(("product_seconds", "products"), [(1.0, 2), (0.0, 8)], ids=["small", "large"])
def test_slots_with_gaps_run_together_where_reading_what_lies_between_is_sooner_done_than_a_call(
    monkeypatch: pytest.MonkeyPatch, product_seconds: float, products: int, width: int
) -> None:
    monkeypatch.setattr(adapter_stack, "PRODUCT_SECONDS", product_seconds)
    projection, adapters = a_projection("proj"), [an_adapter(n, {"proj": a_pair(i)}) for i, n in enumerate(NAMES)]
    rows = LoraRows([projection], len(NAMES), CPU)
    rows.set_rows([(adapter, slice(row, row + 1)) for row, adapter in enumerate(adapters)])
    rows.clear()
    x, output = rows_of(torch.float32, rows=4 * width)
    out, calls = output.clone(), []
    multiply = adapter_stack._products
    monkeypatch.setattr(adapter_stack, "_products", lambda *of: calls.append(of) or multiply(*of))
    # The last first: rows do not stand in the order of slots.
    chosen = [(adapter, slice(i * width, (i + 1) * width)) for i, adapter in enumerate(reversed(adapters[::2]))]
    rows.set_rows(chosen)
    assert projection.adapt is not None
    projection.adapt(x, out)
    assert len(calls) == products
    for adapter, where in chosen:
        expected = adapted(x, output, adapter.pairs["proj"], range(where.start, where.stop))[where]
        assert torch.allclose(out[where], expected, atol=1e-5)


def test_one_adapter_under_two_names_is_on_for_the_rows_of_both() -> None:
    """Names differ, weights and slot do not: each row gets its delta once, and its own."""
    projection, pair = a_projection("proj"), a_pair()
    adapters = [an_adapter(name, {"proj": pair}, digest="d" * 64) for name in ("one", "other")]
    between = an_adapter("b", {"proj": a_pair(7)})
    rows = LoraRows([projection], 4, CPU)
    x, output = rows_of(torch.float32, rows=4)
    out = output.clone()
    chosen = [(adapters[0], slice(0, 1)), (between, slice(1, 2)), (adapters[1], slice(2, 4))]
    rows.set_rows(chosen)
    assert projection.adapt is not None
    projection.adapt(x, out)
    for adapter, where in chosen:
        expected = adapted(x, output, adapter.pairs["proj"], range(where.start, where.stop))[where]
        assert torch.allclose(out[where], expected, atol=1e-5)


def test_what_a_failed_step_made_of_the_slots_is_not_taken_for_the_step_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    projection, (first, second) = a_projection("proj"), [an_adapter(n, {"proj": a_pair(i)}) for i, n in enumerate("ab")]
    rows = LoraRows([projection], 1, CPU)
    rows.set_rows([(first, slice(0, 1))])
    rows.clear()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("alora_serve.engine.lora_rows.pad_rows", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            rows.set_rows([(second, slice(0, 1))])
    x, output = rows_of(torch.float32, rows=1)
    out = output.clone()
    rows.set_rows([(first, slice(0, 1))])
    assert projection.adapt is not None
    projection.adapt(x, out)
    assert torch.allclose(out, adapted(x, output, first.pairs["proj"], [0]), atol=1e-5)


@pytest.mark.parametrize("threads", [1, 64])
def test_no_product_reads_more_for_nobody_than_it_would_take_to_call_another(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """However many cores there are: products so small run on one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    adapter = an_adapter("a", {"proj": LoraPair(torch.randn(64, 2048), torch.randn(2048, 64), 1.0)})
    projection = Projection(["proj"], [nn.Linear(2048, 2048, bias=False)], "plain")
    stack = AdapterStack(shape_of(adapter), [projection], 4, CPU)
    # A megabyte a slot: 87 us of a core's reading, against 16 us for two products.
    assert not stack.passes_over(1, 1)
    small = an_adapter("b", {"proj": a_pair()})
    stack = AdapterStack(shape_of(small), [a_projection("proj")], 4, CPU)
    # 1.3 kilobytes a slot: 0.1 us.
    assert stack.passes_over(10, 1)
    assert not stack.passes_over(10, 1000)


def test_rank_and_scaling_tell_stacks_apart() -> None:
    pair = a_pair()
    wider = LoraPair(torch.randn(8, 32), torch.randn(48, 8), pair.scaling)
    stronger = LoraPair(pair.a, pair.b, 2.0)
    shapes = {shape_of(an_adapter("a", pairs)) for pairs in ({"q": pair}, {"q": wider}, {"q": stronger}, {"k": pair})}
    assert len(shapes) == 4


def test_copies_of_adapters_of_many_shapes_do_not_add_up() -> None:
    rows = LoraRows([a_projection("proj")], 3, CPU)
    for rank in range(1, 12):
        pair = LoraPair(torch.randn(rank, 32), torch.randn(48, rank), 1.0)
        rows.set_rows([(an_adapter(chr(96 + rank), {"proj": pair}), slice(0, 1))])
        rows.clear()
        assert sum(map(len, rows._stacks.values())) == min(rank, 3)

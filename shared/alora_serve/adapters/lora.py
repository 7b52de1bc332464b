"""An adapter in memory, and the delta it adds to a linear module's output, rounded as PEFT rounds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from alora_serve.types import AdapterDigest, AdapterInfo, TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """The adaptation of one linear module: ``y + scaling * B(A(x))``.

    Attributes:
        a: ``[rank, in_features]`` float32.
        b: ``[out_features, rank]`` float32.
        scaling: applied after B.
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter in memory. Immutable and shared: whoever holds it may go on using it after it left the registry.

    Attributes:
        info: as listed.
        pairs: by full module name, as in ``module_shapes``.
    """

    info: AdapterInfo
    pairs: Mapping[str, LoraPair]

    @property
    def invocation_tokens(self) -> TokenIds:
        """Empty for plain LoRA."""
        return self.info.invocation_tokens

    @property
    def digest(self) -> AdapterDigest:
        """The adapter's identity."""
        return self.info.digest

    @property
    def size_bytes(self) -> int:
        """Memory that ``pairs`` takes."""
        return self.info.size_bytes


def lora_delta(x: Tensor, pair: LoraPair) -> Tensor:
    """``scaling * B(A(x))`` in float32, for ``x`` ``[rows, in_features]`` of any float dtype: ``[rows, out_features]``.

    As PEFT: the input is cast up to float32, and the scaling multiplies B's output (not A's, nor the weights), which
    rounds differently.
    """
    return linear(linear(x.to(pair.a.dtype), pair.a), pair.b) * pair.scaling


def add_delta_(output_rows: Tensor, x_rows: Tensor, pair: LoraPair) -> None:
    """Add the delta of ``x_rows`` ``[rows, in_features]`` to ``output_rows`` ``[rows, out_features]``, in place.

    Bit-equal to both of PEFT's ways. Plain LoRA adds out of place in float32 and casts the sum back; aLoRA adds in
    place into the base dtype, where torch also computes the sum in float32 and rounds it once. Casting the delta to
    bfloat16 before adding would round twice. ``output_rows`` must be a view of the result (a slice): indexing by a list
    of rows makes a copy, and the delta would be lost.
    """
    output_rows += lora_delta(x_rows, pair)

"""An adapter in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

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
        lead_tokens: belong before the invocation, with base weights; empty but for IBM's old format.
    """

    info: AdapterInfo
    pairs: Mapping[str, LoraPair]
    lead_tokens: TokenIds = ()

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

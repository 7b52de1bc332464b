"""The shape of one token's KV, and how a block of tokens is cut into stored parts."""

from __future__ import annotations

from dataclasses import dataclass

PART_BYTES = 1 << 20
"""Largest stored value we aim for: Redis is fastest at 1 to 4 MiB and falls off a cliff at 8."""
MIN_BLOCK_TOKENS = 16
MAX_BLOCK_TOKENS = 256

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number, by dtype."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the keys and values a model keeps: ``[layers, 2 (key, value), kv_heads, tokens, head_dim]``.

    Attributes:
        dtype: name of the torch dtype, ``float32``, ``bfloat16`` or ``float16``.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {sorted(ITEM_BYTES)}")

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return self.layers * self.bytes_per_layer_token

    @property
    def bytes_per_layer_token(self) -> int:
        """KV bytes of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    def default_block_tokens(self) -> int:
        """Largest power of two of tokens whose KV fits one stored part, within 16 to 256.

        A model whose 16 tokens exceed a part keeps blocks of 16 tokens and cuts each into groups of layers.
        """
        fit = max(1, PART_BYTES // self.bytes_per_token)
        power = 1 << (fit.bit_length() - 1)
        return min(MAX_BLOCK_TOKENS, max(MIN_BLOCK_TOKENS, power))

    def layer_groups(self, block_tokens: int) -> tuple[range, ...]:
        """Ranges of layers, one a stored part, each at most :data:`PART_BYTES` for a full block where one layer allows.

        The cut depends on the full block alone, so that a partial tail has the same parts.
        """
        layers_a_part = max(1, min(self.layers, PART_BYTES // (block_tokens * self.bytes_per_layer_token)))
        starts = range(0, self.layers, layers_a_part)
        return tuple(range(start, min(start + layers_a_part, self.layers)) for start in starts)

    def largest_part_bytes(self, block_tokens: int) -> int:
        """KV of the largest stored part of a block."""
        layers = max(map(len, self.layer_groups(block_tokens)))
        return layers * block_tokens * self.bytes_per_layer_token

    def canonical(self) -> str:
        """One line that names this layout in the key root. A change in what it says is a change of schema."""
        return f"layers={self.layers};order=layer,kv,head,token,dim;kv_heads={self.kv_heads};head_dim={self.head_dim}"

"""transformers' attention interface, answered from a packed row (``model/packed_row.py``)."""

from __future__ import annotations

from torch import Tensor, nn

from alora_serve.errors import ModelUnsupportedError
from alora_serve.model.packed_row import PackedRow, ScoreRules
from alora_serve.model.step import Step


class PackedAttention:
    """The attention function registered with transformers for one model.

    ``begin(step)`` before the model's forward, ``end()`` after; one thread. transformers calls :meth:`__call__` once a
    layer with the whole packed row.

    Attributes:
        windows_seen: the window each layer was called with in the last pass; the loader checks it against the config.
    """

    def __init__(self) -> None:
        self._step: Step | None = None
        self.windows_seen: dict[int, int | None] = {}

    def begin(self, step: Step) -> None:
        """Set the plan for the forward pass that follows."""
        self._step = step
        self.windows_seen.clear()

    def end(self) -> None:
        """Forget the plan."""
        self._step = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """Write the row's KV to its destinations and attend.

        Args:
            query: ``[1, heads, rows, head_dim]``, rotated.
            key: ``[1, kv_heads, rows, head_dim]``, rotated.
            value: ``[1, kv_heads, rows, head_dim]``.

        Returns:
            ``[1, rows, heads, head_dim]`` in the query's dtype, and no weights.

        Raises:
            ModelUnsupportedError: the model passes an argument that changes attention in a way not served.
        """
        step = self._step
        if step is None:
            raise RuntimeError("attention called outside a step")
        refused = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
        # Attention in both directions would depend on tokens that are not there yet.
        causal = others.get("is_causal")
        both_ways = not (getattr(module, "is_causal", True) if causal is None else causal)
        found = {"attention_mask": attention_mask is not None, "dropout": bool(dropout), "is_causal=False": both_ways}
        refused += [name for name, given in found.items() if given]
        if refused:
            raise ModelUnsupportedError(
                f"{type(module).__name__} passes {', '.join(refused)} to attention, which this engine does not serve"
            )
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.windows_seen[layer] = sliding_window
        kv_heads = key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        row = PackedRow(
            step,
            layer,
            query[0].transpose(0, 1).reshape(query.shape[2], kv_heads, -1, query.shape[3]),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            ScoreRules(scale, softcap, sliding_window),
        )
        return row.attend().flatten(1, 2).unsqueeze(0), None


_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_router_logits", "is_causal", "cache_position"}
)
"""Keyword arguments transformers hands to every attention function and that do not change the result here."""

"""Names the blocks of a deployment's conversations."""

from __future__ import annotations

from collections.abc import Sequence

from alora_serve.kv.keys import BlockChain, BlockHash


class BlockNames:
    """Names under one root.

    Args:
        root: parent of every first block.
        block_tokens: tokens a full block.
        public_prompts: beginnings of conversations that tenants share; see ``public_tokens`` of :class:`BlockChain`.
    """

    def __init__(self, root: BlockHash, block_tokens: int, public_prompts: Sequence[Sequence[int]] = ()) -> None:
        self._root = root
        self._block_tokens = block_tokens
        self._public_prompts = sorted({tuple(prompt) for prompt in public_prompts}, key=len, reverse=True)

    def chain(self, tokens: Sequence[int], tenant_salt: bytes = b"") -> BlockChain:
        """Block names of a token sequence, for a tenant or without one."""
        public = self._public_tokens(tuple(tokens)) if tenant_salt else 0
        return BlockChain(self._root, tokens, self._block_tokens, tenant_salt=tenant_salt, public_tokens=public)

    def _public_tokens(self, tokens: tuple[int, ...]) -> int:
        return next((len(prompt) for prompt in self._public_prompts if tokens[: len(prompt)] == prompt), 0)

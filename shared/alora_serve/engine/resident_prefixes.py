"""What a service tells routers about the prefixes in its memory: a bounded digest, never a guess.

Requests say which prefixes they use; the cache says, at the moment of telling, which of those it holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Set

from alora_serve.kv.fingerprints import MAX_FINGERPRINTS, STRIDE_TOKENS, PrefixFingerprints
from alora_serve.kv.keys import BlockChain, BlockHash
from alora_serve.types import PrefixDigest

ResidentNames = Callable[[Collection[BlockHash]], Set[BlockHash]]
"""Which of some blocks are in memory now. Answers at once."""


class ResidentPrefixes:
    """Fingerprints of recently used prefixes, each kept under the last full block it covers. One event loop.

    Args:
        resident: which blocks the cache holds.
        fingerprints: names prefixes.
        model_digest: of the base model.
        capacity: fingerprints kept and told at most.
    """

    def __init__(
        self,
        resident: ResidentNames,
        fingerprints: PrefixFingerprints,
        model_digest: bytes,
        *,
        capacity: int = MAX_FINGERPRINTS,
    ) -> None:
        self._resident = resident
        self._fingerprints = fingerprints
        self._model_digest = model_digest
        self._capacity = capacity
        # By length and the block that tells of it; least recently used first.
        self._used: OrderedDict[tuple[int, BlockHash], int] = OrderedDict()

    def note(self, chain: BlockChain) -> None:
        """A request uses the prefix of this chain; call when its KV has come into memory."""
        if not chain.full:
            return
        # A length inside a block is told by the block before it: at most one block is then fetched after all.
        lengths = range(STRIDE_TOKENS, len(chain) + 1, STRIDE_TOKENS)
        names = [(length, chain.full[max(0, length // chain.block_tokens - 1)]) for length in lengths]
        if any(name not in self._used for name in names):
            found = self._fingerprints.of(chain.tokens, model_digest=self._model_digest, tenant_salt=chain.tenant_salt)
            self._used.update(zip(names, found, strict=True))
        # Deepest first, so that the shortest is forgotten last: a prefix is of no use without its beginning.
        for name in reversed(names):
            self._used.move_to_end(name)
        while len(self._used) > self._capacity:
            self._used.popitem(last=False)

    def digest(self) -> PrefixDigest:
        """What of it is in memory now. What is not any more is forgotten."""
        resident = self._resident({block for _, block in self._used})
        for name in [name for name in self._used if name[1] not in resident]:
            del self._used[name]
        return PrefixDigest(STRIDE_TOKENS, frozenset(self._used.values()))

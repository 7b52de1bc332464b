"""Names of KV blocks: what must be equal for two runs' KV to be interchangeable, hashed, and nothing else.

A block's name is a chain: ``root -> block 0 -> block 1 ...``, each link ``SHA-256(parent, token ids)``. No Python
``hash()``, no process seed, no adapter, no model *name*: base KV is base KV whoever asks for it.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NewType

from alora_serve.kv.store import StoreKey

KEY_SCHEMA_VERSION = 5

BlockHash = NewType("BlockHash", bytes)
"""32 bytes naming the KV of all tokens up to a block's end. Not the key of a stored part: see :func:`part_key`."""


@dataclass(frozen=True, slots=True)
class RootFields:
    """Everything outside the tokens that decides a KV value bit for bit.

    Attributes:
        weights_digest: SHA-256 of the base model's weights.
        forward_config_digest: SHA-256 of every config field that affects the forward pass.
        compute_dtype: torch dtype name of the forward pass.
        weight_quantization: ``none`` or the scheme.
        weight_layout: ``plain``, ``packed`` or ``half``: which kernels multiply by the weights, and so how products
            round.
        device_type: ``cpu`` or ``cuda``: likewise.
        kv_dtype: torch dtype name of stored KV.
        kv_layout: :meth:`alora_serve.kv.layout.KVLayout.canonical`.
        block_tokens: tokens a block.
        store_protection: ``none``, ``mac`` or ``encrypt``: what is done to the values under these names.
        deployment_salt: keeps deployments on one store apart; a secret of the server. Tenants: see :class:`BlockChain`.
    """

    weights_digest: bytes
    forward_config_digest: bytes
    compute_dtype: str
    weight_quantization: str
    weight_layout: str
    device_type: str
    kv_dtype: str
    kv_layout: str
    block_tokens: int
    store_protection: str
    deployment_salt: bytes


def digest_fields(domain: str, *named: tuple[str, bytes | str | int]) -> bytes:
    """SHA-256 over named, typed, length-prefixed fields: no two different inputs share an encoding."""
    hasher = hashlib.sha256()
    for part in _encode("domain", domain), *(_encode(name, value) for name, value in named):
        hasher.update(part)
    return hasher.digest()


def _encode(name: str, value: bytes | str | int) -> bytes:
    if isinstance(value, bytes):
        tag, raw = b"b", value
    else:
        tag, raw = (b"s" if isinstance(value, str) else b"i"), str(value).encode()
    encoded_name = name.encode()
    return b"".join((len(encoded_name).to_bytes(4, "little"), encoded_name, tag, len(raw).to_bytes(8, "little"), raw))


def root_hash(root: RootFields) -> BlockHash:
    """Parent of every first block under these fields."""
    named = [(item.name, getattr(root, item.name)) for item in fields(root)]
    return BlockHash(digest_fields("alora-serve root", ("schema", KEY_SCHEMA_VERSION), *named))


def storage_digest(root: RootFields) -> bytes:
    """Digest of the root without what the *model* digest covers: tells routers and handles which pools share blocks."""
    shared = {"weights_digest", "forward_config_digest"}
    named = [(item.name, getattr(root, item.name)) for item in fields(root) if item.name not in shared]
    return digest_fields("alora-serve storage", ("schema", KEY_SCHEMA_VERSION), *named)


def _token_bytes(tokens: Sequence[int]) -> bytes:
    packed = array("I", tokens)
    if packed.itemsize != 4:  # pragma: no cover - every supported platform has 4-byte unsigned int
        packed = array("L", tokens)
    if sys.byteorder == "big":  # pragma: no cover
        packed.byteswap()
    return packed.tobytes()


def block_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Name of the block holding ``tokens`` after ``parent``. A partial tail has fewer tokens and so another name."""
    raw = _token_bytes(tokens)
    return BlockHash(hashlib.sha256(b"".join((parent, len(raw).to_bytes(8, "little"), raw))).digest())


def part_key(block: BlockHash, part: int) -> StoreKey:
    """Key under which one group of layers of a block is stored."""
    return StoreKey(hashlib.sha256(b"".join((b"part", part.to_bytes(4, "little"), block))).digest())


class BlockChain:
    """The block names of one token sequence under one root, for one tenant.

    Full blocks chain from full blocks only; a partial tail is a leaf. Hashing 32k tokens takes about 1 ms.

    A tenant's salt enters the chain before the first block that is not wholly public, and with it is in every name from
    there on: what others store there has other names, whatever its tokens.

    Args:
        root: parent of the first block.
        tokens: the sequence.
        block_tokens: tokens a full block.
        tenant_salt: see :class:`alora_serve.kv.tenancy.TenantSalts`; empty: no tenant.
        public_tokens: the first so many tokens are no secret of the tenant's: a system prompt that the operator shares.

    Attributes:
        tokens: the sequence.
        block_tokens: tokens a full block.
        tenant_salt: as given.
        full: names of its full blocks, in order.
    """

    __slots__ = ("_private_from", "_root", "block_tokens", "full", "tenant_salt", "tokens")

    def __init__(
        self,
        root: BlockHash,
        tokens: Sequence[int],
        block_tokens: int,
        *,
        tenant_salt: bytes = b"",
        public_tokens: int = 0,
    ) -> None:
        self._root = root
        self.tokens = tuple(tokens)
        self.block_tokens = block_tokens
        self.tenant_salt = tenant_salt
        self._private_from = public_tokens // block_tokens
        self.full: list[BlockHash] = []
        self._hash_full()

    def _hash_full(self) -> None:
        """Name the full blocks that have no name yet."""
        size = self.block_tokens
        for index in range(len(self.full), len(self.tokens) // size):
            self.full.append(block_hash(self._parent(index), self.tokens[index * size : (index + 1) * size]))

    def _parent(self, block: int) -> BlockHash:
        before = self.full[block - 1] if block else self._root
        if not self.tenant_salt or block != self._private_from:
            return before
        return BlockHash(hashlib.sha256(b"".join((b"tenant", self.tenant_salt, before))).digest())

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def tail_tokens(self) -> int:
        """Tokens after the last full block."""
        return len(self.tokens) % self.block_tokens

    def tail(self, block: int, count: int) -> BlockHash:
        """Name of the partial tail of ``count`` tokens (1 to ``block_tokens - 1``) that starts where ``block`` does."""
        if not 1 <= count < self.block_tokens:
            raise ValueError(f"a tail has 1 to {self.block_tokens - 1} tokens, not {count}")
        start = block * self.block_tokens
        if start + count > len(self.tokens):
            raise ValueError(f"a tail that ends at {start + count} reaches beyond the {len(self.tokens)} tokens")
        return block_hash(self._parent(block), self.tokens[start : start + count])

    def name_of(self, end: int) -> BlockHash:
        """Name of the block, full or tail, whose last token is ``end - 1``."""
        block, count = divmod(end, self.block_tokens)
        return self.tail(block, count) if count else self.full[block - 1]

    def common_tokens(self, other: BlockChain) -> int:
        """Positions, from 0 on, whose KV both may read: equal tokens under equal names."""
        blocks = bisect_left(
            range(min(len(self.full), len(other.full))), True, key=lambda block: self.full[block] != other.full[block]
        )
        start = blocks * self.block_tokens
        end = min(start + self.block_tokens - 1, len(self), len(other))
        count = 0
        while start + count < end and self.tokens[start + count] == other.tokens[start + count]:
            count += 1
        return start + (count if count and self.tail(blocks, count) == other.tail(blocks, count) else 0)

    def extended(self, tokens: Sequence[int]) -> BlockChain:
        """The chain of this sequence followed by ``tokens``; hashes only what is new."""
        return self._with(self.tokens + tuple(tokens), self.full)

    def first(self, count: int) -> BlockChain:
        """The chain of the first ``count`` tokens; hashes nothing."""
        return self._with(self.tokens[:count], self.full[: count // self.block_tokens])

    def _with(self, tokens: tuple[int, ...], full: Sequence[BlockHash]) -> BlockChain:
        other = BlockChain.__new__(BlockChain)
        other._root, other._private_from = self._root, self._private_from
        other.tokens, other.block_tokens, other.tenant_salt = tokens, self.block_tokens, self.tenant_salt
        other.full = list(full)
        other._hash_full()
        return other

"""Names of KV blocks: what must be equal for two runs' KV to be interchangeable, hashed, and nothing else.

A block's name is a chain: ``root -> block 0 -> block 1 ...``, each link ``SHA-256(parent, token ids)``. No Python
``hash()``, no process seed, no adapter, no model *name*: base KV is base KV whoever asks for it.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NewType

from alora_serve.kv.store import StoreKey

KEY_SCHEMA_VERSION = 3

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
        tenant_salt: keeps tenants apart; from the server, never from a client.
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
    tenant_salt: bytes


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
    """The block names of one token sequence under one root.

    Full blocks chain from full blocks only; a partial tail is a leaf. Hashing 32k tokens takes about 1 ms.

    Attributes:
        tokens: the sequence.
        block_tokens: tokens a full block.
        full: names of its full blocks, in order.
    """

    __slots__ = ("_root", "block_tokens", "full", "tokens")

    def __init__(self, root: BlockHash, tokens: Sequence[int], block_tokens: int) -> None:
        self._root = root
        self.tokens = tuple(tokens)
        self.block_tokens = block_tokens
        self.full: list[BlockHash] = []
        parent = root
        for start in range(0, len(self.tokens) - block_tokens + 1, block_tokens):
            parent = block_hash(parent, self.tokens[start : start + block_tokens])
            self.full.append(parent)

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
        parent = self.full[block - 1] if block else self._root
        start = block * self.block_tokens
        if start + count > len(self.tokens):
            raise ValueError(f"a tail that ends at {start + count} reaches beyond the {len(self.tokens)} tokens")
        return block_hash(parent, self.tokens[start : start + count])

    def name_of(self, end: int) -> BlockHash:
        """Name of the block, full or tail, whose last token is ``end - 1``."""
        block, count = divmod(end, self.block_tokens)
        return self.tail(block, count) if count else self.full[block - 1]

    def extended(self, tokens: Sequence[int]) -> BlockChain:
        """The chain of this sequence followed by ``tokens``; hashes only what is new."""
        longer = BlockChain.__new__(BlockChain)
        longer._root = self._root
        longer.tokens = self.tokens + tuple(tokens)
        longer.block_tokens = self.block_tokens
        longer.full = list(self.full)
        parent = longer.full[-1] if longer.full else self._root
        done = len(longer.full) * self.block_tokens
        for start in range(done, len(longer.tokens) - self.block_tokens + 1, self.block_tokens):
            parent = block_hash(parent, longer.tokens[start : start + self.block_tokens])
            longer.full.append(parent)
        return longer

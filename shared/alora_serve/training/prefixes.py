"""Keeps the base model's KV of what comes before invocations: in memory up to a budget, on disk if given a directory.

Nothing there is adapted and no gradient flows through it, so one pass a text serves all epochs and seeds. What all
texts begin with (the template's system turn, say) is computed and kept once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alora_serve.training.encoding import common_beginning
from alora_serve.types import TokenIds

_log = structlog.get_logger(__name__)

BasePass = Callable[[TokenIds, "torch.Tensor | None"], torch.Tensor]
"""KV of tokens that follow those with the KV given, ``[layers, 2 (keys, values), kv_heads, tokens, head_dim]``."""

_NAME: Final = "kv"


class PrefixDisk(Protocol):
    """Where prefixes outlive the process. What cannot be read is a miss."""

    def get(self, key: str) -> torch.Tensor | None:
        """The KV, or None."""

    def put(self, key: str, kv: torch.Tensor) -> None:
        """Keep it."""


class PrefixDirectory:
    """One safetensors file a prefix. Several processes may share it: a file appears whole or not at all."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def get(self, key: str) -> torch.Tensor | None:
        """See :class:`PrefixDisk`."""
        path = self._path(key)
        try:
            return load_file(path)[_NAME]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            _log.warning("a kept prefix cannot be read and is computed again", path=str(path), error=str(error))
            return None

    def put(self, key: str, kv: torch.Tensor) -> None:
        """See :class:`PrefixDisk`."""
        path = self._path(key)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({_NAME: kv.cpu().contiguous()}, partial)
        partial.rename(path)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.safetensors"


@dataclass(frozen=True, slots=True)
class PrefixOptions:
    """How base KV is kept.

    Attributes:
        dtype: of what is kept. The base's own keeps training exact; bfloat16 halves the room float32 takes.
        budget_bytes: of memory; what is beyond is read from disk or computed each time.
        directory: outlives the process, for further seeds; None keeps nothing on disk.
        model_digest: names the base model and how it computes, inside ``directory``.
    """

    dtype: torch.dtype
    budget_bytes: int
    directory: Path | None = None
    model_digest: bytes = b""


class PrefixCache:
    """Base KV by tokens. All prefixes begin with :attr:`head`, which :meth:`rest` leaves out."""

    def __init__(self, base_pass: BasePass, prefixes: Sequence[TokenIds], options: PrefixOptions) -> None:
        """``prefixes`` are all that will be asked for; their common beginning is computed here."""
        self._pass = base_pass
        self._options = options
        self._budget_bytes = options.budget_bytes
        self._kept: dict[TokenIds, torch.Tensor] = {}
        self._disk = PrefixDirectory(options.directory) if options.directory else None
        # A prefix that is nothing but the head would leave no token to compute after it.
        shortest = min(map(len, prefixes), default=0)
        self._head_tokens: TokenIds = common_beginning(prefixes)[: max(0, shortest - 1)]
        self.head: torch.Tensor | None = self._computed(self._head_tokens, None) if self._head_tokens else None
        """KV of the common beginning ``[layers, 2, kv_heads, tokens, head_dim]``, None when there is none."""
        self.computed_tokens = len(self._head_tokens)
        """Tokens run through the base model so far."""

    @property
    def head_length(self) -> int:
        """Tokens of :attr:`head`."""
        return len(self._head_tokens)

    def rest(self, tokens: TokenIds) -> torch.Tensor:
        """KV of a prefix behind the head, ``[layers, 2, kv_heads, tokens, head_dim]`` in the dtype of the options."""
        if (kept := self._kept.get(tokens)) is not None:
            return kept
        key = self._key(tokens) if self._disk else ""
        kv = self._disk.get(key) if self._disk else None
        if kv is None:
            rest = tokens[self.head_length :]
            kv = self._computed(rest, self.head)
            self.computed_tokens += len(rest)
            if self._disk:
                self._disk.put(key, kv)
        if kv.nbytes <= self._budget_bytes:
            self._budget_bytes -= kv.nbytes
            self._kept[tokens] = kv
        return kv

    def _computed(self, tokens: TokenIds, after: torch.Tensor | None) -> torch.Tensor:
        return self._pass(tokens, after).to(self._options.dtype)

    def _key(self, tokens: TokenIds) -> str:
        digest = hashlib.sha256(self._options.model_digest)
        for part in (self._options.dtype, self.head_length, len(tokens), *tokens):
            digest.update(f"{part},".encode())
        return digest.hexdigest()

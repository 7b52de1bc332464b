"""The adapters a worker can serve, by name: listed at once, read when first needed, and again when files change."""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog

from alora_serve.adapters.catalog import CatalogEntry, scan
from alora_serve.adapters.files import DEFAULT_MAX_WEIGHTS_BYTES, AdapterFiles
from alora_serve.adapters.loading import AdapterHost, inspect_adapter, load_adapter
from alora_serve.adapters.residency import AdapterEvent, Lease, Residency
from alora_serve.errors import AdapterNotFoundError, AdapterRefusedError, IntrinsicUndefinedError
from alora_serve.intrinsics import FILE_NAME
from alora_serve.intrinsics.excerpts import excerpt
from alora_serve.types import AdapterDigest, AdapterInfo

_NEAREST_NAMES = 3

T = TypeVar("T")

_log = structlog.get_logger(__name__)


def _ignore(event: AdapterEvent) -> None:
    """Report to nobody."""


class AdapterRegistry:
    """The adapters of some roots on one base model. Thread-safe; one adapter's reading never delays another's use.

    Args:
        roots: directories whose subdirectories are adapters, named by folder.
        base: what adapters are checked against.
        max_resident_bytes: see :class:`~alora_serve.adapters.residency.Residency`.
        max_weights_bytes: larger weights files are refused.
        on_event: called on the thread that caused the event, for what is refused at once from here on; must not raise
            and may call nothing here but :meth:`list_adapters`, :meth:`resident` and :meth:`resident_bytes`.

    Raises:
        ConfigError: a root is not a readable directory.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        *,
        base: AdapterHost,
        max_resident_bytes: int,
        max_weights_bytes: int = DEFAULT_MAX_WEIGHTS_BYTES,
        on_event: Callable[[AdapterEvent], None] = _ignore,
    ) -> None:
        self._roots = tuple(roots)
        self._base = base
        self._max_weights_bytes = max_weights_bytes
        self._on_event = on_event
        self._residency = Residency(max_bytes=max_resident_bytes, on_event=on_event)
        self._refresh_lock = threading.Lock()
        self._entries: dict[str, CatalogEntry] = {}  # never changed, only replaced: readers need no lock
        self._refused: tuple[AdapterInfo, ...] = ()
        self._unknown: frozenset[Path] = frozenset()
        self.refresh()

    def list_adapters(self) -> tuple[AdapterInfo, ...]:
        """Every adapter, sorted by name; those that cannot be served with their ``problem``."""
        infos = [entry.info for entry in self._entries.values() if entry.info is not None]
        resident = self._residency.held()
        # Asked ten times a second for each router, of thousands of adapters: only those in memory are made anew.
        listed = [replace(info, resident=True) if (info.name, info.digest) in resident else info for info in infos]
        return tuple(sorted([*listed, *self._refused], key=lambda info: info.name))

    def resident(self) -> frozenset[tuple[str, AdapterDigest]]:
        """Name and digest of every adapter whose weights are in memory, older versions in use among them."""
        return self._residency.held()

    def resident_bytes(self) -> int:
        """Memory that all adapters take."""
        return self._residency.bytes_held()

    def refresh(self) -> None:
        """Look at the roots again: what is new or changed is inspected and listed, what is gone is dropped.

        What cannot be looked at keeps its place, and what of it is in memory; it is listed as refused meanwhile.

        Raises:
            ConfigError: a root is not a readable directory; the catalog stays as it was.
        """
        with self._refresh_lock:
            seen = scan(self._roots, {entry.directory for entry in self._entries.values()})
            for directory in seen.unknown.keys() - self._unknown:
                _log.warning("folder in an adapter root left out", folder=str(directory), error=seen.unknown[directory])
            entries = {}
            for name, (directory, root) in seen.found.items():
                known = self._entries.get(name)
                same = known is not None and known.directory == directory
                entry = known if known and same else CatalogEntry(name, directory, root, self._max_weights_bytes)
                with entry.lock:
                    self._inspect(entry)
                entries[name] = entry
            for info in seen.refused:
                if info not in self._refused:
                    self._on_event(AdapterEvent("refuse", info.name, problem=info.problem))
            self._entries, self._refused, self._unknown = entries, seen.refused, frozenset(seen.unknown)
        self._residency.retire(lambda name: name not in entries)

    def acquire(self, name: str, *, digest: AdapterDigest | None = None) -> Lease:
        """Hold the adapter of this name, reading it if it is not in memory or its files have changed. May take seconds.

        With ``digest``, for the resumption of a stream, exactly that version: from memory even when the files have
        changed since, and never another.

        Raises:
            AdapterNotFoundError: no such adapter; lists the nearest names.
            AdapterRefusedError: it cannot be served, or its digest is another.
            MemoryError: there is too little for its weights now, which is held against no adapter.
        """
        if digest is not None and (lease := self._residency.lease(name, digest)):
            return lease
        entry = self._entry(name)
        with entry.lock:
            lease = self._acquire_current(entry)
        if digest is not None and lease.adapter.digest != digest:
            lease.release()
            raise AdapterRefusedError(
                f"adapter {name!r} is now {lease.adapter.digest[:12]}, but the stream began with {digest[:12]}: "
                "its files have changed, so the same tokens cannot go on"
            )
        return lease

    def load(self, name: str) -> AdapterInfo:
        """Look at the roots, then bring the adapter into memory ahead of requests. Raises as those two do."""
        self.refresh()
        with self.acquire(name) as lease:
            return replace(lease.adapter.info, resident=True)

    def definition(self, name: str) -> bytes:
        """The adapter's ``io.yaml`` as it lies there now.

        Raises:
            AdapterNotFoundError: no such adapter; lists the nearest names.
            AdapterRefusedError: the adapter cannot be served, perhaps for this very file.
            IntrinsicUndefinedError: it has none.
        """
        entry = self._entry(name)
        with entry.lock:
            self._inspect(entry)
            if entry.info is not None and entry.info.problem:
                raise entry.refusal(entry.info.problem)
            raw = entry.read_definition()
        if raw is None:
            raise IntrinsicUndefinedError(f"adapter {name!r} has no {FILE_NAME}, so there is nothing to ask it")
        return raw

    def unload(self, name: str) -> bool:
        """Drop an adapter from memory, or with its last lease if it is in use; whether it was in memory.

        The next request reads it again.

        Raises:
            AdapterNotFoundError: no such adapter.
        """
        self._entry(name)
        return self._residency.retire(lambda other: other == name)

    def _entry(self, name: str) -> CatalogEntry:
        entry = self._entries.get(name)
        if entry is None or entry.is_gone():
            nearest = difflib.get_close_matches(name, self._entries.keys() - {name}, n=_NEAREST_NAMES)
            hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
            raise AdapterNotFoundError(
                f"no adapter is named {excerpt(name)}{hint}", metadata={"nearest": ",".join(nearest)}
            )
        return entry

    # --- with the entry's lock held -----------------------------------------------------------------------------------

    def _acquire_current(self, entry: CatalogEntry) -> Lease:
        if entry.info is not None and entry.is_current():
            if entry.info.problem:
                raise entry.refusal(entry.info.problem)
            if lease := self._residency.lease(entry.name, entry.info.digest):
                return lease
            self._residency.make_room(entry.info.size_bytes)
        began = time.monotonic()
        adapter = self._read(entry, lambda files: load_adapter(files, name=entry.name, base=self._base))
        entry.info = adapter.info
        lease = self._residency.insert(adapter)
        self._on_event(AdapterEvent("load", entry.name, time.monotonic() - began))
        return lease

    def _inspect(self, entry: CatalogEntry) -> None:
        if entry.is_settled():  # perhaps by a refusal that the weights brought, which are not looked at here
            return
        try:
            entry.info = self._read(entry, lambda files: inspect_adapter(files, name=entry.name, base=self._base))
        except AdapterRefusedError:
            return  # the entry keeps it as its problem, and it is listed

    def _read(self, entry: CatalogEntry, reader: Callable[[AdapterFiles], T]) -> T:
        """As :meth:`CatalogEntry.read`; a refusal is told, unless it is the one before, of the same files."""
        before = entry.refused
        try:
            return entry.read(reader)
        except AdapterRefusedError:
            if (refused := entry.refused) and refused != before:
                self._on_event(AdapterEvent("refuse", entry.name, problem=refused[0]))
            raise

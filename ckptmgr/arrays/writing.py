"""Arrays to disk: TensorStore transactions of many arrays, every chunk with its checksum.

The way back is `reading`.
An item's arrays are zarr3 in one OCDBT database, as Orbax reads them. Nothing here waits leaf by leaf:
a writer puts thousands into a transaction and commits once.

The checksums: each chunk carries zarr's `crc32c` codec; OCDBT's manifest and nodes carry their own
(https://google.github.io/tensorstore/kvstore/ocdbt/index.html); the small `zarr.json` of each array is
stored inside a node (`max_inline_value_bytes`), so that it is covered too.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import tensorstore as ts
from etils import epath

from ckptmgr.arrays import chunks, database, to_host, unchanged
from ckptmgr.arrays.chunks import Stored
from ckptmgr.arrays.to_host import Part, Plan
from ckptmgr.arrays.unchanged import Kept
from ckptmgr.format import paths
from ckptmgr.processes.background import Moment

PART = "ocdbt.process_"  # Orbax's name for what one of several processes wrote
_ENCODED_BYTES = 4 << 20  # 32 MiB is faster, and holds 1.8 x a step of 25 MB until the commit
_ENCODED_BYTES_IN_BUCKETS = 64 << 20  # a transaction is half a dozen requests, one after the other
_CONFIG = {
    "max_inline_value_bytes": 4096,  # larger than any zarr.json, so that each lies in a checksummed node
    "compression": None,  # so that `nodes` reads it; no leaf of a model has values among the nodes
}


class Snapshot:
    """The host copies of one item on their way to disk: all of them, or one wave of `max_bytes` after another."""

    def __init__(
        self,
        plan: Plan,
        leaves: Sequence[Any],
        max_bytes: int | None,
        *,
        is_own: bool = False,
        kept: Kept | None = None,
        look: Callable[[list[tuple[int, list[Part]]]], object] = lambda copied: None,
    ) -> None:
        self.plan = plan
        self.kept = kept
        """What is taken over from the step before, and not copied."""
        self.is_own = is_own
        """Whether each process may have its own: then it is copied in all."""
        self._look = look
        self._leaves = leaves
        self._left_out: frozenset[int] = frozenset()
        self._waves: list[Sequence[int]] = [*chunks.runs(plan.sizes, max_bytes)]
        if kept is not None and (left := kept.leaves):
            self._waves = [[place for place in wave if place not in left] for wave in self._waves]
        self.copied: list[tuple[int, list[Part]]] = []
        """The copies that wait to be written: the place of each leaf, and its parts."""
        self.complete = Moment()
        """Set once every leaf has been copied, or the save is over."""
        self.completed_at = 0.0
        """When it was, on the clock of `time.perf_counter`."""
        self._is_abandoned = False

    def twin(self) -> Snapshot:
        """The same copies for another writer; only once every leaf has been copied."""
        found = copy.copy(self)
        found.copied = [(place, [*parts]) for place, parts in self.copied]
        return found

    def start(self) -> None:
        """Starts the copies of the next wave; returns at once."""
        to_host.start_copies(self.plan, self._leaves, self._waves[0])

    def collect(self) -> None:
        """Waits for the copies of the next wave."""
        wave = self._waves.pop(0)
        parts = to_host.collect(self.plan, self._leaves, wave, is_own=self.is_own)
        if self._is_abandoned:
            raise InterruptedError("the call of save was interrupted before everything was copied")
        self.copied = self._without(list(zip(wave, parts, strict=True)))
        if not self._waves:
            self.release()

    def has_more(self) -> bool:
        return bool(self._waves)

    def abandon(self) -> None:
        """The call of `save` has ended: its caller may change what is not copied yet, which must not be saved."""
        self._is_abandoned = True

    def digest(self) -> str:
        """Equal for equal values."""
        found = hashlib.sha256()
        for _, parts in self.copied:
            for _, part in parts:
                found.update(part.tobytes())
        return found.hexdigest()[:32]

    def leave_out(self, places: Collection[int]) -> None:
        """Leaves that another process writes."""
        self._left_out = frozenset(places)
        self.copied = self._without(self.copied)

    def _without(self, copied: list[tuple[int, list[Part]]]) -> list[tuple[int, list[Part]]]:
        if not self._left_out:
            return copied
        return [(place, [] if place in self._left_out else parts) for place, parts in copied]

    def take(self) -> list[tuple[int, list[Part]]]:
        """The copies that wait to be written; the caller has them now."""
        copied, self.copied = self.copied, []
        self._look(copied)
        return copied

    def release(self) -> None:
        """Lets go of the leaves: the caller of `save` may do with them what it likes."""
        self._leaves = ()
        if not self.complete.is_set():
            self.completed_at = time.perf_counter()
        self.complete.set()


def own_part() -> str:
    """Where in an item this process writes its part; one that is alone writes the whole."""
    return f"{PART}{jax.process_index()}" if jax.process_count() > 1 else ""


def merge(directory: epath.Path, check: database.Check = lambda: None, place: epath.Path | None = None) -> None:
    """Makes one database of the parts that several processes wrote; it refers to their chunks and copies none.

    `place`: as for `write`.
    """
    parts = [entry for entry in directory.iterdir() if entry.name.startswith(PART)]
    if not parts:
        return
    transaction, context = ts.Transaction(atomic=True), ts.Context()
    spec = {**database.write_spec(directory), "config": _CONFIG}
    whole = ts.KvStore.open(spec, context=context).result().with_transaction(transaction)
    copies = [
        ts.KvStore.open(database.open_spec(part), context=context).result().experimental_copy_range_to(whole)
        for part in parts
    ]
    for each in copies:
        each.result()
    transaction.commit_async().result()
    database.publish(directory, context, check, place)


def write(
    directory: epath.Path,
    snapshot: Snapshot,
    compression: str | None,
    check: database.Check = lambda: None,
    place: epath.Path | None = None,
) -> None:
    """Writes this process's part of an item. Before others see it, `check` raises if it must not be written.

    `place`: a folder of this machine. What is written last into a bucket, and makes the arrays readable, is put
    there instead, for the caller to write.
    """
    context = ts.Context()
    write_wave(directory, snapshot, compression, context)
    while snapshot.has_more():  # only under max_host_bytes: what is written makes room for the next copies
        snapshot.collect()
        write_wave(directory, snapshot, compression, context)
    kept = snapshot.kept
    if kept is not None:
        spec = {**database.write_spec(directory), "config": _CONFIG}
        unchanged.take_over(directory, kept, snapshot.plan.prefixes, spec, context)
        if kept.apart:
            database.publish(directory / kept.name, context, check, place and place / kept.name)
    database.publish(directory, context, check, place)


def write_values(directory: epath.Path, values: Iterable[tuple[str, bytes]]) -> None:
    """Makes a database on this machine of keys and values of another one, as they lie there."""
    transaction = ts.Transaction(atomic=True)
    spec = {**database.write_spec(directory), "config": _CONFIG}
    store = ts.KvStore.open(spec).result().with_transaction(transaction)
    for key, data in values:
        store[key] = data
    transaction.commit_async().result()


def write_wave(directory: epath.Path, snapshot: Snapshot, compression: str | None, context: Any) -> None:
    """Writes what has been copied, and lets go of it."""
    plan, copied = snapshot.plan, snapshot.take()
    encoded = [_nbytes(parts) if plan.encoded_sizes[place] else 0 for place, parts in copied]  # until the commit
    most_bytes = _ENCODED_BYTES if paths.is_local(directory) else _ENCODED_BYTES_IN_BUCKETS
    for some in chunks.runs(encoded, most_bytes) if copied else ():
        for folder, each in unchanged.split(snapshot.kept, [copied[i] for i in some]):
            _write(directory / folder if folder else directory, plan, each, compression, context)


def _nbytes(parts: Sequence[Part]) -> int:
    """What this process writes of a leaf: in a large job that is little of it, and many leaves make one commit."""
    return parts[0][1].nbytes if len(parts) == 1 else sum(part.nbytes for _, part in parts)


def _write(
    directory: epath.Path,
    plan: Plan,
    copied: Sequence[tuple[int, list[Part]]],
    compression: str | None,
    context: Any,
) -> None:
    """Writes these leaves in one transaction."""
    transaction = ts.Transaction(atomic=True)
    spec = {**database.write_spec(directory), "config": _CONFIG}
    store = ts.KvStore.open(spec, context=context).result().with_transaction(transaction)
    with _ENCODING:
        for key, data in _encoded(plan, copied) if compression is None else ():
            store[key] = data
    opened = [
        (_create(store / plan.prefixes[place], plan.stored[place], compression, context), parts)
        for place, parts in copied
        if parts
    ]
    writing = [
        chunks.at(array.result(), index).write(part, can_reference_source_data_indefinitely=True)
        for array, parts in opened
        for index, part in parts
        if part.size
    ]
    for each in writing:
        each.copy.result()
    transaction.commit_async().result()


_ENCODING = threading.Lock()
"""Held by the item that is being encoded: threads that all run Python only take turns, at a price."""


def _encoded(plan: Plan, copied: Sequence[tuple[int, list[Part]]]) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of every array that is small enough to be encoded here; its copy is let go."""
    for place, parts in copied:
        head, prefix, cuts = plan.heads[place], plan.prefixes[place], plan.stored[place].chunks
        if head is not None and parts:
            yield f"{prefix}zarr.json", head
            for index, part in parts:
                for name, data in chunks.encoded(part, index, cuts):
                    yield prefix + name, data
            parts.clear()


def _create(store: Any, stored: Stored, compression: str | None, context: Any) -> Any:
    spec = {
        "driver": "zarr3",
        "metadata": chunks.metadata(stored, compression),
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(ts.Spec(spec), kvstore=store, create=True, open=True, context=context)

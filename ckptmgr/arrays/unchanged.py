"""Arrays that did not change since the step before: the new step has them, and they are not written again.

The files of a database are shared by hard links, or copied by the server of a bucket. The database of the new step
refers to the values in them. So each step is whole when another one is deleted. In the part of an item:

    manifest.ocdbt, d/        its database, in which all arrays of the part are found
    written.<step>/           the database that this earlier step wrote: some of its arrays are still the same
    unchanged.<step>/         the arrays that had not changed when this earlier step was saved; it wrote them apart

A database is kept while at least half of its bytes are used: so no step holds more than twice what it needs. Else
what is used of it is written anew, into a database of its own, which is then used whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorstore as ts
from etils import epath

from ckptmgr.arrays import database
from ckptmgr.format import files, linking, objects, paths

LEAST_BYTES = 1 << 20
"""Less than that is written again: to keep it costs more files."""
_MOST_DATABASES = 8


class Database(NamedTuple):
    """A database of the step before, of which some arrays are still the same."""

    folder: epath.Path
    files: Sequence[str]
    leaves: Sequence[int]
    """The places of these arrays in the tree."""


class Kept(NamedTuple):
    """What one item of a save takes over from the step before."""

    databases: Mapping[str, Database]
    """By the name that each has in the new step."""
    apart: frozenset[int]
    """The places of unchanged arrays that are written anew, into a database of their own."""
    name: str
    """The name of that database."""

    @property
    def leaves(self) -> frozenset[int]:
        """The places of the arrays that are not written."""
        return frozenset(place for each in self.databases.values() for place in each.leaves)


def choose(
    same: Collection[int], homes: Mapping[int, str], home: str, sizes: Sequence[int], totals: Mapping[str, int]
) -> tuple[dict[str, list[int]], frozenset[int]]:
    """The databases that are kept, each with the places of its arrays that are used; and those to write apart.

    Args:
      same: the places of the arrays that did not change.
      homes: by place the database that an array is in, if it is another than `home`.
      sizes: by place the bytes of each array.
      totals: the bytes of all arrays that were written into each database.
    """
    found: dict[str, list[int]] = {}
    for place in same:
        found.setdefault(homes.get(place, home), []).append(place)
    used = {at: sum(sizes[place] for place in places) for at, places in found.items()}
    worth = [at for at in found if used[at] >= max(LEAST_BYTES, totals[at] / 2)]
    kept = {at: found[at] for at in sorted(worth, key=lambda at: -used[at])[:_MOST_DATABASES]}
    apart = frozenset(same).difference(*kept.values())
    return kept, apart if sum(sizes[place] for place in apart) >= LEAST_BYTES else frozenset()


# ---------------------------------------------------------------- in the thread behind the save


def split(kept: Kept | None, copied: Sequence[tuple[int, Any]]) -> Iterator[tuple[str, list[tuple[int, Any]]]]:
    """What was copied, by the folder of the database that it is written into."""
    apart = kept.apart if kept is not None else frozenset()
    yield "", [each for each in copied if each[0] not in apart]
    if kept is not None and apart:
        yield kept.name, [each for each in copied if each[0] in apart]


def take_over(
    directory: epath.Path, kept: Kept, prefixes: Sequence[str], spec: Mapping[str, Any], context: Any
) -> None:
    """Gives the database in a directory the unchanged arrays; `spec` is how it is opened for writing."""
    transaction = ts.Transaction(atomic=True)
    whole = ts.KvStore.open(spec, context=context).result().with_transaction(transaction)
    copies = []
    for name, each in kept.databases.items():
        _share(each, directory / name)
        store = ts.KvStore.open(database.open_spec(directory / name), context=context).result()
        copies += _copy(store, whole, prefixes, each.leaves)
    if kept.apart:
        store = ts.KvStore.open(database.write_spec(directory / kept.name), context=context).result()
        copies += _copy(store, whole, prefixes, sorted(kept.apart))
    for copy in copies:
        copy.result()
    transaction.commit_async().result()


def _copy(store: Any, whole: Any, prefixes: Sequence[str], places: Collection[int]) -> list[Any]:
    """Futures of the copies of the keys of these arrays. The values are not copied."""
    return [
        store.experimental_copy_range_to(whole, source_range=ts.KvStore.KeyRange(first, end))
        for first, end in ranges(prefixes, places)
    ]


def ranges(prefixes: Sequence[str], places: Collection[int]) -> Iterator[tuple[str, str]]:
    """Ranges of keys that hold those of these arrays, and of no others: neighbours are in one."""
    wanted = {prefixes[place] for place in places}
    first = end = ""
    for prefix in sorted(prefixes, key=str.encode):
        if prefix in wanted:
            first, end = first if end else prefix, _end(prefix)
        elif end:
            yield first, end
            end = ""
    if end or wanted == {""}:
        yield first, end


def are_apart(prefixes: Collection[str]) -> bool:
    """Whether the keys of each array are a range of their own: those of `q/lora` lie between those of `q`."""
    ordered = sorted(prefixes)
    return not any(later.startswith(earlier) for earlier, later in itertools.pairwise(ordered))


def _end(prefix: str) -> str:
    """The first key after all that begin so. The prefix of a tree that is one array is empty: no key is."""
    return f"{prefix[:-1]}0" if prefix else ""


def _share(each: Database, target: epath.Path) -> None:
    """Gives the files of a database another name as well; where the system cannot, copies them."""
    if not paths.is_local(target):
        for _ in files.for_each(target, lambda name: objects.copy(each.folder / name, target / name), each.files):
            pass
        return
    linking.link(each.folder, target, each.files)
    files.sync({target.parent, target, *((target / name).parent for name in each.files)})

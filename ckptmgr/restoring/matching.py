"""Pairs the leaves of each template with those of the checkpoint, before anything is read.

What a caller of `restore` asks for is a `Request`; `match` gives a `Matched` for each item, or raises an error
that names every leaf that differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ckptmgr.arrays.progress import Progress
from ckptmgr.errors import ReducedCheckpointError, UnsupportedLeafError
from ckptmgr.format.manifest import METRICS, OPT_STATE, PARAMS, RESERVED, STEP, Item, Manifest
from ckptmgr.restoring import extras
from ckptmgr.specs import LeafDiff, LeafSpec, Row, StructureDiff, TreeSpec
from ckptmgr.trees import differences, iterators, structure
from ckptmgr.trees.structure import numpy_dtype

_log = logging.getLogger("ckptmgr")


@dataclasses.dataclass(frozen=True)
class Matched:
    """One item of the checkpoint beside its template: a row for each leaf of the result."""

    item: str
    template: Any
    rows: Sequence[Row]
    outline: Any = None
    """What to make of the leaves when there is no template: plain containers."""

    @property
    def tree(self) -> Any:
        """A tree of the result's structure, whatever its leaves are."""
        return self.assemble(list(range(len(self.rows)))) if self.template is None else self.template

    @property
    def order(self) -> Sequence[int]:
        """For each leaf of `tree`, in JAX's order, the place of its row.

        The fields of a NamedTuple that comes back as a dict have another order than its rows.
        """
        return range(len(self.rows)) if self.template is not None else jax.tree_util.tree_leaves(self.tree)

    def assemble(self, values: Sequence[Any], treedef: Any = None) -> Any:
        """The tree of these leaves: of this structure, or plain containers."""
        if treedef is None:
            return structure.rebuild(self.outline, values)
        return jax.tree_util.tree_unflatten(treedef, values)

    def without_values(self) -> Matched:
        """The same, which holds nothing that is the caller's."""
        rows = [Row(row.saved, row.wants) for row in self.rows]
        return dataclasses.replace(self, template=None, rows=rows)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a caller of `restore` asked for."""

    params: Any = None
    opt_state: Any = None
    optimizer: Any = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layout: Any = None
    cast: bool | Collection[str] = False
    """True, or the items whose leaves may be cast; `partial` likewise."""
    partial: bool | Collection[str] = False
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    broadcast: bool = False
    on_progress: Progress | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.extras, Mapping):
            raise TypeError(f"extras takes a mapping of names to templates, not {type(self.extras).__name__}")
        if self.optimizer is not None and self.opt_state is not None:
            raise ValueError("restore takes opt_state or optimizer, not both: each stands for the other")
        if self.optimizer is not None and not callable(getattr(self.optimizer, "init", None)):
            kind = f"{type(self.optimizer).__module__}.{type(self.optimizer).__qualname__}"
            raise TypeError(f"optimizer takes an optimizer of optax, not {kind}: give its state as opt_state=")
        for name in (PARAMS, OPT_STATE):
            if name in self.extras:
                raise ValueError(f"extras cannot have {name!r}: give it as {name}=")
        for option in ("cast", "partial"):
            _check_choice(option, getattr(self, option))
        if self.on_progress is not None and not callable(self.on_progress):
            raise TypeError(f"on_progress takes a callable of two numbers, not {self.on_progress!r:.60}")
        if self.rename and not self.has_template():
            raise ValueError(
                "rename gives leaves the paths of a template: give params=, opt_state= or extras= too"
            )
        differences.rename_rules(self.rename)

    def has_template(self) -> bool:
        """Whether a template of any item was given."""
        return any(each is not None for each in (self.params, self.opt_state, self.optimizer)) or bool(self.extras)

    def templates(self, manifest: Manifest) -> dict[str, Any]:
        """The template of each item that is to be read; None where it is to come back as it was saved."""
        trees = {PARAMS: self.params, OPT_STATE: self.opt_state}
        asked = {name: template for name, template in trees.items() if template is not None}
        if self.optimizer is not None:
            asked = {
                PARAMS: self.params,
                OPT_STATE: _state_template(manifest, self.optimizer, self.params),
            }
        asked |= self.extras
        return asked or _everything(manifest)

    def allowed(self, item: str) -> list[str]:
        """The differences that this item may have."""
        allowed = ["dtype"] * _chooses(self.cast, item)
        return allowed + ["missing", "unexpected"] * _chooses(self.partial, item)

    def advice(self, refused: StructureDiff) -> str:
        """What to give when `optimizer.init` does not describe the opt_state that was saved."""
        if self.optimizer is None or not any(leaf.path.startswith(OPT_STATE) for leaf in refused.leaves):
            return ""
        types = " If init needs the types of params, give params= too: without it they are plain dicts and lists."
        return (
            "The template of opt_state is optimizer.init of params."
            + types * (self.params is None)
            + " If an update changes the structure, give opt_state= in its place: a state that was updated, or "
            "jax.eval_shape of the training step."
        )

    def check_names(self, known: Collection[str]) -> None:
        """Refuses items that neither the checkpoint nor a template has."""
        for option in ("cast", "partial"):
            chosen = getattr(self, option)
            unknown = set() if isinstance(chosen, bool) else set(chosen) - set(known)
            if unknown:
                raise ValueError(f"{option} names {sorted(unknown)}, which is no item; known are {sorted(known)}")


def _everything(manifest: Manifest) -> dict[str, None]:
    """What comes back when no template is given; what is not read is said."""
    unread = {name: item.why for name, item in manifest.items.items() if item.kind == "unread"}
    for name, why in unread.items():
        _log.warning("step %d: %s is not restored: %s", manifest.step, name, why)
    return {name: None for name in manifest.items if name not in (STEP, METRICS, *unread)}


def _check_choice(option: str, chosen: Any) -> None:
    is_names = isinstance(chosen, Collection) and not isinstance(chosen, str | bytes | Mapping)
    if not isinstance(chosen, bool) and not (is_names and all(isinstance(name, str) for name in chosen)):
        raise TypeError(f'{option} takes True, False, or names of items, as {option}=("ema",), not {chosen!r}')


def _chooses(chosen: bool | Collection[str], item: str) -> bool:
    return chosen if isinstance(chosen, bool) else item in chosen


def match(
    manifest: Manifest, templates: Mapping[str, Any], request: Request
) -> tuple[list[Matched], StructureDiff]:
    """Pairs every template with its item. The second of the two is what `partial` and `cast` let pass.

    Raises StructureMismatchError that names all that differs, ValueError for a rule of `rename` that matches
    nothing.
    """
    _refuse_reduced(manifest, templates, request)
    rules, used = differences.rename_rules(request.rename), set[re.Pattern[str]]()
    refused, passed, matched = StructureDiff(), StructureDiff(), []
    for name, template in templates.items():
        item, allowed = manifest.items.get(name), request.allowed(name)
        if item is not None and item.kind == "unread":
            raise UnsupportedLeafError(f"step {manifest.step}: {name} is not restored: {item.why}", leaf=name)
        if item is not None and item.kind != "arrays":
            refused += _arrays_of(name, template)
            continue
        if item is not None or (name in RESERVED and (template is None or "missing" in allowed)):
            pair, differs = _match_tree(name, item or Item("arrays"), template, rules, used, manifest.written_here)
            if item is not None and differs and iterators.is_iterator(template):  # it gets back what it had
                pair, differs = _match_tree(name, item, None)
            if name == OPT_STATE and request.optimizer is not None and "dtype" not in allowed:
                pair, differs = _with_saved_dtypes(pair, differs)
            matched.append(pair)
        else:
            differs = StructureDiff((LeafDiff(name, None, None, "missing"),))
            if "missing" in allowed and _is_of_arrays(template):  # its own values, which go where `layout` says
                matched.append(_match_tree(name, Item("arrays"), template)[0])
        refused += differs.without(*allowed) + _without_value(name, template, differs, request)
        passed += differs.only(*allowed)
    advice = request.advice(refused), _where_else(manifest, templates), _without_extras(manifest, refused)
    what = f"step {manifest.step} does not fit the template of {' and '.join(templates)}"
    differences.raise_if_different(refused, what, "\n".join(filter(None, advice)))
    if unused := [rule.pattern for rule in rules if rule not in used]:
        raise ValueError(f"rename: {unused[0]!r} matches no leaf of {' or '.join(templates)}")
    return matched, passed


_ANOTHER = ", or restore another step"


def nothing_whole(reduced: ReducedCheckpointError) -> ReducedCheckpointError:
    """The error for the newest step, if no other step has what it lacks either."""
    message = f"{str(reduced).removesuffix(_ANOTHER)}: no other step can be restored with it"
    return ReducedCheckpointError(message, step=reduced.step, items=reduced.items)


def _refuse_reduced(manifest: Manifest, templates: Mapping[str, Any], request: Request) -> None:
    """Raises ReducedCheckpointError for items that `params_only` has deleted, unless `partial` allows that."""
    if manifest.reduced is None:
        return
    wanted = [name for name in manifest.reduced.items if name in templates]
    asked = [name for name in wanted if "missing" not in request.allowed(name)]
    if asked:
        raise ReducedCheckpointError(
            f"step {manifest.step} was {manifest.reduced}, so it has no {' and no '.join(asked)}. Leave "
            f"{'this template' if len(asked) == 1 else 'these templates'} out{_ANOTHER}",
            step=manifest.step, items=asked,
        )  # fmt: skip


def _arrays_of(name: str, template: Any) -> StructureDiff:
    """The arrays of the template of an item that was saved as a JSON value or as bytes."""
    if iterators.is_iterator(template):
        return StructureDiff()
    leaves = structure.describe(template, item=name, is_template=True).leaves if _has_arrays(template) else ()
    arrays = [leaf for leaf in leaves if leaf.kind in ("jax", "numpy", "key")]
    return StructureDiff(tuple(LeafDiff(f"{name}{leaf.path}", None, leaf, "value") for leaf in arrays))


def _has_arrays(template: Any) -> bool:
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    return any(isinstance(leaf, kinds) for leaf in jax.tree_util.tree_leaves(template))


def _is_of_arrays(template: Any) -> bool:
    kinds = (jax.Array, np.ndarray)
    return all(isinstance(leaf, kinds) for leaf in jax.tree_util.tree_leaves(template))


def _without_value(name: str, template: Any, differs: StructureDiff, request: Request) -> StructureDiff:
    """The leaves that `partial` would keep from a template without values for them; an optimizer makes them."""
    if "missing" not in request.allowed(name) or (name == OPT_STATE and request.optimizer is not None):
        return StructureDiff()
    leaves = jax.tree_util.tree_flatten_with_path(extras.state_of(template))[0]
    problems = {f"{name}{jax.tree_util.keystr(path)}": _no_value(leaf) for path, leaf in leaves}
    problems[name] = next(filter(None, problems.values()), None)  # of an item that is missing as a whole
    without = ((leaf, problems.get(leaf.path)) for leaf in differs.missing)
    return StructureDiff(
        tuple(dataclasses.replace(leaf, problem=problem) for leaf, problem in without if problem is not None)
    )


def _no_value(leaf: Any) -> Literal["no value", "deleted"] | None:
    """Why a leaf of a template has no value to keep."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "no value"
    is_deleted = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()
    return "deleted" if is_deleted else None


def _with_saved_dtypes(pair: Matched, differs: StructureDiff) -> tuple[Matched, StructureDiff]:
    """The dtypes that were saved, where only the optimizer's `init` says otherwise.

    An update may change them: with bfloat16 params and a float32 learning rate Adam's moments become float32.
    """
    changed = {leaf.path: leaf for leaf in differs.dtype if leaf.saved and leaf.template and _alike(leaf)}
    rows = [
        row._replace(wants=row.wants._replace(dtype=row.saved.dtype, weak=row.saved.weak))
        if row.saved and f"{pair.item}{row.wants.path}" in changed
        else row
        for row in pair.rows
    ]
    if changed:
        path, leaf = next(iter(changed.items()))
        _log.warning(
            "%d leaves of %s keep the dtype that was saved, which is not that of optimizer.init; the first: %s is "
            "%s, not %s", len(changed), pair.item, path, leaf.saved, leaf.template
        )  # fmt: skip
    kept = tuple(leaf for leaf in differs.leaves if leaf.path not in changed)
    return dataclasses.replace(pair, rows=rows), dataclasses.replace(differs, leaves=kept)


def _alike(leaf: LeafDiff) -> bool:
    """Whether both sides are floating, complex or whole numbers of some width."""
    saved, wants = (numpy_dtype(each.dtype) for each in (leaf.saved, leaf.template) if each is not None)
    families = (jnp.floating, jnp.complexfloating, jnp.integer)
    return any(jnp.issubdtype(saved, family) and jnp.issubdtype(wants, family) for family in families)


def _where_else(manifest: Manifest, templates: Mapping[str, Any]) -> str:
    """What to do if params or opt_state are asked for in a checkpoint that others wrote under other names."""
    absent = [name for name in (PARAMS, OPT_STATE) if name in templates and name not in manifest.items]
    others = [name for name, item in manifest.items.items() if item.kind == "arrays" and name not in RESERVED]
    if not absent or not others:
        return ""
    return (
        f"it has no {' and no '.join(absent)}; give a template to what it has: extras={{{others[0]!r}: template}}"
    )


def _without_extras(manifest: Manifest, refused: StructureDiff) -> str:
    """What to do if a step lacks an extra as a whole: the caller of `save` may have left it out."""
    whole = [leaf.path for leaf in refused.leaves if (leaf.saved, leaf.template) == (None, None)]
    extras = [name for name in whole if name not in manifest.items and name not in RESERVED]
    if not extras:
        return ""
    some = " and no ".join(extras)
    return (
        f"step {manifest.step} was saved with no {some}. If an earlier step has it, manager.rewind(STEP) goes "
        f"back to that step. If no step has it yet, partial=({extras[0]!r},) starts with the template's own value"
    )


def params_of(manifest: Manifest, matched: Sequence[Matched]) -> Matched:
    """The parameters among these items, or, if they are not to be restored, as they were saved."""
    known = next((each for each in matched if each.item == PARAMS), None)
    return known or _match_tree(PARAMS, manifest.items.get(PARAMS, Item("arrays")), None)[0]


def _match_tree(
    name: str,
    item: Item,
    template: Any,
    rules: Mapping[re.Pattern[str], str] = MappingProxyType({}),
    used: set[re.Pattern[str]] | None = None,
    knows_weak: bool = True,
) -> tuple[Matched, StructureDiff]:
    saved = item.tree
    if template is None:
        rows = [Row(leaf, leaf) for leaf in saved.leaves]
        return Matched(name, None, rows, saved.outline), StructureDiff()
    template = extras.state_of(template)
    wants = structure.describe(template, item=name, is_template=True)
    known = differences.renamed(saved, rules, wants, set() if used is None else used)
    wants = _with_python_numbers(known, wants, template)
    rows = _rows(saved, known, wants, template, knows_weak)
    return Matched(name, template, rows), differences.compare(known, wants, name)


def compare(manifest: Manifest, params: Any, opt_state: Any) -> StructureDiff:
    """How templates differ from a checkpoint."""
    given = {name: tree for name, tree in ((PARAMS, params), (OPT_STATE, opt_state)) if tree is not None}
    found = StructureDiff()
    for name, template in given.items():
        found += _match_tree(name, manifest.items.get(name, Item("arrays")), template)[1]
    return found


def _rows(saved: TreeSpec, known: TreeSpec, wants: TreeSpec, template: Any, knows_weak: bool) -> list[Row]:
    there = {leaf.keys: original for leaf, original in zip(known.leaves, saved.leaves, strict=True)}
    given = jax.tree_util.tree_leaves(template)
    return [
        Row(found := there.get(leaf.keys), _as_saved(found, leaf) if knows_weak else leaf, own)
        for leaf, own in zip(wants.leaves, given, strict=True)
    ]


def _with_python_numbers(known: TreeSpec, wants: TreeSpec, template: Any) -> TreeSpec:
    """Where a Python number was saved, one is wanted: `jax.eval_shape` makes an abstract array of it."""
    numbers = {leaf.keys: leaf for leaf in known.leaves if leaf.kind in ("int", "float", "bool", "complex")}
    if not numbers:
        return wants

    def number(wanted: LeafSpec, given: Any) -> LeafSpec:
        saved = numbers.get(wanted.keys)
        if saved is None or not isinstance(given, jax.ShapeDtypeStruct) or wanted.shape or wanted.kind != "jax":
            return wanted
        same_kind = numpy_dtype(wanted.dtype).kind == numpy_dtype(saved.dtype).kind
        return wanted._replace(kind=saved.kind, dtype=saved.dtype, weak=False) if same_kind else wanted

    leaves = map(number, wants.leaves, jax.tree_util.tree_leaves(template))
    return dataclasses.replace(wants, leaves=tuple(leaves))


def _as_saved(saved: LeafSpec | None, wants: LeafSpec) -> LeafSpec:
    """What is to be made of a leaf: the template's, but as weak as it was saved, and an array if it was one.

    A new template may be weak, or a Python number, where an update has made the saved leaf a strong array. With a
    weak leaf in its place the next step would compute in other dtypes, so other bits.
    """
    if saved is None or saved.kind != "jax":
        return wants
    is_number = wants.kind in ("int", "float", "bool", "complex") and differences.same_values(saved, wants)
    if is_number or (wants.kind == "jax" and wants.dtype == saved.dtype):
        return wants._replace(kind="jax", dtype=saved.dtype, weak=saved.weak)
    return wants


def _state_template(manifest: Manifest, optimizer: Any, params: Any) -> Any:
    """The abstract opt_state of an optax optimizer, from the params template or those saved."""
    if params is None:
        tree = manifest.items[PARAMS].tree if PARAMS in manifest.items else TreeSpec((), None)
        params = structure.rebuild(tree.outline, list(map(structure.abstract, tree.leaves)))
    return abstract_state(optimizer, params)


def abstract_state(optimizer: Any, params: Any) -> Any:
    with _described():
        return jax.eval_shape(optimizer.init, params)


def new_state(optimizer: Any, params: Any) -> Any:
    with _described(), jax.transfer_guard("allow"):  # it makes arrays of numbers, which a training step does not
        return optimizer.init(params)


@contextlib.contextmanager
def _described() -> Iterator[None]:
    """What an optimizer raises that was made for other params, a mask with other names for example."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as problem:
        why = " ".join(str(problem).split())[:200]
        raise ValueError(
            f"optimizer.init fails for these params: {why}. If the state that was saved is of other params than "
            "these, give its template as opt_state=, in the place of optimizer="
        ) from problem

"""Pickles are read, and nothing of theirs is run."""

import collections
import contextlib
import copyreg
import dataclasses
import functools
import itertools
import os
import pickle
import random
import subprocess
import sys

import flax.core
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optimizers
import pytest
from jax.example_libraries import optimizers as example_libraries

from ckptmgr import UnsafePickleError
from ckptmgr.interop import pickles
from ckptmgr.testing import assert_trees_equal

SQUARE = jnp.arange(6.0).reshape(2, 3)
TREES = {
    "jax": {"w": SQUARE, "half": jnp.ones(3, jnp.bfloat16), "four": jnp.arange(4).astype(jnp.int4)},
    "weak": {"w": jnp.full((3, 2), 0.3), "n": jnp.full((2,), 7), "one": jnp.asarray(0.5)},
    "numpy": [np.arange(5), np.asfortranarray(SQUARE), np.arange(3, dtype=">i4"), np.float32(2)],
    "odd": (np.zeros((0, 3)), np.ones(3, ml_dtypes.float8_e4m3fn), np.array(-0.0), True, 1 + 2j, None, "", b"raw"),
    "containers": collections.OrderedDict(a=[1, (2, {})], b={3: jnp.ones(())}),
    "frozen": flax.core.FrozenDict({"layer": {"w": jnp.ones(2)}}),
    "unpacked": example_libraries.unpack_optimizer_state(example_libraries.adam(0.1)[0]([jnp.ones(3)])),
} | {name: each.init(optimizers.PARAMS) for name, each in optimizers.OPTAX.items()}  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", TREES)
def test_what_people_have_comes_back_bit_for_bit_with_its_types(name, protocol, tmp_path):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(TREES[name], protocol))
    back = pickles.load(tmp_path / "file.pkl")
    if "unpacked" in name:
        back, expected = (example_libraries.pack_optimizer_state(each) for each in (back, TREES[name]))
    else:
        expected = TREES[name]
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    assert_trees_equal(back, expected)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_the_state_of_example_libraries_as_it_is(protocol):
    _, update, get_params = example_libraries.adam(1e-2)
    state = example_libraries.adam(1e-2)[0](optimizers.PARAMS)
    back = pickles.loads(pickle.dumps(state, protocol))
    assert_trees_equal(back, state)
    gradient = jax.tree.map(jnp.ones_like, get_params(state))
    assert_trees_equal(update(0, gradient, back), update(0, gradient, state))


NODES = {
    "dict": dict, "ordered": collections.OrderedDict, "frozen": flax.core.FrozenDict,
    "list": lambda of: [*of.values()], "tuple": lambda of: (*of.values(), None),
    "named": lambda of: optax.EmaState(*of.values()),
}  # fmt: skip


@pytest.mark.parametrize("outer", NODES)
@pytest.mark.parametrize("inner", NODES)
def test_the_state_of_example_libraries_over_any_containers(outer, inner):
    params = NODES[outer]({"b": NODES[inner]({"z": SQUARE, "a": jnp.ones(3)}), "a": jnp.ones(2)})
    state = example_libraries.momentum(1e-2, 0.9)[0](params)
    back = pickles.loads(pickle.dumps(state))
    assert back.tree_def == state.tree_def
    assert_trees_equal(back, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: object


def test_a_node_that_is_not_known_is_named():
    for node, name in ((collections.defaultdict(list, a=SQUARE), "builtins.list"), (Layer(SQUARE), "Layer")):
        data = pickle.dumps(example_libraries.sgd(1e-2)[0](node))
        with pytest.raises(UnsafePickleError, match=name) as caught:
            pickles.loads(data)
        with pytest.raises(UnsafePickleError, match=rf"a tree definition with a node of .*(defaultdict|{name})"):
            pickles.loads(data, allow=[caught.value.name, "collections.defaultdict"])


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, how, *arguments):
        self.how, self.arguments = how, arguments

    def __reduce__(self):
        return self.how, self.arguments


def hostile(command):
    """Pickles that would run it, by the ways that are known."""
    partial = Runs(functools.partial, os.system, command)
    text = command.encode()
    return {
        "reduce": Runs(os.system, command),
        "within": {"params": [jnp.ones(2), Runs(os.system, command)]},
        "eval": Runs(eval, f"__import__('os').system({command!r})"),
        "partial": Runs(functools.reduce, partial, [1, 2]),
        "getattr": b"c__builtin__\ngetattr\n(cnumpy\nndarray\nS'ctypes'\ntR.",
        "jax": b"cjax\nconfig.update\n(S'jax_enable_x64'\nI01\ntR.",
        "numpy": Runs(np.load, "file.npy"),
        "text": b"cposix\nsystem\n(S'" + text + b"'\ntR.",
        "dotted": b"\x80\x04\x8c\x05optax\x8c\x11_src.base.jax.jit\x93\x8c"
        + bytes([len(text)])
        + text
        + b"\x85R.",
        "dotted within": b"\x80\x04\x8c\x05numpy\x8c\x10dtype.__reduce__\x93)R.",
        "optax function": b"coptax\nadam\n(F0.1\ntR.",
        "optax module": b"coptax._src.base\njax\n.",
        "instance": b"(S'" + text + b"'\niposix\nsystem\n.",
        "persistent": b"Pevil\n.",
        "reconstructor": b"ccopyreg\n_reconstructor\n(csubprocess\nPopen\nc__builtin__\nobject\nNtR.",
        "attributes of a type": b"coptax._src.base\nEmptyState\n(N}S'__new__'\ncposix\nsystem\nstb.",
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_what_would_run_is_refused_by_name_and_is_not_run(name, tmp_path):
    marker = tmp_path / "ran"
    what = hostile(f"touch {marker}")[name]
    data = what if isinstance(what, bytes) else pickle.dumps(what)
    with pytest.raises(UnsafePickleError, match=r"the pickle uses .* no code was run") as caught:
        pickles.loads(data)
    assert caught.value.name
    assert caught.value.name in str(caught.value)
    assert not marker.exists()
    assert not jax.config.jax_enable_x64


def test_a_registered_extension_is_refused_too(tmp_path):
    copyreg.add_extension("posix", "system", 240)
    try:
        with pytest.raises(UnsafePickleError, match="uses a registered extension"):
            pickles.loads(pickle.dumps(os.system, 2))
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_nothing_that_a_pickle_does_to_a_type_lasts():
    before = dict(vars(optax.EmptyState))
    with pytest.raises(UnsafePickleError):
        pickles.loads(b"coptax._src.base\nEmptyState\n(N}S'_make'\nS'spoilt'\nstb.")
    assert dict(vars(optax.EmptyState)) == before


def names():
    """Every name that a pickle may use, one optax state and one dtype for all of their kind."""
    states = ["jax.example_libraries.optimizers.OptimizerState", "optax._src.base.EmptyState"]
    return [
        *pickles.MAKES,
        *sorted(pickles.ARGUMENTS),
        *states,
        "optax._src.transform.ScaleByAdamState",
        "ml_dtypes.bfloat16",
    ]


ATTRIBUTES = (
    "__init__", "__new__", "__call__", "__setstate__", "__class__", "__code__", "__defaults__", "__dict__",
    "_fields", "_make", "array", "dtype", "full", "kind", "meaning", "state", "values", "what",
)  # fmt: skip


def tricks(full):
    """Pickles that change what a name stands for, each in a way that pickle's machine has."""
    module, _, name = full.rpartition(".")
    it = f"c{module}\n{name}\n".encode()
    spoilt = b"".join(b"S'%s'\ncnumpy\nndarray\n" % each.encode() for each in ATTRIBUTES)
    one_by_one = (b"S'%s'\ncnumpy\nndarray\n" % each.encode() for each in ATTRIBUTES)
    states = [b"}(" + spoilt + b"u", *(b"N}(" + each + b"u\x86" for each in one_by_one), b"K\x05", b"(l"]
    arguments = [b")", b"(Nt", b"(S'x'\n}]NK\x01t", b"(" + it + it + b"Nt", b"(S'f4'\nI00\nI01\nt", b"((K\x01tt"]
    made = [it, *(it + each + how for each in arguments for how in (b"R", b"\x81"))]
    changed = [thing + state + b"b" for thing in made for state in states]
    changed += [thing + b"(" + spoilt + b"u" for thing in made]
    changed += [thing + b"(" + it + ending for thing in made for ending in (b"e", b"\x90")]
    return [b"\x80\x04" + each + b"." for each in [*made, *changed]]


HONEST = [
    pickle.dumps(TREES[name], protocol)
    for name in ("numpy", "odd", "containers", "frozen", "adam")
    for protocol in (0, 5)
]


@pytest.mark.parametrize("full", names())
def test_no_pickle_changes_how_an_honest_one_is_read_after_it(full):
    before = [pickles.loads(data) for data in HONEST]
    for data in tricks(full):
        with contextlib.suppress(UnsafePickleError):
            pickles.loads(data)
    for data, expected in zip(HONEST, before, strict=True):
        found = pickles.loads(data)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert_trees_equal(found, expected)


class Mine:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("name", ["numpy.arangee", "numpy", "numpy.no_module.x"])
def test_a_mistyped_name_to_allow_is_named(name):
    with pytest.raises((ValueError, ImportError), match=r"has no 'arangee'|module\.name, not|no_module"):
        pickles.loads(pickle.dumps(1), allow=[name])


def test_the_caller_may_allow_more_by_name():
    data = pickle.dumps({"at": np.arange(3), "when": Runs(np.arange, 4)})
    with pytest.raises(UnsafePickleError, match=r"the pickle uses (numpy\.\S*arange).*--allow \1 "):
        pickles.loads(data)
    assert np.array_equal(pickles.loads(data, allow=["numpy.arange"])["when"], np.arange(4))


@pytest.mark.parametrize(
    "data",
    [b"", b"not a pickle", pickle.dumps(np.arange(9))[:-9], pickle.dumps(np.array([object()], object)),
     pickle.dumps({(1, 2): 3}), b"\x80\x04r\xff\xff\xff\x7f.", b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f."],
    ids=["empty", "text", "cut", "objects", "key", "memo", "bytearray"],
)  # fmt: skip
def test_what_is_damaged_or_no_tree_of_arrays_is_refused(data):
    with pytest.raises(UnsafePickleError):
        pickles.loads(data)


MUTATE = """
import random, resource, sys
sys.path.insert(0, sys.argv[1])
import test_pickles
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
print(*test_pickles.mutated(int(sys.argv[2])))
"""


def mutated(count):
    """How many of `count` damaged pickles were refused, and how many gave a tree; anything else is raised."""
    draw, refused, read = random.Random(0), 0, 0
    whole = [pickle.dumps(each, protocol) for each in TREES.values() for protocol in (0, 2, 4, 5)]
    for _ in range(count):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            tree = pickles.loads(bytes(data))
        except UnsafePickleError:
            refused += 1
        else:
            read += 1
            for leaf in jax.tree.leaves(tree):
                assert isinstance(
                    leaf, jax.Array | np.ndarray | np.generic | int | float | complex | str | bytes
                    | example_libraries.JoinPoint
                ), leaf  # fmt: skip
    return refused, read


def test_mutated_pickles_are_trees_of_arrays_or_refused():
    """In a process of its own: a crash or a flood of memory would be seen."""
    command = [sys.executable, "-c", MUTATE, os.path.dirname(__file__), "400"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path])
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, read = map(int, done.stdout.split())
    assert refused + read == 400
    assert refused > 100
    assert read > 10


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_whose_axes_were_moved(protocol):
    base = np.arange(24.0).reshape(2, 3, 4)
    for axes in itertools.permutations(range(3)):
        moved = base.transpose(axes)
        back = pickles.loads(pickle.dumps({"w": moved}, protocol))["w"]
        assert np.array_equal(back, moved), axes

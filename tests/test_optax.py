"""The state of every optimizer comes back exactly, in each way of restoring it, and its run goes on bit for bit.

The optimizers are found by walking optax and jax.example_libraries: none is named here but those with a reason.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformations
from conftest import counted

import ckptmgr

# Some of optax are deprecated, and warn when they are built.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")

STOP, STEPS = 2, 5
FOUND = transformations.transformations()
WRAPPERS = transformations.wrappers()

REFUSED = {
    ("optax.lookahead",): (
        {"optimizer alone"},
        "its init looks for LookaheadParams, and without a params template params are plain dicts",
        "give params=",
    ),
    ("optax.monitor",): (
        {"optimizer", "optimizer alone"},
        "its init has no measurements: the first update adds them",
        "give opt_state=",
    ),
    ("optax.contrib.sam", "optax.apply_if_finite"): (
        {"optimizer", "optimizer alone"},
        "the first update of sam makes a number of apply_if_finite's last_finite, which is a bool",
        "give opt_state=",
    ),
}
"""What `optimizer=` cannot describe, by name, the outer one first: the ways that are refused, why, and what the
error tells the user to give."""


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a state as the next step of one run; returns what restores that step."""
    steps = itertools.count()
    with ckptmgr.CheckpointManager(tmp_path_factory.mktemp("optax")) as manager:

        def save(params, opt_state):
            step = next(steps)
            manager.save(step, params, opt_state).result()
            return lambda **templates: manager.restore(step, **templates)

        yield save


# ---------------------------------------------------------------- saved, restored, and on


def goes_on_exactly(save, step, start, ways):
    """Saves after STOP steps; each way brings back that state, and the run ends as one that was never stopped.

    Returns the refusals of the ways in which it cannot be restored.
    """
    stopped = run(step, start, 0, STOP)
    straight = run(step, stopped, STOP, STEPS)
    compilations = compiled_times(step)
    restore = save(*stopped)
    refusals = {}
    for way, templates in ways(stopped).items():
        try:
            back = restore(**templates)
        except ckptmgr.StructureMismatchError as refusal:
            refusals[way] = str(refusal)
            continue
        same((back.params, back.opt_state), stopped, way)
        resumed = run(step, (back.params, back.opt_state), STOP, STEPS)
        same(resumed, straight, f"{way}, {STEPS - STOP} steps later")
        assert compiled_times(step) == compilations, f"{way}: what was restored compiles the step again"
    return refusals


def run(step, state, first, last):
    for number in range(first, last):
        state = step(*state, number)
    return state


def ways_with(training, stopped):
    """The templates of the four ways to restore a run, made anew as by a program that is started again."""
    start = training.init()
    return by_templates(start if fits(start, stopped) else stopped) | {
        "optimizer": {"params": start[0], "optimizer": training.optimizer},
        "optimizer alone": {"optimizer": training.optimizer},
    }


def by_templates(state):
    params, opt_state = state
    abstract = jax.eval_shape(lambda: state)
    return {
        "live": {"params": params, "opt_state": opt_state},
        "abstract": {"params": abstract[0], "opt_state": abstract[1]},
    }


def fits(start, stopped):
    """Whether what optax's `init` makes has the structure, the shapes and the dtypes that its updates keep."""
    return form(start) == form(stopped)


def form(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves]


def compiled_times(step):
    return step._cache_size() if hasattr(step, "_cache_size") else 0


def same(one, other, when):
    """Fails unless two trees have the same containers, and leaves of the same kind, dtype, weak type and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other), when
    pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
    differ = {jax.tree_util.keystr(path): (told(a), told(b)) for (path, a), b in pairs if told(a) != told(b)}
    assert not differ, when


def told(leaf):
    """Everything that makes a leaf what it is."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), *told(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return type(leaf), array.dtype, array.shape, getattr(leaf, "weak_type", None), array.tobytes()


def compiled(step):
    """The step, compiled without optimizing it: compiling is most of what these tests cost."""
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def check(save, training, *names, how="compiled", strongly=True):
    """The run goes on exactly; it is refused where there is a reason, and then the error tells what to give."""
    step = compiled(training.step) if how == "compiled" else training.step
    start = training.init_strongly() if strongly else training.init()
    refusals = goes_on_exactly(save, step, start, functools.partial(ways_with, training))
    known = [REFUSED[each] for each in {names, *((name,) for name in names)} if each in REFUSED]
    assert refusals.keys() == set().union(*(ways for ways, _, _ in known))
    for ways, _, advice in known:
        for way in ways:
            assert advice in refusals[way]


# ---------------------------------------------------------------- optax


def test_the_walk_finds_functions_classes_and_what_is_exported_under_another_name():
    """The finder's own test: adam is annotated, dog is not, MultiSteps is a class, `process` is in an alias."""
    some = {"optax.adam", "optax.contrib.dog", "optax.MultiSteps", "optax.experimental.aggregating.process"}
    assert some <= FOUND.keys()
    assert "optax.contrib.dog" not in WRAPPERS
    assert {"optax.chain", "optax.masked", "optax.inject_hyperparams", "optax.MultiSteps"} <= WRAPPERS.keys()
    assert set(itertools.chain(*REFUSED)) <= FOUND.keys()


@pytest.mark.parametrize("name", FOUND)
def test_every_transformation_comes_back_exactly_and_goes_on(save, name):
    check(save, transformations.training(FOUND[name]), name)


MODES = itertools.product(("compiled", "eager"), ("float32", "bfloat16", "float64"))
CASES = list(itertools.product(FOUND, MODES))
EVERY = counted(143, 1)  # coprime to the number of modes: the sample of `make test` has all of them


@contextlib.contextmanager
def precision(dtype):
    """As a user sets it: for all threads, and float64 alone is beyond what JAX has by default."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield jnp.dtype(dtype)
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "how", "dtype"), [(name, *mode) for name, mode in CASES][::EVERY])
def test_compiled_and_eager_in_every_precision_from_weakly_typed_parameters(save, name, how, dtype):
    with precision(dtype) as dtype:
        training = transformations.training(FOUND[name], dtype)
        check(save, training, name, how=how, strongly=False)


OPTIONS = [(name, option) for name, make in FOUND.items() for option in transformations.options(make)]


@pytest.mark.soak
@pytest.mark.parametrize(("name", "option"), OPTIONS[:: counted(61, 1)])
def test_every_option_that_a_rule_knows_another_value_for(save, name, option):
    value = transformations.options(FOUND[name])[option]
    check(save, accepted(FOUND[name], transformations.training(FOUND[name]), **{option: value}), name)


RING = list(zip(WRAPPERS, [*WRAPPERS][1:] + [*WRAPPERS][:1], strict=True))  # each is once inside and once outside


@pytest.mark.soak
@pytest.mark.parametrize(("outer", "inner"), counted(RING, list(itertools.product(WRAPPERS, WRAPPERS))))
def test_wrappers_around_wrappers_of_adam(save, outer, inner):
    forms = map(transformations.training, (WRAPPERS[outer], WRAPPERS[inner]))
    check(save, accepted(WRAPPERS[outer], *forms, inner=WRAPPERS[inner]), outer, inner)


def accepted(make, *forms, **how):
    """Training with what optax may refuse: then there is no state to save."""
    try:
        return transformations.varied(make, *forms, **how)
    except Exception as refusal:
        pytest.skip(f"optax refuses it: {refusal}")


# ---------------------------------------------------------------- jax.example_libraries


@pytest.mark.parametrize("name", transformations.example_libraries())
def test_every_optimizer_of_the_example_libraries(save, name):
    """sm3 runs eagerly: its state holds Python numbers that are shapes. It takes no scalar either."""
    optimizer = transformations.example_libraries()[name]
    various, no_scalar, *_ = transformations.parameters(jnp.dtype("float32"))
    start = optimizer.init_fn(no_scalar if name == "sm3" else various)

    def step(params, opt_state, number):
        gradient = jax.grad(transformations.loss_of)(optimizer.params_fn(opt_state), number)
        return None, optimizer.update_fn(number, gradient, opt_state)

    def ways(stopped):
        return by_templates((None, start if fits(start, stopped[1]) else stopped[1]))

    assert goes_on_exactly(save, step if name == "sm3" else compiled(step), (None, start), ways) == {}

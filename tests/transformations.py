"""Every transformation of optax, found by walking its public modules, built by rules for the names of arguments.

No transformation is named here: one that a new release brings is found, built and trained the day it is installed.
"""

import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
import warnings

import jax
import jax.numpy as jnp
import optax
from jax.example_libraries import optimizers

# ---------------------------------------------------------------- finding them


def modules():
    """The public modules of optax, and the modules that these export under a public name."""
    with warnings.catch_warnings(action="ignore"):  # some are deprecated, and say so when they are imported
        names = [name for _, name, _ in pkgutil.walk_packages(optax.__path__, "optax.")]
        public = [name for name in names if "._" not in name and not name.endswith("_test")]
        found = [optax, *map(importlib.import_module, public)]
    exported = [vars(module).get(name) for module in found for name in getattr(module, "__all__", ())]
    return list(dict.fromkeys([*found, *filter(inspect.ismodule, exported)]))


def transformations():
    """Name -> what makes a transformation; under the first of its public names."""
    found = {}
    for module in modules():
        for name, value in sorted(vars(module).items()):
            defined_here = (
                value if "._" not in module.__name__ else getattr(value, "__module__", "") == module.__name__
            )
            if not name.startswith("_") and defined_here and makes_a_transformation(value):
                found.setdefault(value, f"{module.__name__}.{name}".replace("._", "."))
    return {name: make for make, name in found.items()}


def belongs_to(module, value):
    """A module that is exported under an alias has no `__all__`: what it imports is not its own."""
    return "._" not in module.__name__ or getattr(value, "__module__", "") == module.__name__


def makes_a_transformation(value):
    init = getattr(value, "init", None)
    if inspect.isclass(value) and inspect.isfunction(init):  # MultiSteps
        return "params" in inspect.signature(init).parameters
    if not inspect.isfunction(value):
        return False
    returns = inspect.signature(value).return_annotation
    told = inspect.getsource(value) if returns is inspect.Signature.empty else str(returns)
    return any(word in told for word in ("GradientTransformation", "Aggregator"))


def example_libraries():
    """Name -> an optimizer of `jax.example_libraries.optimizers`."""
    found = {}
    for name, make in vars(optimizers).items():
        if inspect.isfunction(make) and "step_size" in inspect.signature(make).parameters:
            required = [p for p in parameters_of(make) if p.default is p.empty]
            found[name] = make(**{p.name: 0.1 for p in required})  # a schedule takes a step_size too
    return {name: each for name, each in found.items() if isinstance(each, optimizers.Optimizer)}


def wrappers():
    """The transformations that take another one."""
    return {name: make for name, make in transformations().items() if takes_a_transformation(make)}


def takes_a_transformation(make):
    return any(
        parameter.default is parameter.empty and "GradientTransformation" in str(parameter.annotation)
        for parameter in parameters_of(make)
    )


# ---------------------------------------------------------------- building them


class NoRuleError(Exception):
    """No rule makes this argument."""


def build(make, params, inner=optax.adam, *, with_optional=False, **given):
    """A transformation, of the arguments that it requires (and of optional ones that a rule names) and of `given`.

    Where it takes another transformation, `inner` makes that one.
    """
    rules = Rules(params, optax.adam(0.1) if inner is optax.adam else build(inner, params))
    named = rules.by_name() if with_optional else {}
    several = [rules.argument(p) for p in parameters_of(make) if p.kind is p.VAR_POSITIONAL]
    single = [p for p in parameters_of(make) if p.kind is not p.VAR_POSITIONAL]
    wanted = {p.name: rules.argument(p) for p in single if p.default is p.empty or p.name in named}
    made = make(*several, **wanted | given)
    if not hasattr(made, "update"):
        return made(learning_rate=0.1)  # inject_hyperparams makes a factory
    return made.gradient_transformation() if hasattr(made, "gradient_transformation") else made  # MultiSteps


def parameters_of(make):
    return inspect.signature(make).parameters.values()


@dataclasses.dataclass(frozen=True)
class Rules:
    """What an argument is, by its name or else by its annotation."""

    params: object
    inner: object

    def argument(self, parameter):
        named = self.by_name().get(parameter.name)
        if named is not None:
            return named
        told = str(parameter.annotation)
        for words, value in self.by_annotation():
            if words in told:
                return value
        raise NoRuleError(f"no rule makes the argument {parameter}")

    def by_name(self):
        return {
            "aggregator": optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: leaf.mean(0), updates)),
            "f": lambda updates, _: jax.tree.map(lambda leaf: leaf * 0.5, updates),
            "inner_factory": lambda learning_rate: optax.chain(optax.scale(learning_rate), self.inner),
            "mask": self.mask(),
            "freeze_mask": self.mask(),
            "key": jax.random.key(7),
            "measure": optax.tree.norm,
            "measures": {"norm": optax.tree.norm, "mean": optax.measure_with_ema(optax.tree.norm, 0.9)},
            "param_labels": jax.tree.map(lambda matrix: "matrix" if matrix else "other", self.mask()),
            "per_elt_axis": 0,
            "postprocessor": self.inner,
            "preprocessor": optax.identity(),
            "should_transform_fn": lambda step, **_: step % 2 == 0,
            "sync_period": 2,
            "weight_dimension_numbers": lambda params: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(), params
            ),
            "step_size_fn": optax.linear_schedule(0.1, 0.01, 10),
        }

    def by_annotation(self):
        return [
            ("Mapping[collections.abc.Hashable", {"matrix": self.inner, "other": optax.sgd(0.1, momentum=0.9)}),
            ("tuple[str, optax", ("first", self.inner)),
            ("GradientTransformation", self.inner),
            ("typing.Union[int", 2),
            ("<class 'int'>", 2),
            ("<class 'str'>", "name"),
            ("float", 0.1),
            ("Array", 0.5),
        ]

    def mask(self):
        return mask_of(self.params)


def mask_of(params):
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def options(make):
    """Name -> another value, for each optional argument that a rule knows another value for."""
    known = {p.name: another(p) for p in parameters_of(make) if p.default is not p.empty or "Callable" in str(p)}
    return {name: value for name, value in known.items() if value is not None}


def another(parameter):
    if isinstance(parameter.default, bool):
        return not parameter.default
    told = str(parameter.annotation)
    for applies, value in (
        ("dtype" in parameter.name, jnp.bfloat16),
        ("mask" in parameter.name, mask_of),
        ("float, jax" in told and "Callable" in told, optax.linear_schedule(0.1, 0.01, 10)),
        (parameter.default is None and "Array" in told and "key" not in parameter.name, 0.5),
        (parameter.default is None and "int" in told, 2),
    ):
        if applies:
            return value
    return None


# ---------------------------------------------------------------- training them


@dataclasses.dataclass(frozen=True)
class Training:
    """A transformation, parameters that it takes, and how its gradients are given to it."""

    params: object
    optimizer: object
    by_example: bool
    """Whether `update` takes a gradient for each example, instead of one for the batch."""
    applied: bool
    """Whether what `update` returns is added to the parameters: a measurement is not."""
    extra: tuple
    """What `update` is given beside the gradients, by name."""

    def init(self):
        return self.params, self.optimizer.init(self.params)

    def init_strongly(self):
        """The same, without weak types: the next steps are compiled once, and not once more as weak types go."""
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), self.params)
        return params, self.optimizer.init(params)

    def step(self, params, opt_state, number):
        """One step of training on gradients that differ from step to step."""
        moving = getattr(params, "fast", params)  # what lookahead takes gradients of

        def loss(params):
            return loss_of(params, number)

        value, gradient = jax.value_and_grad(loss)(moving)
        if self.by_example:
            gradient = jax.vmap(jax.grad(loss_of), (None, 0))(moving, number + jnp.arange(3.0))
        offered = {
            "value": value,
            "grad": gradient,
            "value_fn": loss,
            "obj_fn": loss,
            "grad_fn": lambda params, _: jax.grad(loss)(params),
            "sum_sq_diff_grads": jax.tree.map(jnp.square, gradient),
            "sample_size": 3,
        }
        updates, opt_state = self.optimizer.update(gradient, opt_state, params, **self.taken(offered))
        if not self.applied:
            return params, opt_state
        if shapes(updates) != shapes(params):
            raise ValueError(f"updates of {shapes(updates)} are none of parameters of {shapes(params)}")
        return optax.apply_updates(params, updates), opt_state

    def taken(self, offered):
        """The extra arguments that `update` takes, by their names."""
        parameters = parameters_of(self.optimizer.update)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return {name: offered[name] for name in self.extra}
        return {p.name: offered[p.name] for p in parameters if p.name in offered}


def loss_of(params, number):
    """A loss that couples all leaves and moves from step to step; its gradients stay small whatever is done."""
    wanted = [jnp.abs(leaf - 0.1 * place * number) ** 2 for place, leaf in enumerate(jax.tree.leaves(params))]
    return jnp.log1p(sum(jnp.sum(each).astype(float) for each in wanted))


def parameters(dtype):
    """Trees that a transformation may take, the most various first."""
    layer = {"w": jnp.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3), "b": jnp.zeros(3, dtype)}
    scalar = jnp.asarray(0.5) if dtype == jnp.asarray(0.5).dtype else jnp.asarray(0.5, dtype)
    various = {"layer": layer, "scale": scalar, "half": jnp.ones(2, jnp.bfloat16)}
    matrices = {"layer": {"w": layer["w"]}, "other": jnp.ones((2, 2), dtype)}
    return [various, {"layer": layer, "half": various["half"]}, {"layer": layer}, matrices,
            optax.LookaheadParams.init_synced(various)]  # fmt: skip


FLOAT32 = jnp.dtype("float32")
EXTRA = [
    ("value", "grad", "value_fn", "obj_fn", "grad_fn"),
    ("value", "grad", "value_fn"),  # a line search takes no name that it does not know
    (),
]
"""What may be given to an `update` that takes `**extra_args`."""


@functools.cache
def training(make, dtype=FLOAT32):
    """The first form of training that optax itself accepts; raises the refusal of the first if there is none."""
    refusals = []
    for with_optional, applied, by_example, extra, params in itertools.product(
        (False, True), (True, False), (False, True), EXTRA, parameters(dtype)
    ):
        try:
            made = build(make, params, with_optional=with_optional)
            return checked(Training(params, made, by_example, applied, extra))
        except Exception as refusal:
            refusals.append(refusal)
    raise refusals[0]


def varied(make, *forms, **how):
    """`make` built in another way, in a form of training like those known; or the refusal of the first."""
    trees = [*(form.params for form in forms), *parameters(FLOAT32)[2:3]]
    refusals = []
    for form, params, extra in itertools.product(forms, trees, (True, False)):
        try:
            made = dataclasses.replace(form, params=params, optimizer=build(make, params, **how))
            return checked(made if extra else dataclasses.replace(made, extra=()))
        except Exception as refusal:
            refusals.append(refusal)
    raise refusals[0]


def checked(training):
    """The same, once optax has traced a step of it."""
    jax.eval_shape(training.step, *jax.eval_shape(training.init), 0)
    return training


def shapes(params):
    return jax.tree.map(jnp.shape, params)

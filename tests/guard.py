"""jax_transfer_guard="disallow", as training loops set it, around every call of ckptmgr and in its threads.

It cannot be set for whole tests: JAX's own `jnp.zeros(3)` is an implicit transfer, which a jitted training step
does not make and a test does.
"""

import functools
import inspect

import jax

import ckptmgr
from ckptmgr.processes import background


def install():
    """From now on an implicit transfer in ckptmgr raises. A test that makes some in a callback says `allowed`."""
    for kind in (ckptmgr.CheckpointManager, ckptmgr.SaveResult):
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and (not name.startswith("_") or name in ("__init__", "__exit__")):
                setattr(kind, name, _guarded(method))
    background.Background._work = _guarded(background.Background._work)


def allowed():
    return jax.transfer_guard("allow")


def _guarded(method):
    @functools.wraps(method)
    def call(*args, **kwargs):
        with jax.transfer_guard("disallow"):
            return method(*args, **kwargs)

    return call

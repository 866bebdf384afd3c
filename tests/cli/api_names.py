"""Names of our Python API, which the command line does not use in what it says."""

import inspect
import re

import ckptmgr
from ckptmgr import interop


def _arguments():
    """The names of the arguments of our functions, as an error may spell them: `on_exists=`."""
    manager = ckptmgr.CheckpointManager
    calls = [manager, *(getattr(manager, name) for name in dir(manager) if name[0] != "_"), interop.read]
    found = {name for call in calls if callable(call) for name in inspect.signature(call).parameters}
    return "|".join(sorted(found - {"self"}))


_METHODS = "|".join(name for name in dir(ckptmgr.CheckpointManager) if name[0] != "_")
_CLASSES = "|".join(name for name in ckptmgr.__all__ if name[0].isupper())
_FORMS = [
    rf"\b({_arguments()})=",
    rf"\b({_METHODS})\(",
    r"\b(manager|interop|ckptmgr)\.[a-z_]+\(?",
    rf"\b({_CLASSES})\b",
    r"\b(params_only|read_only|on_exists|restore_or)\b",
    r"\b(latest|best|every_steps|every_seconds)\(",
]


def found_in(said):
    """The names of ours in a text; none if it is in the words of the command line."""
    return [each.group() for form in _FORMS for each in re.finditer(form, said)]

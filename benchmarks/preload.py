"""What every measured process has imported before it starts; see `fresh`."""

import contextlib
import gc
import importlib

from absl import logging

from benchmarks import distributed, measure, memory, series

libraries = ("ckptmgr", "orbax.checkpoint", "safetensors.numpy", "torch.distributed.checkpoint")
for name in (*libraries, "benchmarks.agreements", "benchmarks.parts"):  # the version before has no place for these
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

logging.set_verbosity(logging.ERROR)  # stock Orbax logs hundreds of lines for each save
gc.collect()
gc.freeze()  # else each collection between two measurements walks the million objects of these libraries

__all__ = ["distributed", "measure", "memory", "series"]

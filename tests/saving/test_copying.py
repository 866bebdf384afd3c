"""From the items of a step to the copies that wait to be written."""

import jax
import numpy as np

from ckptmgr.options import Options
from ckptmgr.saving import copying, items


def test_what_each_process_may_have_of_its_own_is_compared_whole_whatever_memory_may_be_held(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def digest(last):
        state = {"a": np.zeros(100), "b": np.full(100, last)}
        composed = items.Composer().compose(1, {"w": np.zeros(3)}, None, {"mine": state}, {})
        copied = copying.Copier(Options(max_host_bytes=100)).copy(1, 0.0, composed)
        return copied.contents["mine"].digest()

    assert digest(0.0) == digest(0.0) != digest(1.0)

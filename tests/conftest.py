"""Every test runs with eight CPU devices, and with what one process saves read by the next."""

import contextlib
import ctypes
import gc
import itertools
import math
import os
import signal
import socket

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import guard
import jax
import pytest
from hypothesis import HealthCheck, settings
from jax.sharding import AxisType

from ckptmgr.processes import background

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts with `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)
guard.install()

settings.register_profile("ci", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("ci")

SOAK = bool(os.environ.get("CKPTMGR_SOAK"))

if os.environ.pop("CI", None):  # with it pytest prints the whole difference of two values: minutes for a megabyte
    os.environ["CKPTMGR_CI"] = "true"
ON_CI = "CKPTMGR_CI" in os.environ
"""Whether no test may be skipped because something is not installed."""


in_background = pytest.mark.skipif(
    not background.CAN_OUTLIVE_MAIN, reason="on CPython 3.12.0 to 3.12.2 a process saves synchronously"
)
"""For tests of processes that save in the background."""
background.CAN_OUTLIVE_MAIN = True  # for managers in the process of the tests, which saves nothing as it ends


def counted(few: int, full: int) -> int:
    """How often a long check is repeated: `few` times in `make test`, `full` times in `make soak`."""
    return full if SOAK else few


ENDED = itertools.count(1)


def pytest_runtest_teardown():
    """Memory goes back to the system now and then: tests compile much, and glibc keeps what is freed."""
    if next(ENDED) % 100 == 0:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


def visible(directory):
    """What is in a directory, but for what a manager hides there while it is open."""
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


@pytest.fixture(scope="session", params=["default axes", "auto axes"])
def make_mesh(request):
    """Makes meshes as users do: with the axes that `jax.make_mesh` gives (explicit), and with automatic ones."""

    def make(**axes):
        devices = jax.devices()[: math.prod(axes.values())]
        kinds = {} if request.param == "default axes" else {"axis_types": (AxisType.Auto,) * len(axes)}
        return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices, **kinds)

    return make


def free_port():
    """A port for a server of this test."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture
def nobody(tmp_path):
    """Root may look into everything: here it is somebody else, to whom the test's directory belongs."""
    if os.geteuid() != 0:
        yield lambda: None
        return

    def become():
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)

    for path in tmp_path.parents:
        path.chmod(path.stat().st_mode | 0o055)
    yield become
    os.seteuid(0)


ON_SERVERS = [
    pytest.mark.xdist_group("remote"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # clients of fsspec close when Python ends
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
"""The marks of tests that use `servers`."""


def on_servers(test):
    """Gives one test these marks."""
    for mark in ON_SERVERS:
        test = mark(test)
    return test


@pytest.fixture(scope="session")
def servers():
    """The environment that leads to two servers, which end with the tests."""
    from benchmarks import counting

    with counting.server("gs") as gs, counting.server("s3") as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in counting.environment(gs, s3).items():
            patch.setenv(name, value)
        yield

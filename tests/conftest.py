"""Every test runs with eight CPU devices, and with what one process saves read by the next."""

import os
import socket

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("ci")

SOAK = bool(os.environ.get("CKPTMGR_SOAK"))


def counted(few: int, full: int) -> int:
    """How often a long check is repeated: `few` times in `make test`, `full` times in `make soak`."""
    return full if SOAK else few


def visible(directory):
    """What is in a directory, but for what a manager hides there while it is open."""
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


def free_port():
    """A port for a server of this test."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]

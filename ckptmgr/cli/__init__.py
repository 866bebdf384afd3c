"""The command line: `ckptmgr --help`. It needs the extra [cli]."""

from __future__ import annotations

import importlib.metadata
import os
import sys


def main() -> None:
    """Runs the command line, or says what it needs to be installed."""
    if sys.argv[1:] == ["--version"]:  # at once: the imports below take seconds
        return print(f"ckptmgr {importlib.metadata.version('ckptmgr')}")
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as problem:
        sys.exit(f"the command line needs {problem.name}: pip install 'ckptmgr[cli]'")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # so that a look at a run takes no GPU from its training
    try:
        from ckptmgr.cli.app import run

        run()
    except KeyboardInterrupt:  # during the imports
        print("ckptmgr: interrupted", file=sys.stderr)
        sys.exit(130)

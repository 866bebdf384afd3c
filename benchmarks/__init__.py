"""ckptmgr beside pickle, stock Orbax, safetensors and torch DCP: `python -m benchmarks --help`.

The process of the command line touches no device: everything that is measured runs in a process of its own
(`fresh`), so that no measurement inherits memory, threads or devices from the one before.
"""

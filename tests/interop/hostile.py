"""Files that would take the memory or the time of whoever reads them; all of them small enough to be mailed.

    python hostile.py FOLDER CASE...

writes each file, reads it with `interop.read`, and prints what came of it, in bounded memory and time.
"""

import json
import pathlib
import pickle
import resource
import signal
import struct
import sys
import zipfile

import jax
import msgpack
import numpy as np
import optax

from ckptmgr import interop
from ckptmgr.interop import pickles

ROOM_BYTES = 2 << 30
CASE_S = 30
MODULUS = sys.hash_info.modulus
DEEP = 1_000_000
ARRAY = b"cnumpy._core.numeric\n_frombuffer\n"
FLOAT = b"cnumpy\ndtype\n(S'f4'\nI00\nI01\ntR"
U1 = b"cnumpy\ndtype\n(S'u1'\nI00\nI01\ntR"


def name(full):
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def whole(body):
    return b"\x80\x04" + body + b"."


def tuples(depth):
    return b")" + b"\x85" * depth


def long(value):
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def memo(place):
    return b"j" + struct.pack("<I", place)


def named_again(count, made, each):
    """Makes something, then a list of what is made of it so many times."""
    return whole(made + b"\x940](" + each * count + b"e")


def laughs(levels, times):
    """A list of lists of lists, each of which holds one other so many times."""
    body, place = b"]\x94", 0
    for _ in range(levels):
        body = body + b"](" + memo(place) * times + b"e\x94"
        place += 1
    return whole(body)


def shape_of(*sizes):
    raw = b"C\x04abcd"
    return whole(ARRAY + b"(" + raw + FLOAT + b"(" + b"".join(sizes) + b"tS'C'\ntR")


def dtype_of(text):
    return whole(ARRAY + b"(C\x04abcdcnumpy\ndtype\n(X" + struct.pack("<I", len(text)) + text + b"tR(K\x01tS'C'\ntR")


RAW = b"\x8e" + struct.pack("<Q", 4 << 20) + bytes(4 << 20)
TEXT = b"X" + struct.pack("<I", 4 << 20) + b"x" * (4 << 20)
PICKLES = {
    "a key of nested tuples": lambda: whole(b"}" + tuples(DEEP) + b"K\x01s"),
    "nested tuples": lambda: whole(tuples(DEEP)),
    "nested lists": lambda: whole(b"]" * DEEP + b"a" * (DEEP - 1)),
    "nested dicts": lambda: whole(b"}K\x01" * DEEP + b"}" + b"s" * DEEP),
    "a list in itself": lambda: whole(b"]\x94h\x00a"),
    "a nested shape": lambda: shape_of(tuples(DEEP)),
    "a nested order": lambda: whole(ARRAY + b"(C\x01a" + U1 + b"(K\x01t" + tuples(DEEP) + b"tR"),
    "a nested state of a dtype": lambda: whole(
        ARRAY + b"(C\x01a" + U1 + b"(K\x03" + tuples(DEEP) + b"tb(K\x01tS'C'\ntR"
    ),
    "a nested kind of a tree": lambda: whole(name("jaxlib._jax.pytree.PyTreeDef") + b")\x81(N((" + tuples(DEEP) + b"K\x00Ntttb"),
    "a nested tree": lambda: whole(
        name("jaxlib._jax.pytree.PyTreeDef") + b")\x81(N((" + b"(K\x02K\x00Nt" + b"(K\x02K\x01Nt" * 200_000 + b"ttb"
    ),
    "an array of one raw 1,000 times": lambda: named_again(
        1000, RAW, ARRAY + b"(h\x00" + U1 + b"(J" + struct.pack("<i", 4 << 20) + b"tS'C'\ntR"
    ),
    "a text encoded 1,000 times": lambda: named_again(1000, TEXT, b"c_codecs\nencode\n(h\x00S'latin1'\ntR"),
    "an array named 1,000 times": lambda: named_again(
        1000, ARRAY + b"(" + RAW + U1 + b"(J" + struct.pack("<i", 4 << 20) + b"tS'C'\ntR", b"h\x00"
    ),
    "lists of lists, 10 of each, 30 deep": lambda: laughs(30, 10),
    "lists of lists, 2 of each, 90 deep": lambda: laughs(90, 2),
    "an array of 20 GB": lambda: shape_of(b"\x8a\x05" + (5 * 10**9).to_bytes(5, "little")),
    "a shape of 100,000 sizes": lambda: shape_of(*[b"K\x01"] * 100_000),
    "sizes of a megabyte": lambda: shape_of(*[b"\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20)] * 10),
    "a size of no number": lambda: shape_of(b"S'4'\n"),
    "a size below zero": lambda: shape_of(b"J\xff\xff\xff\xff"),
    "a dtype of many fields": lambda: dtype_of(b"f4," * 1_000_000),
    "a dtype of many numbers": lambda: dtype_of(b"(1000000000,1000)f4"),
    "a dtype of one large text": lambda: dtype_of(b"S2000000000"),
    "a frame of 2**62 bytes": lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N",
    "bytes of 2**62": lambda: whole(b"\x8e" + struct.pack("<Q", 1 << 62)),
    "a bytearray of 2**40": lambda: whole(b"\x96" + struct.pack("<Q", 1 << 40)),
    "text of 2**62": lambda: whole(b"\x8d" + struct.pack("<Q", 1 << 62)),
    "a number of 2**31 bytes": lambda: whole(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "a number of a million digits": lambda: whole(b"I" + b"9" * DEEP + b"\n"),
    "a place of 2**32 in the memo": lambda: whole(b"Nr\xff\xff\xff\xff"),
    "300,000 keys of one hash": lambda: whole(
        b"}(" + b"".join(long(at * MODULUS) + b"N" for at in range(300_000)) + b"u"
    ),
    "a name of 10 MB": lambda: whole(b"c" + b"x" * (10 << 20) + b"\nevil\n"),
    "a persistent name of 10 MB": lambda: whole(b"P" + b"x" * (10 << 20) + b"\n"),
}  # fmt: skip
PICKLES |= {
    f"nested arguments of {full}": lambda full=full: whole(name(full) + tuples(DEEP) + b"R")
    for full in ("numpy._core.numeric._frombuffer", "collections.OrderedDict", "flax.core.frozen_dict.FrozenDict",
                 "jax._src.array._reconstruct_array", "numpy.dtype", "builtins.complex", "copyreg._reconstructor",
                 "optax._src.base.EmptyState")
}  # fmt: skip
CASES = {f"{case}.pkl": make for case, make in PICKLES.items()}


def main(folder, *cases):
    """Runs the cases; before the first and after each, an honest file."""
    data, expected = honest()
    room = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for case in cases:
        path = pathlib.Path(folder) / case.replace("/", "")
        CASES[case](path) if CASES[case].__code__.co_argcount == 1 and "full" not in CASES[case].__code__.co_varnames else path.write_bytes(CASES[case]())
        print(json.dumps({"begins": case}), flush=True)
        signal.alarm(CASE_S)
        try:
            interop.read(path)
            said = {"error": None}
        except BaseException as problem:
            said = {"error": type(problem).__name__, "message": str(problem)}
        signal.alarm(0)
        found = pickles.loads(data)
        same = jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, found, expected))
        print(json.dumps({"case": case, "honest": bool(same)} | said), flush=True)


def honest():
    tree = {"w": np.arange(5.0), "state": optax.adam(0.1).init({"w": jax.numpy.ones(3, jax.numpy.bfloat16)})}
    return pickle.dumps(tree), tree


if __name__ == "__main__":
    main(*sys.argv[1:])

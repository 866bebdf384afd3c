"""Files that would take the memory or the time of whoever reads them; all of them small enough to be mailed.

    python hostile.py FOLDER CASE...

writes each file, reads it with `interop.read`, and prints what came of it, in bounded memory and time.
"""

import io
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
DEEP = 300_000  # so many nested tuples overflow the C stack when they are hashed
NESTED = 20_000
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
    data = value.to_bytes(12, "little", signed=True)
    return b"\x8a\x0c" + data


def memo(place):
    return b"j" + struct.pack("<I", place)


def named_again(count, made, each):
    """Makes something, then a list of what is made of it so many times."""
    return whole(made + b"\x940](" + each * count + b"e")


def laughs(levels, times):
    """A list of lists of lists, each of which holds one other so many times."""
    body = b"]\x94" + b"".join(b"](" + memo(place) * times + b"e\x94" for place in range(levels))
    return whole(body)


def shape_of(*sizes):
    raw = b"C\x04abcd"
    return whole(ARRAY + b"(" + raw + FLOAT + b"(" + b"".join(sizes) + b"tS'C'\ntR")


def dtype_of(text):
    return whole(
        ARRAY + b"(C\x04abcdcnumpy\ndtype\n(X" + struct.pack("<I", len(text)) + text + b"tR(K\x01tS'C'\ntR"
    )


def tree_of(nodes):
    return whole(name("jaxlib._jax.pytree.PyTreeDef") + b")\x81(N(" + nodes + b"ttb")


RAW = b"\x8e" + struct.pack("<Q", 4 << 20) + bytes(4 << 20)
TEXT = b"X" + struct.pack("<I", 4 << 20) + b"x" * (4 << 20)
PICKLES = {
    "a key of nested tuples": lambda: whole(b"}" + tuples(DEEP) + b"K\x01s"),
    "nested tuples": lambda: whole(tuples(NESTED)),
    "nested lists": lambda: whole(b"]" * NESTED + b"a" * (NESTED - 1)),
    "nested dicts": lambda: whole(b"}K\x01" * NESTED + b"}" + b"s" * NESTED),
    "a list in itself": lambda: whole(b"]\x94h\x00a"),
    "a nested shape": lambda: shape_of(tuples(NESTED)),
    "a nested order": lambda: whole(ARRAY + b"(C\x01a" + U1 + b"(K\x01t" + tuples(NESTED) + b"tR"),
    "a nested state of a dtype": lambda: whole(
        ARRAY + b"(C\x01a" + U1 + b"(K\x03" + tuples(NESTED) + b"tb(K\x01tS'C'\ntR"
    ),
    "a nested kind of a tree": lambda: tree_of(b"(" + tuples(DEEP) + b"K\x00Nt"),
    "a nested tree": lambda: tree_of(b"(K\x02K\x00Nt" + b"(K\x02K\x01Nt" * NESTED),
    "a tree that takes more than there is": lambda: tree_of(b"(K\x02J\xff\xff\xff\x7fNt"),
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
    "a number of many digits": lambda: whole(b"I" + b"9" * DEEP + b"\n"),
    "a place of 2**32 in the memo": lambda: whole(b"Nr\xff\xff\xff\xff"),
    "200,000 keys of one hash": lambda: whole(
        b"}(" + b"".join(long(at * MODULUS) + b"N" for at in range(200_000)) + b"u"
    ),
    "a name of 10 MB": lambda: whole(b"c" + b"x" * (10 << 20) + b"\nevil\n"),
    "a persistent name of 10 MB": lambda: whole(b"P" + b"x" * (10 << 20) + b"\n"),
}  # fmt: skip
PICKLES |= {
    f"nested arguments of {full}": lambda full=full: whole(name(full) + tuples(NESTED) + b"R")
    for full in ("numpy._core.numeric._frombuffer", "collections.OrderedDict", "flax.core.frozen_dict.FrozenDict",
                 "jax._src.array._reconstruct_array", "numpy.dtype", "builtins.complex", "copyreg._reconstructor",
                 "optax._src.base.EmptyState")
}  # fmt: skip


def tensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


SAFETENSORS = {
    "nothing": lambda: b"",
    "a header of 2**62 bytes": lambda: tensors({}, length=1 << 62),
    "a header longer than the file": lambda: tensors({}, length=50 << 20),
    "a header that is no text": lambda: tensors(b"\xff" * 100),
    "a nested header": lambda: tensors(b"[" * NESTED),
    "tensors that overlap": lambda: tensors({"a": tensor(0, 8, (2,)), "b": tensor(4, 12, (2,))}, bytes(12)),
    "a tensor outside of the file": lambda: tensors({"a": tensor(0, 1 << 40, (1 << 38,))}, bytes(4)),
    "a tensor that ends before it begins": lambda: tensors({"a": tensor(4, 0)}, bytes(4)),
    "a shape of 2**124": lambda: tensors({"a": tensor(0, 4, (1 << 62, 1 << 62))}, bytes(4)),
    "a shape larger than the data": lambda: tensors({"a": tensor(0, 4, (5 * 10**9,))}, bytes(4)),
    "a size of NaN": lambda: tensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "a size of 1e400": lambda: tensors(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', bytes(4)),
    "a size below zero": lambda: tensors(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    "a dtype that is not known": lambda: tensors({"a": tensor(dtype="F31")}, bytes(4)),
    "bytes that no tensor has": lambda: tensors({"a": tensor()}, bytes(1 << 20)),
    "a nested name": lambda: tensors({"a/" * NESTED: tensor()}, bytes(4)),
}  # fmt: skip


def index(file, name="w"):
    return json.dumps({"weight_map": {name: file}}).encode()


INDEXES = {
    "nested": lambda: b"[" * NESTED,
    "no dict": lambda: b"[]",
    "a list of files": lambda: b'{"weight_map": ["x"]}',
    "a file that is a number": lambda: b'{"weight_map": {"w": 3}}',
    "a file above": lambda: index("../x.safetensors"),
    "a file elsewhere": lambda: index("/etc/passwd"),
    "the folder above": lambda: index(".."),
    "this folder": lambda: index("."),
    "no name": lambda: index(""),
    "a name that ends early": lambda: index("x\0.safetensors"),
    "a file that is not there": lambda: index("missing.safetensors"),
    "a file without an end": lambda: index("endless"),
    "a queue": lambda: index("queue"),
}  # fmt: skip


def npz(members, how=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name_, data in members.items():
            archive.writestr(name_, data)
    return file.getvalue()


def npy(shape, data=bytes(4), dtype="'<f4'"):
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


def small_lie():
    """A member whose directory says that it is small."""
    data = bytearray(npz({"a.npy": npy("(26214400,)", bytes(100 << 20))}))
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 100)
    return bytes(data)


ARCHIVES = {
    "nothing": lambda: b"",
    "zeros, 1,000 times as large": lambda: npz({"a.npy": npy("(26214400,)", bytes(100 << 20))}),
    "the same by bzip2": lambda: npz({"a.npy": npy("(2621440,)", bytes(10 << 20))}, zipfile.ZIP_BZIP2),
    "a size that is a lie": small_lie,
    "a shape of 4 TB": lambda: npz({"a.npy": npy("(1000000000000,)")}),
    "a shape of 2**124": lambda: npz({"a.npy": npy(f"({1 << 62}, {1 << 62})")}),
    "a shape below zero": lambda: npz({"a.npy": npy("(-1,)")}),
    "a nested header": lambda: npz({"a.npy": npy("(" * 5000 + ")" * 5000)}),
    "a header of 4 GB": lambda: npz({"a.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}),
    "objects": lambda: npz({"a.npy": npy("(1,)", pickle.dumps([1]), "'|O'")}),
    "no array": lambda: npz({"a.npy": b"text", "b": b"text"}),
    "a version of the future": lambda: npz({"a.npy": b"\x93NUMPY\x09\x00"}),
    "a nested name": lambda: npz({"a/" * 20_000 + ".npy": npy("(1,)")}),
}  # fmt: skip


def flax_array(shape, data=bytes(4)):
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, "float32", data))))


def lists(count, size=4_000_000):
    """Lists within each other, each of which promises so many values; then as many bytes as one of them has."""
    return (b"\xdd" + struct.pack(">I", size)) * count + bytes(size + 1_000_000)


def extension(body):
    return b"\x81\xa1w" + msgpack.packb(msgpack.ExtType(1, body))


def chunked(shape, chunks):
    head = {"__msgpack_chunked_array__": True, "shape": shape}
    return b"\x81\xa1w\x83" + msgpack.packb(head)[1:] + b"\xa6chunks" + chunks


MSGPACKS = {
    "nothing": lambda: b"",
    "nested lists": lambda: b"\x91" * NESTED,
    "nested dicts": lambda: b"\x81\xa1a" * NESTED + b"\xc0",
    "dicts 900 deep": lambda: b"\x81\xa1a" * 900 + b"\xc0",
    "a list of 2**32": lambda: b"\xdd\xff\xff\xff\xff",
    "500 lists of 4 million each": lambda: b"\x81\xa1a" + lists(500),
    "90 lists of 4 million each": lambda: b"\x81\xa1a" + lists(90),
    "the same within an array": lambda: extension(b"\x93" + lists(90)),
    "a text of 2**32": lambda: b"\xdb\xff\xff\xff\xff",
    "an extension of 2**32": lambda: b"\xc9\xff\xff\xff\xff\x01",
    "an array of 2**62": lambda: b"\x81\xa1w" + flax_array((1 << 62,)),
    "an array without a shape": lambda: b"\x81\xa1w" + flax_array("x"),
    "a nested shape": lambda: extension(b"\x93" + b"\x91" * 100_000 + b"\x01\xa7float32\xc4\x00"),
    "objects": lambda: extension(msgpack.packb(((1,), "object", bytes(8)))),
    "chunks of another size": lambda: chunked({"0": 10**12}, b"\x81\xa10" + flax_array((1,))),
    "chunks without an array": lambda: chunked({"0": 1}, b"\x80"),
    "more than one value": lambda: b"\x80\x80",
    "a dict as a key": lambda: b"\x81\x80\xc0",
    "a nested key": lambda: b"\x81" + b"\x91" * NESTED + b"\xc0\xc0",
}  # fmt: skip
FILES = {
    **{f"{case}.pkl": make for case, make in PICKLES.items()},
    **{f"{case}.safetensors": make for case, make in SAFETENSORS.items()},
    **{f"{case}.safetensors.index.json": make for case, make in INDEXES.items()},
    **{f"{case}.npz": make for case, make in ARCHIVES.items()},
    **{f"{case}.msgpack": make for case, make in MSGPACKS.items()},
}


def main(folder, *cases):
    """Reads each file, and an honest one after it."""
    folder = pathlib.Path(folder)
    data, expected = honest()
    for case in cases:
        (folder / case).write_bytes(FILES[case]())
    room = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for case in cases:
        print(json.dumps({"case": case}), flush=True)  # if it ends the process, this is the last line
        signal.alarm(CASE_S)
        said = outcome(folder / case)
        signal.alarm(0)
        same = jax.tree.map(
            lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), pickles.loads(data), expected
        )
        print(json.dumps({"case": case, "honest": bool(jax.tree.all(same)), **said}), flush=True)


def outcome(path):
    try:
        interop.read(path)
    except Exception as problem:
        return {"error": type(problem).__name__, "message": str(problem)}
    return {"error": None, "message": ""}


def honest():
    tree = {"w": np.arange(5.0), "state": optax.adam(0.1).init({"w": jax.numpy.ones(3, jax.numpy.bfloat16)})}
    return pickle.dumps(tree), tree


if __name__ == "__main__":
    main(*sys.argv[1:])

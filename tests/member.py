"""One process of a job: `python member.py DIRECTORY PORT COUNT INDEX DEVICES MODE ...`, to be killed or looked at.

save STEP...        saves these steps, sharded over all devices of all processes
load [STEP]         restores one onto all devices of all processes, and checks every bit that this process has
readers HOW         restores the newest step; by a layout or a template that names no devices (HOW)
shared AXES BROADCAST  restores all sorts of arrays over a grid of AXES; says how many bytes it read ("bounded":
                    broadcast under max_host_bytes)
train SAVE_EVERY    trains under a preemption_guard, on and on; says `done N` after each step
slow                saves two steps, and waits for each, in vain if a fault makes it slow
clock               asks a clock of its own whether to save
paced POLICY        saves as often as it pays, by clocks that differ; says which steps
attempt STEP...     saves steps, and says what came of each call; `2:0` is saved by process 0 alone
results STEP...     the same, and waits for each
apart               each process but the first comes late to each save; says how long a call took, and asked whom
differs             process 1 gives something else, in every way; says what came of it
stages              each process has arrays of its own, as the stages of a pipeline have; then restores them
balanced            saves arrays that several processes hold, replicated and on a grid, and restores them
frozen STEP...      saves arrays of which only a small one changes, and says what this process wrote for each step
mirrored STEP...    saves arrays that all processes hold, and says what this process has copied to the mirror
crowd STEP...       restores and checks the newest step, then saves these, and checks the last
callback            saves in `on_commit`
together            each process fails in another way in one call
own save|load       each process has iterators of its own
milestones          saves under `params_only`, and asks for what is gone
rewind              saves, goes back, saves on, and comes back; says what a step that is nowhere gives
poisoned NONFINITE  saves a good step, then some with NaN in one shard, or in an array of process 1 alone
emergency WHAT      restores and saves; then saves, or restores, on and on. Says what came of it, and when
reader              each process in turn reads alone beside the others, then all do
"""

import ctypes
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
from warm import say


def state(step):
    """Every value is made from the step, so that a mixture of two is seen."""
    rows = np.arange(16 * 1024, dtype=np.float32).reshape(64, 256)  # large enough for chunks of their own
    return {
        "w": rows * 100 + step,
        "b": np.full(8, step, np.float32),
        "odd": np.arange(7, dtype=np.int8) + step % 9,
    }


def spread(mesh, step):
    """The same on devices: sharded, replicated, on one device, on the host, and a key."""
    values, local = state(step), jax.local_devices()[0]
    w, b = (jax.make_array_from_callback(
        values[name].shape, NamedSharding(mesh, spec), lambda index, name=name: values[name][index]
    ) for name, spec in (("w", P("data")), ("b", P())))  # fmt: skip
    keyed = {"key": NamedSharding(mesh, P()), "keys": NamedSharding(mesh, P("data"), memory_kind="pinned_host")}
    return {
        "w": w, "b": b, "odd": values["odd"], "one": jax.device_put(values["b"], local), "number": step,
        **{name: spread_keys(key_bits(step)[name], where) for name, where in keyed.items()},
    }  # fmt: skip


def key_bits(step):
    """What the keys are made of: one key, and one for each row."""
    return {"key": np.array([7, step], np.uint32), "keys": np.arange(32, dtype=np.uint32).reshape(16, 2) + step}


def spread_keys(bits, sharding):
    return jax.random.wrap_key_data(jax.make_array_from_callback(bits.shape, sharding, lambda index: bits[index]))


def check(found, step):
    values = state(step)
    assert found["number"] == step
    for name in ("w", "b"):
        for shard in found[name].addressable_shards:
            assert np.array_equal(np.asarray(shard.data), values[name][shard.index]), name
    assert np.array_equal(found["odd"], values["odd"])
    assert np.array_equal(np.asarray(found["one"]), values["b"])
    for name, bits in key_bits(step).items():
        for shard in jax.random.key_data(found[name]).addressable_shards:
            assert np.array_equal(np.asarray(shard.data), bits[shard.index]), name


def save(directory, mesh, *steps):
    with ckptmgr.CheckpointManager(directory, keep=2, mirror=MIRROR, timeout_s=TIMEOUT_S) as manager:
        for step in map(int, steps):
            params = spread(mesh, step)
            optimizer = optax.adam(1e-3)
            trained = {"w": params["w"]}
            manager.save(
                step, params, optimizer.init(trained), extras={"at": {"n": step}}, metrics={"loss": 1 / step}
            )
        manager.wait()
        say("steps", *manager.steps())


def readers(directory, mesh, how):
    """Restores one array onto all devices, without an array of the template that says so."""
    explicit = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(EXPLICIT,))
    if how != "abstract":
        jax.set_mesh(mesh)
    place = NamedSharding(explicit.abstract_mesh, P("data"))
    w = jax.ShapeDtypeStruct((64, 256), np.float32, sharding=place if how == "abstract" else None)
    layout = {
        "spec": P("data"),
        "specs": {"w": P("data")},
        "function": lambda path, leaf: P("data"),
        "abstract": None,
    }
    recorded.check_files = lambda *given, **how: None  # as for files of more than 8 MiB: their chunks are checked
    reader = ckptmgr.CheckpointManager(directory, read_only=True, timeout_s=TIMEOUT_S)
    found = reader.restore(params={"w": w}, layout=layout[how], partial=True)
    for shard in found.params["w"].addressable_shards:
        assert np.array_equal(np.asarray(shard.data), state(found.step)["w"][shard.index])
    say("restored", found.step, "skipped", *found.skipped)


def load(directory, mesh, *step):
    manager = ckptmgr.CheckpointManager(directory, read_only=True, mirror=MIRROR, timeout_s=TIMEOUT_S)
    template = spread(mesh, 0)
    found = manager.restore(*map(int, step), params=template, extras={"at": {"n": 0}})
    check(found.params, found.step)
    for name in ("w", "key", "keys"):
        assert found.params[name].sharding == template[name].sharding, name
    assert found.extras == {"at": {"n": found.step}}
    told = []
    mine = Iterator({"n": 0})
    mine.set_state = told.append
    manager.restore(*map(int, step), params=template, extras={"at": mine})
    assert told == [{"n": found.step}]  # and not what one process alone could read
    adam = manager.restore(
        found.step, optimizer=optax.adam(1e-3), params={"w": template["w"]}, layout=mesh, partial=True
    )
    assert adam.opt_state[0].mu["w"].sharding == template["w"].sharding
    assert adam.opt_state[0].count.sharding == NamedSharding(mesh, P())
    say("restored", found.step, "skipped", *found.skipped)


def together(directory, _):
    """Each process fails in another way in the same call."""
    line, here = Job(f"{directory}/test", TIMEOUT_S), jax.process_index()
    problems = [
        ckptmgr.CheckpointNotFoundError("gone", directory=directory, step=1),
        ckptmgr.CorruptCheckpointError("damaged", step=1),
        ValueError("wrong"),
    ]

    def fail():
        raise problems[here]

    try:
        line.together(Call("a test"), fail)
    except Exception as problem:
        say(type(problem).__name__, problem)


def callback(directory, mesh):
    """A callback runs in process 0 alone, and saves must be made by all."""
    told, params = [], spread(mesh, 1)

    def again(info):
        try:
            manager.save(info.step + 100, params)
        except ckptmgr.SaveError as problem:
            told.append(str(problem))

    with ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S, on_commit=again) as manager:
        manager.save(1, spread(mesh, 1))
        manager.save(2, spread(mesh, 2))
    say("steps", *manager.steps(), "told", len(told), *told[:1])


LATE_S = 2.0
BITS = np.array([0x80000000, 0x7FC00001, 0xFF800001, 0], np.uint32).view(np.float32)  # -0.0 and NaNs


def results(directory, mesh, *steps):
    attempt(directory, mesh, *steps, waits=True)


def attempt(directory, mesh, *steps, waits=False):
    own = directory.replace("INDEX", str(jax.process_index()))
    manager = ckptmgr.CheckpointManager(own, timeout_s=TIMEOUT_S)
    for each in steps:
        step, _, only = each.partition(":")
        if only in ("", str(jax.process_index())):
            try:
                result = manager.save(int(step), spread(mesh, int(step)))
                came_of_it = bool(result.result() if waits and result else result)
            except ckptmgr.CheckpointError as problem:
                came_of_it = f"{type(problem).__name__} {problem}"
            say(step, came_of_it)
    manager.close()
    say("steps", *manager.steps())


class Watched:
    """The coordinator; notes which questions this thread asks."""

    def __init__(self, coordinator):
        self.coordinator, self.thread, self.calls = coordinator, threading.get_ident(), []

    def __getattr__(self, name):
        if threading.get_ident() == self.thread:
            self.calls.append(name)
        return getattr(self.coordinator, name)


def apart(directory, mesh):
    took = []
    with ckptmgr.CheckpointManager(directory, keep=2, timeout_s=TIMEOUT_S) as manager:
        manager.save(1, spread(mesh, 1)).result()
        manager.wait()
        watched = Watched(manager._job._coordinator)
        manager._job._coordinator = manager._pending.job._coordinator = watched
        for step in (2, 3, 4):
            params = spread(mesh, step)
            time.sleep(LATE_S * (jax.process_index() > 0))
            began = time.perf_counter()
            result = manager.save(step, params)
            took.append(time.perf_counter() - began)
            result.result()
            manager.wait()
        calls, watched.thread = list(watched.calls), None
    say("apart", max(took) < LATE_S / 2, calls)


OTHERS = {
    "tree": lambda tree: tree | {"more": np.zeros(2)},
    "missing": lambda tree: {name: leaf for name, leaf in tree.items() if name != "odd"},
    "dtype": lambda tree: tree | {"odd": tree["odd"].astype(np.float16)},
    "shape": lambda tree: tree | {"odd": tree["odd"][:3]},
    "kind": lambda tree: tree | {"number": float(tree["number"])},
    "weak": lambda tree: tree | {"one": jax.lax.full((8,), 1.0) * 1.0},
    "sharding": lambda tree: tree | {"w": whole_everywhere(tree["w"].shape, tree["b"].sharding)},
    "container": lambda tree: tree | {"list": list(tree["list"])},
}


def whole_everywhere(shape, sharding):
    return jax.make_array_from_callback(shape, sharding, lambda index: state(0)["w"][index])


def differs(directory, mesh):
    is_other = jax.process_index() == 1
    with ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S) as manager:

        def attempt(step, params, **given):
            try:
                return bool(manager.save(step, params, **given).result())
            except ckptmgr.SaveError as problem:
                return problem

        for step, (name, change) in enumerate(OTHERS.items(), start=1):
            tree = spread(mesh, step) | {"list": (np.zeros(1), np.ones(1))}
            say(name, attempt(step, change(tree) if is_other else tree))
        say("extra", attempt(100, spread(mesh, 1), extras={"mine": [1]} if is_other else None))
        buffer = Iterator({"buffer": np.zeros(2 + is_other)})
        say("state", attempt(100, spread(mesh, 1), extras={"it": buffer}))
        say("same", attempt(101, spread(mesh, 101)))
    say("steps", *manager.steps())


def stages(directory, mesh):
    """One array on the devices of each process, one of its own in each, and one that all share."""

    def array(shape, where, values):
        return jax.make_array_from_callback(shape, where, lambda index: values[index], dtype=values.dtype)

    def tree(fill):
        found = {"all": array((8,), NamedSharding(mesh, P("data")), np.arange(8, dtype=np.float32) + fill)}
        for process in range(jax.process_count()):
            own = [device for device in jax.devices() if device.process_index == process]
            grid = jax.sharding.Mesh(np.array(own), ("stage",))
            values = np.arange(8, dtype=np.float32) * (process + 1) + fill
            found[f"split {process}"] = array((8,), NamedSharding(grid, P("stage")), values)
            found[f"whole {process}"] = array((8,), jax.sharding.SingleDeviceSharding(own[0]), values)
            words = array((2,), NamedSharding(grid, P()), np.array([process, fill], np.uint32))
            found[f"key {process}"] = jax.random.wrap_key_data(words)
        return found | {
            "mine": jax.device_put(np.full(3, jax.process_index() + fill, np.float32), jax.local_devices()[0])
        }

    for step, bound in ((1, None), (2, 16)):
        manager = ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S, max_host_bytes=bound)
        manager.save(step, tree(7.0)).result()
        back = manager.restore(params=tree(0.0)).params
        for name, expected in tree(7.0).items():
            assert back[name].sharding == expected.sharding, name
            for got, shard in zip(back[name].addressable_shards, expected.addressable_shards, strict=True):
                pair = [jax.random.key_data(each.data) if "key" in name else each.data for each in (got, shard)]
                assert np.array_equal(pair[0], np.full(3, 7.0) if name == "mine" else pair[1]), name
        manager.close()
    say("stages")


def held_by_several():
    """Odd and even sizes; one that is larger than a fair share, and many that are not."""
    draw = np.random.default_rng(0)
    large = {
        "odd": (1021, 517),
        "even": (64, 4096),
        "rows": (24, 128),
        "none": (4, 0),
        "scalar": (),
        "spread": (24, 100_000),
    }
    small = {f"small {n}": (17 + n, 33) for n in range(100)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in (large | small).items()}


def balanced(directory, _):
    mesh = jax.make_mesh((jax.process_count(), jax.local_device_count()), ("data", "model"))
    specs = {"even": P(None, "model"), "rows": P("data"), "spread": P("data")}
    params = {
        name: jax.make_array_from_callback(
            values.shape, NamedSharding(mesh, specs.get(name, P())), lambda index, values=values: values[index]
        )
        for name, values in held_by_several().items()
    }
    params["key"] = spread_keys(key_bits(7)["key"], NamedSharding(mesh, P()))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    with ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S) as manager:
        manager.save(1, params).result()
        assert not compiled, compiled
        back = manager.restore(params=params).params
    for name, values in held_by_several().items():
        for shard in back[name].addressable_shards:
            assert np.array_equal(shard.data, values[shard.index]), name
    say("balanced")


FROZEN = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)  # of several chunks in several processes


def frozen(directory, mesh, *steps):
    def spread(values, *spec):
        return jax.make_array_from_callback(values.shape, NamedSharding(mesh, P(*spec)), lambda at: values[at])

    params = {"rows": spread(FROZEN, "data"), "same": spread(FROZEN + 1)}
    with ckptmgr.CheckpointManager(directory, reuse_unchanged=True, timeout_s=TIMEOUT_S) as manager:
        for step in map(int, steps):
            trained = spread(np.full((64, 64), step, np.float32), "data")
            manager.save(step, params | {"trained": trained}, {"mu": trained}).result()
            part = Path(directory) / str(step) / "params" / f"ocdbt.process_{jax.process_index()}"
            new = [each.stat().st_size for each in (part / "d").iterdir()]
            say(step, sum(new))


def mirrored(directory, _, *steps):
    put, copied = transfer.put, {}

    def counted(source, draft, names):
        put(source, draft, names)
        copied.update({f"{source.name}/{name}": (source / name).stat().length for name in names})

    transfer.put = counted
    where = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), P())
    params = {
        name: jax.make_array_from_callback(values.shape, where, lambda index, values=values: values[index])
        for name, values in held_by_several().items()
    }
    own = MIRROR.replace("INDEX", str(jax.process_index()))
    extras = {"at": Iterator({"at": np.array([jax.process_index(), 7])})}
    with ckptmgr.CheckpointManager(directory, mirror=own, timeout_s=TIMEOUT_S) as manager:
        for step in map(int, steps):
            manager.save(step, params, extras=extras).result()
        manager.wait(60)
    say(json.dumps(copied))
    if "CKPTMGR_ALONE" in os.environ:
        os._exit(0)  # JAX would wait for the processes that are gone


def crowd(directory, _, *steps):
    mesh = jax.make_mesh((jax.process_count(), jax.local_device_count()), ("data", "model"))

    def array(name, values):
        place = NamedSharding(mesh, P("data") if name == "rows" else P())
        return jax.make_array_from_callback(values.shape, place, lambda index: values[index])

    def saved(step):
        found = {name: values + np.float32(step) for name, values in held_by_several().items()}
        return found | {"rows": np.arange(4096 * 96, dtype=np.float32).reshape(4096, 96) + step}

    def params(step):
        return {name: array(name, values) for name, values in saved(step).items()}

    def compare(found):
        for name, values in saved(found.step).items():
            for shard in found.params[name].addressable_shards:
                assert np.array_equal(shard.data, values[shard.index]), name

    manager = ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S)
    found = manager.restore_or(params=params(0))
    compare(found)
    say("resumed", found.step)
    for step in map(int, steps):
        manager.save(step, params(step)).result(9 * TIMEOUT_S)  # the job's own wait ends before
        say("durable", step)
    compare(manager.restore(params=params(0)))
    manager.close()
    say("steps", *manager.steps())


class Iterator:
    """A data iterator; `state` is JSON, bytes or numpy arrays."""

    def __init__(self, state, is_global=False):
        self.state, self.is_global = state, is_global

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def states(process):
    return {
        "json": Iterator({"at": process, "files": ["a"] * process}),
        "bytes": Iterator(bytes([process] * (2 + process))),
        "arrays": Iterator({"at": np.array([process, 7]), "rng": np.full(5, process + 0.5)}),
        "all": Iterator({"at": process}, is_global=True),
        "equal": Iterator({"at": np.arange(3)}),
        "plain": {"host": process},
    }


def own(directory, mesh, what):
    here, count = jax.process_index(), jax.process_count()
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))  # noqa: E731
    state_of = lambda extra: extra.state if isinstance(extra, Iterator) else extra  # noqa: E731
    with ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S) as manager:
        if what == "save":
            flushed, fsync = [], os.fsync
            os.fsync = lambda file: (flushed.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
            manager.save(count, spread(mesh, 1), extras=states(here)).result()
            os.fsync = fsync
            assert any("/json/" in path for path in flushed), flushed  # each process its own: nobody else can
            manager.save(100 + count, spread(mesh, 1), extras=states(0)).result()
        step = max(each for each in manager.steps() if each < 100)
        for at, saved_by in (
            (step, lambda name: 0 if name in ("all", "equal") else here),
            (100 + step, lambda _: 0),
        ):
            for name in states(0):
                template = states(50 + here)[name]
                if at == step != count and name not in ("all", "equal"):
                    with pytest.raises(ckptmgr.LayoutError, match=rf"{name} was saved by {step} processes"):
                        manager.restore(at, extras={name: template})
                    template, saved = Iterator(state_of(template), is_global=True), states(0)[name]
                else:
                    saved = states(saved_by(name))[name]
                found = manager.restore(at, extras={name: template}).extras[name]
                assert same(state_of(found), state_of(saved)), name
        every = manager.restore(step, layout=ckptmgr.HOST).extras
        for name in ("json", "bytes", "arrays", "plain"):
            assert same(every[name], [state_of(states(process)[name]) for process in range(step)]), name
        assert manager.verify(step)
    say("own")


def reader(directory, mesh):
    def read(layout):
        found = ckptmgr.CheckpointManager(directory, read_only=True, timeout_s=TIMEOUT_S).restore(layout=layout)
        assert found.params["number"] == found.step
        return found.step

    with ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S) as manager:
        for step in (1, 2):
            manager.save(step, spread(mesh, step)).result()
            if jax.process_index() == step - 1:
                assert read(ckptmgr.HOST) == step
                assert read(jax.local_devices()[0]) == step
        with ckptmgr.CheckpointManager(f"{directory}-beside", timeout_s=TIMEOUT_S) as beside:
            beside.save(1, spread(mesh, 1)).result()
        assert read(mesh) == read(lambda path, leaf: NamedSharding(mesh, P())) == 2
        assert manager.restore(layout=ckptmgr.HOST).step == 2
    say("read")


def odds():
    """Arrays whose bits a sum of numbers would not keep, and shapes that are easily forgotten."""
    return {
        "bits": np.tile(BITS, 64),
        "half": np.arange(256).astype(ml_dtypes.bfloat16),
        "eighth": np.arange(64, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "four": np.arange(-8, 8).astype(ml_dtypes.int4),
        "yes": np.arange(32) % 3 == 0,
        "complex": np.tile(BITS, 16).view(np.complex64),
        "alone": np.float32(-0.0).reshape(()),
        "none": np.zeros((4, 0), np.float32),
        "large": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024),
    }


def keys(step):
    return jax.random.split(jax.random.key(step), 4)


def shared(directory, _, axes, broadcast):
    shape = tuple(map(int, axes.rstrip("t").split("x")))
    devices = np.array(jax.devices()).reshape(shape)
    if axes.endswith("t"):  # the copies of a piece are not where one process ends and the next begins
        devices = np.roll(devices.reshape(-1), 1).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("copy", "part"), axis_types=(EXPLICIT if axes.endswith("t") else AUTO,) * 2)
    values = odds() if broadcast != "save" else {}
    if broadcast == "save":
        with ckptmgr.CheckpointManager(directory) as manager:
            for step in (1, 2):
                manager.save(step, odds() | {"keys": keys(step)})
        return
    split = {name: P("part") if value.ndim else P() for name, value in values.items()}
    layout = {name: NamedSharding(mesh, spec) for name, spec in split.items()} | {
        "keys": NamedSharding(mesh, P("part"))
    }
    template = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in values.items()}
    template["keys"] = jax.eval_shape(lambda: keys(0))
    os.preadv = counted_preadv
    before = read_bytes()
    bound = 1 << 20 if broadcast == "bounded" else None
    manager = ckptmgr.CheckpointManager(directory, read_only=True, timeout_s=TIMEOUT_S, max_host_bytes=bound)
    told = []
    how = {"params": template, "layout": layout, "broadcast": broadcast != "False"}
    found = manager.restore(on_progress=lambda *at: told.append(at), **how)
    check_progress(told, found.params, shares=broadcast != "False")
    for name, value in values.items():
        assert found.params[name].sharding == layout[name], name
        for shard in found.params[name].addressable_shards:
            here = np.asarray(shard.data)
            assert here.dtype == value.dtype, name
            assert here.tobytes() == np.ascontiguousarray(value[shard.index]).tobytes(), name
    assert found.params["keys"].sharding == layout["keys"]
    for shard in jax.random.key_data(found.params["keys"]).addressable_shards:
        assert np.array_equal(np.asarray(shard.data), jax.random.key_data(keys(found.step))[shard.index])
    said = "restored", found.step, "skipped", *found.skipped, "read", read_bytes() - before
    check_that_what_progress_raises_ends_all(manager, found.step, how)
    say(*said)


def check_progress(told, params, shares):
    """Without broadcast each process reads what its devices hold of each array; with it some read less."""
    pieces = [
        {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        for leaf in jax.tree.leaves(params)
    ]
    held, total = sum(sum(each.values()) for each in pieces), told[-1][1]
    last = max(n for n, (done, _) in enumerate(told) if done == 0)  # if it has walked back, it began anew
    assert told[last:] == sorted(told[last:])
    assert told[-1] == (total, total)
    keys_nbytes = 4 * 8  # each process reads the words of all keys
    assert (0 < total <= held + keys_nbytes) if shares else (held <= total <= held + keys_nbytes), (total, held)


def check_that_what_progress_raises_ends_all(manager, step, how):
    """The progress bar of process 1 fails in the middle: no process restores the step, and none hangs."""

    def fail(done, total):
        if jax.process_index() == 1 and done:
            raise OSError("the terminal is gone")

    with pytest.raises((OSError, ckptmgr.CheckpointError), match="the terminal is gone"):
        manager.restore(step, on_progress=fail, **how)


NEW_UTS = 0x04000000  # CLONE_NEWUTS


def enter_network(name, address):
    """Lives in a network namespace from here on, as on a machine of its own; gloo goes by the machine's name."""
    libc = ctypes.CDLL(None)
    with open(f"/run/netns/{name}") as namespace:
        assert libc.setns(namespace.fileno(), 0) == 0
    assert libc.unshare(NEW_UTS) == 0
    socket.sethostname(address)


def read_bytes():
    """What TensorStore has read of files, and what we have read of arrays ourselves."""
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"]) + sum(READ)


READ = []
preadv = os.preadv


def counted_preadv(*given):
    READ.append(preadv(*given))
    return READ[-1]


def train(directory, mesh, save_every):
    step_of_all = jax.jit(lambda w: w + 1)
    manager = ckptmgr.CheckpointManager(directory, save_every=int(save_every), timeout_s=TIMEOUT_S)
    found = manager.restore_or(params={"w": spread(mesh, 0)["w"]})
    params = found.params
    say("resumed", found.step)
    with manager.preemption_guard():
        for step in range(found.step + 1, 10**6):
            params = {"w": step_of_all(params["w"])}
            time.sleep(0.02)
            manager.save(step, params)
            say("done", step)
            if manager.preempted:
                break
    say("ended", step)


def rewind(directory, mesh):
    with ckptmgr.CheckpointManager(directory, keep=3, mirror=MIRROR, timeout_s=TIMEOUT_S) as manager:
        for step in (50, 60, 70):
            manager.save(step, spread(mesh, step))
        manager.rewind(50)
        manager.save(60, spread(mesh, 160))
        try:
            manager.rewind(55)
        except ckptmgr.CheckpointNotFoundError as problem:
            say("refused", problem)
        found = manager.restore(params=spread(mesh, 0))
        check(found.params, 160)
        manager.rewind(70)
        for step in (60, 70):
            check(manager.restore(step, params=spread(mesh, 0)).params, step)
        say("steps", *manager.steps())


def milestones(directory, mesh):
    keep = [ckptmgr.latest(1), ckptmgr.best("loss", mode="max"), ckptmgr.params_only(ckptmgr.every_steps(10))]
    with ckptmgr.CheckpointManager(directory, keep=keep, timeout_s=TIMEOUT_S) as manager:
        for step in (5, 10, 15):
            manager.save(step, spread(mesh, step), {"mu": spread(mesh, step)["w"]}, metrics={"loss": 1 / step})
        manager.wait()
        wanted = {"params": spread(mesh, 0), "opt_state": {"mu": spread(mesh, 0)["w"]}}
        asked = [{**wanted}, {"params": wanted["params"]}]
        try:
            manager.restore(10, **asked[jax.process_index() and len(asked) - 1])  # process 0 alone asks for it
        except ckptmgr.ReducedCheckpointError as problem:
            say("refused", problem.step, *problem.items, problem)
        check(manager.restore(10, params=wanted["params"]).params, 10)
        manager.delete(15)
        found = manager.restore(**wanted)
        say("restored", found.step, *found.skipped)


def slow(directory, mesh):
    manager = ckptmgr.CheckpointManager(directory, timeout_s=TIMEOUT_S)
    results = []
    for step in (1, 2):
        results.append(manager.save(step, spread(mesh, step)))
        try:
            manager.wait()
        except ckptmgr.CheckpointTimeoutError as problem:
            say(step, problem)
        say("durable", results[-1].result(60).step)
    manager.close()
    say("steps", *manager.steps())


def emergency(directory, mesh, what):
    manager = ckptmgr.CheckpointManager(directory, keep=2, timeout_s=TIMEOUT_S)
    found = manager.restore_or(params=spread(mesh, 0))
    check(found.params, found.step)
    say("resumed", found.step)

    def save(step, timeout_s=None):
        params = spread(mesh, step)
        say("begins", time.monotonic())
        manager.save(step, params).result(timeout_s)
        say("durable", step)
        manager.wait(timeout_s)

    def restore(_):
        template = spread(mesh, 0)
        say("begins", time.monotonic())
        step = manager.restore(params=template, broadcast=what == "broadcast").step
        say("restored", step)

    is_alone = False
    try:
        for step in (found.step + 1, found.step + 2):
            save(step, timeout_s=60)  # however busy the machine is
        if emergency := os.environ.get("CKPTMGR_EMERGENCY"):
            at, step = os.environ["CKPTMGR_EMERGENCY_AT"], found.step + (3 if what == "save" else 2)
            emergencies.install(emergency, emergencies.ACTS[what], step, at)
        for step in (found.step + 3, found.step + 4):
            (save if what == "save" else restore)(step)
    except ckptmgr.CheckpointError as problem:
        late = problem if isinstance(problem, ckptmgr.CheckpointTimeoutError) else problem.__cause__
        named = [getattr(late, name, None) for name in ("missing", "waiting_for")]
        say("raised", json.dumps([time.monotonic(), type(problem).__name__, str(problem), *named]))
        is_alone = True
    try:
        manager.close()
    except ckptmgr.CheckpointError as problem:
        say("not closed", problem)
    say("closed", time.monotonic())
    if is_alone:
        os._exit(3)  # JAX would wait for the processes that are gone


def clock(directory, mesh):
    ours = [0.0, 100.0] if jax.process_index() == 0 else [0.0, 0.0]  # only process 0 finds that time has passed
    manager = ckptmgr.CheckpointManager(
        directory, save_every=ckptmgr.every_seconds(50), clock=lambda: ours[0], timeout_s=TIMEOUT_S
    )
    results = [bool(manager.save(1, spread(mesh, 1)))]
    ours.pop(0)
    results.append(bool(manager.save(2, spread(mesh, 2))))
    manager.close()
    say("saved", *results)


def poisoned(directory, mesh, nonfinite):
    bad = {2: {"w": (-1, -1)}, 3: {"one": (0,)}, 4: {"w": (-1, -1), "b": (3,), "one": (1,), "odd": (0,)}}
    with ckptmgr.CheckpointManager(directory, keep=1, nonfinite=nonfinite, timeout_s=TIMEOUT_S) as manager:
        manager.save(1, spread(mesh, 1))
        for step, places in bad.items():
            try:
                manager.save(step, with_nan(mesh, step, places))
                manager.wait()
                say(f"saved {step}:", manager.info(step).distrusted)
            except ckptmgr.SaveError as problem:
                say(f"refused {step}:", problem)
        found = manager.restore(params=spread(mesh, 0))
        check(found.params, found.step)
        say("restored", found.step, "skipped", *found.skipped, "of", *manager.steps())
        manager.distrust(1, "by hand")
        try:
            manager.restore(params=spread(mesh, 0))
        except ckptmgr.CorruptCheckpointError as problem:
            say("nothing", problem)
        manager.trust(1)
        say("again", manager.restore(params=spread(mesh, 0)).step)


def with_nan(mesh, step, places):
    """The same as `spread`; the last shards of "w" are those of the last process, and "one" is each one's own."""
    params, values = spread(mesh, step), state(step)
    for name, where in places.items():
        array = params[name]
        if name == "odd":
            params["host"] = np.full(3, np.nan if jax.process_index() == 0 else 1.0)
        elif name != "one":
            values[name][where] = np.nan
            params[name] = jax.make_array_from_callback(
                array.shape, array.sharding, lambda index, name=name: values[name][index]
            )
        elif jax.process_index() == 1:
            own = np.array(values["b"])
            own[where] = np.nan
            params[name] = jax.device_put(own, jax.local_devices()[0])
    return params


def paced(directory, mesh, policy):
    """The clocks of the processes differ, so what they measure does too."""
    import orbax.checkpoint as ocp

    orbax = ocp.checkpoint_managers.ContinuousCheckpointingPolicy()
    save_every = {"often": ckptmgr.as_often_as_possible(), "overhead": ckptmgr.overhead(0.5), "orbax": orbax}
    speed = 1 + jax.process_index()
    manager = ckptmgr.CheckpointManager(
        directory, save_every=save_every[policy], clock=lambda: time.time() * speed, timeout_s=TIMEOUT_S
    )
    saved = []
    for step in range(1, 80):
        time.sleep(0.02 * speed)
        params = spread(mesh, step)
        if manager.should_save(step):
            assert manager.save(step, params)
            saved.append(step)
    manager.close()
    assert manager.steps() == saved, (manager.steps(), saved)
    say("saved", *saved)


if __name__ == "__main__":
    directory, port, count, index, devices, mode, *rest = sys.argv[1:]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "CKPTMGR_NETWORK" in os.environ:
        enter_network(*os.environ["CKPTMGR_NETWORK"].split())
    import emergencies
    import faults
    import guard
    import jax
    import ml_dtypes
    import optax
    import pytest
    import tensorstore as ts
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import ckptmgr
    from ckptmgr.format import recorded
    from ckptmgr.processes.job import Call, Job
    from ckptmgr.run import transfer

    AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    MIRROR = os.environ.get("CKPTMGR_MIRROR")
    TIMEOUT_S = float(os.environ.get("CKPTMGR_TIMEOUT_S", "60"))
    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        host = os.environ.get("CKPTMGR_HOST", "localhost")
        jax.distributed.initialize(f"{host}:{port}", int(count), int(index))
    faults.install(os.environ.get("CKPTMGR_FAULT", ""))
    guard.install()
    everything = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    say("joined")
    try:
        known = {
            each.__name__: each
            for each in (
                save,
                load,
                readers,
                shared,
                train,
                clock,
                paced,
                emergency,
                slow,
                attempt,
                results,
                apart,
                differs,
                stages,
                balanced,
                frozen,
                mirrored,
                crowd,
                own,
                reader,
                milestones,
                rewind,
                poisoned,
                together,
                callback,
            )
        }
        known[mode](directory, everything, *rest)
    except ckptmgr.CheckpointError as problem:
        say("failed", type(problem).__name__, problem)
        if mode == "attempt" and index == "0":  # the others may still be at it, and JAX ends them with process 0
            time.sleep(60)
        os._exit(3)  # JAX would wait for the processes that are gone

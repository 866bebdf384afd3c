"""What we write, rename and remove lies in `.ckptmgr/` or in a step, over the whole life of a run."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import strangers

from ckptmgr import CheckpointManager

HOOK = """
import os, re, sys
RUN = sys.argv[1]
KINDS = {"os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.truncate": (0,),
         "os.link": (1,), "os.symlink": (1,), "os.chmod": (0,), "os.utime": (0,), "shutil.rmtree": (0,)}
OURS = re.compile(r"\\.ckptmgr(/.*)?|(0|[1-9][0-9]*)(/.*)?")

def look(event, path):
    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    path = os.path.join(os.path.realpath(folder), name)
    for place in (RUN, RUN + "-away"):
        if path.startswith(place + "/") and not OURS.fullmatch(os.path.relpath(path, place)):
            print("ELSEWHERE", event, path, flush=True)

def hook(event, args):
    if event in KINDS:
        touched = [args[place] for place in KINDS[event]]
    elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        touched = [args[0]]
    else:
        return
    for path in touched:
        if not isinstance(path, int):
            look(event, path)

sys.addaudithook(hook)
"""
LIFE = """
import pathlib, shutil, jax.numpy as jnp, ckptmgr
from ckptmgr import interop
from ckptmgr.cli.app import app
def params(step): return {"w": jnp.full((4, 4), float(step)), "b": jnp.arange(3.0)}
def call(*words):
    try: app([*map(str, words)], standalone_mode=False)
    except SystemExit: pass
with ckptmgr.CheckpointManager(RUN, keep=3, mirror=RUN + "-away", mirror_keep=2) as manager:
    for step in (20, 21, 23, 27):
        manager.save(step, params(step), metrics={"loss": 1 / step})
        manager.wait()
    manager.pin(23); manager.unpin(23); manager.pin(23)
    manager.save(27, params(27), metrics={"loss": 1}, on_exists="replace")
    manager.wait()
    next(pathlib.Path(RUN, "27", "params").glob("d/*")).write_bytes(b"")
    assert manager.restore(params=params(0)).step == 27  # from the mirror
    manager.save(27, params(27))  # the damaged one is set aside
    manager.wait()
    manager.delete(21) if 21 in manager.steps() else manager.delete(23)
for place in (RUN, RUN + "-away"):
    ours = pathlib.Path(place, ".ckptmgr")
    shutil.copytree(pathlib.Path(RUN, "27"), ours / "saving" / "99")
    shutil.copytree(pathlib.Path(RUN, "27"), ours / "deleting" / "98-1")
    shutil.copytree(pathlib.Path(RUN, "27"), ours / "replaced" / "27")
call("gc", RUN, "--yes", "--damaged")
call("pin", RUN, 27); call("unpin", RUN, 27); call("verify", RUN, "--all"); call("ls", RUN); call("show", RUN)
call("export", RUN, RUN + "-out.safetensors"); call("report", RUN, "-o", RUN + "-report.html")
call("import", RUN, "--params", RUN + "-out.safetensors", "--step", 60)
call("keep", RUN, "--policy", "latest:2", "--yes")
call("rm", RUN, 60, "--yes", "--force")
print("adopted", interop.adopt(RUN))
with ckptmgr.CheckpointManager(RUN, mirror=RUN + "-away") as manager:
    manager.wait()
print("steps", manager.steps())
"""


def params(step):
    return {"w": jnp.full((4, 4), float(step)), "b": jnp.arange(3.0)}


@pytest.fixture
def run(tmp_path):
    with CheckpointManager(tmp_path / "run", mirror=tmp_path / "run-away") as manager:
        for step in (5, 10, 15):
            manager.save(step, params(step))
    return tmp_path / "run"


def test_over_the_life_of_a_run_nothing_is_touched_outside_of_steps_and_our_folder(run):
    kinds = {what: kind for what, kind in strangers.KINDS.items() if kind[0] not in ("20", "21", "23", "27", "60")}
    places = (run, run.parent / "run-away")
    before = [strangers.make(place, kinds) for place in places]
    with ocp.CheckpointManager(run.parent / "stock") as stock:
        stock.save(17, args=ocp.args.Composite(params=ocp.args.StandardSave(params(1))))
    (run.parent / "stock" / "17").rename(run / "17")
    (run / "17" / "PINNED").touch()
    done = subprocess.run([sys.executable, "-c", HOOK + LIFE, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adopted [17]" in done.stdout
    assert "ELSEWHERE" not in done.stdout
    names = [name for name, _ in kinds.values()]
    assert [strangers.seen(place, names) for place in places] == before
    for place in places:
        listed = {entry.name for entry in place.iterdir()} - set(names) - {".ckptmgr"}
        assert listed == set(map(str, CheckpointManager(place, read_only=True).steps()))


# ---------------------------------------------------------------- stock Orbax beside us


def test_stock_orbax_sees_the_same_steps_and_its_cleanup_harms_nothing(run):
    ours = [".ckptmgr"]
    for folder in ("saving/99", "deleting/98-1", "damaged/97-1"):
        (run / ".ckptmgr" / folder).mkdir(parents=True)
    before = strangers.seen(run, [*ours, "5", "10", "15"])
    options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
    with ocp.CheckpointManager(run, options=options) as stock:
        assert stock.all_steps() == [5, 10, 15]
        template = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(3)}
        args = ocp.args.Composite(params=ocp.args.StandardRestore(template))
        assert np.array_equal(stock.restore(15, args=args).params["w"], params(15)["w"])
        assert strangers.seen(run, [*ours, "5", "10", "15"]) == before
        stock.save(20, args=ocp.args.Composite(params=ocp.args.StandardSave(params(20))))
    with CheckpointManager(run, keep=2) as manager:
        assert manager.steps() == [5, 10, 15, 20]
        found = manager.restore(params=template)
        assert (found.step, float(found.params["w"][0, 0])) == (20, 20.0)
        manager.save(25, params(25))
        manager.wait()
        assert manager.steps() == [20, 25]  # a step that stock finished counts, and goes, as ours do
        manager.save(30, params(30))
        manager.wait()
        assert manager.steps() == [25, 30]
    with ocp.CheckpointManager(run) as stock:
        assert stock.all_steps() == [25, 30]

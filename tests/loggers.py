"""Runs an example that logs until it is stopped, then again to its end, and prints what its logger has in files.

    python loggers.py EXAMPLE DIRECTORY STOP

STOP is a fault of `faults.py`, or "SIGTERM N": that signal comes just before the save of step N. A line has the
exit code of the first process. The last line is JSON: the rows of each run of the logger, each {name: number}.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import struct
import sys
import time
from pathlib import Path

import faults

import ckptmgr

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
LIBRARIES = {"mlflow_local": "mlflow.store.tracking.sqlalchemy_store", "wandb_offline": "wandb"}


def install(stop):
    kind, _, step = stop.partition(" ")
    if kind != "SIGTERM":
        faults.install(stop)
        return
    save = ckptmgr.CheckpointManager.save

    def stopped_save(self, at, *args, **kwargs):
        if at == int(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, at, *args, **kwargs)

    ckptmgr.CheckpointManager.save = stopped_save


def mlflow_local(directory):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    for run in client.search_runs([each.experiment_id for each in client.search_experiments()]):
        yield [{"step": row.step, "loss": row.value} for row in client.get_metric_history(run.info.run_id, "loss")]


def wandb_offline(directory):
    """The runs of the example, and one more that gives W&B the step of a checkpoint after a later step."""
    import wandb

    beside = Path(directory, f"beside-{os.getpid()}")
    beside.mkdir()
    with wandb.init(project="diabetes", dir=beside, mode="offline") as run:
        run.log({"loss": 1.0}, step=100)
        run.log({"checkpoint/loss": 2.0}, step=50)
    for place in (Path(directory), beside):
        files = sorted(place.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
        yield from map(rows, files)


def rows(file):
    """The rows of a .wandb file, once its process has written it to its end, which `finish` does not wait for."""
    for _ in range(600):
        found = list(records(file.read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            items = [each.history.item for each in found if each.WhichOneof("record_type") == "history"]
            return [{"/".join(each.nested_key): json.loads(each.value_json) for each in row} for row in items]
        time.sleep(0.1)
    raise TimeoutError(f"{file} has no end")


def records(data):
    """The records of a .wandb file: after seven bytes, a log of LevelDB in blocks of 32 KiB; each is a protobuf.

    A record lies in pieces, each with a checksum, its length, and a kind: 1 is a whole record, 4 its last piece.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    at, record = 7, b""
    while len(data) - at >= 7:
        if 32768 - at % 32768 < 7:  # too little of the block is left for a piece
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):  # it is still being written
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def play(name, directory, stop):
    install(stop)
    sys.argv = [str(EXAMPLES / f"{name}.py"), directory]
    runpy.run_path(sys.argv[0], run_name="__main__")
    if not stop:
        print(json.dumps(list(globals()[name](directory))))


def main(name, directory, stop):
    importlib.import_module(LIBRARIES[name])  # once for both processes: it takes longer than the training
    for each in (stop, ""):
        process = multiprocessing.get_context("fork").Process(target=play, args=(name, directory, each))
        process.start()
        process.join()
        if each:
            print(json.dumps(process.exitcode), flush=True)
    sys.exit(process.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])

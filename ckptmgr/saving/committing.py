"""The second act of a save, on the thread behind it: write, seal, publish.

A step is written into a draft. The draft is compared with what was meant to be saved, and gets its manifest. All
its files and directories are flushed, then the draft gets the name of the step: that is the commit.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from ckptmgr.arrays import writing
from ckptmgr.errors import CheckpointExistsError, SaveError
from ckptmgr.format import files, names, objects, paths, recorded
from ckptmgr.format import manifest as manifests
from ckptmgr.orbax import item_files
from ckptmgr.orbax import writing as orbax
from ckptmgr.processes.job import Job
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.lock import Shared
from ckptmgr.saving import sealing
from ckptmgr.saving.copying import Copied
from ckptmgr.saving.stages import Stages

_log = logging.getLogger("ckptmgr")


class _Written(NamedTuple):
    """A draft whose arrays and small files are written."""

    folder: epath.Path
    others: Mapping[str, manifests.File]
    """The files that are flushed already: of the other processes, and those taken over from the step before."""
    sent: Mapping[str, bytes]
    """What this process has sent to a bucket."""


class Committer:
    """Makes a durable step of a snapshot.

    In a job only process 0 calls Orbax, and seals. The others write their arrays beside those of process 0.
    """

    def __init__(
        self, run: Catalog, *, compression: str | None, job: Job, shared: Shared, refuses_nonfinite: bool = False
    ) -> None:
        self._run = run
        self._compression = compression
        self._refuses_nonfinite = refuses_nonfinite
        self._job = job
        self._shared = shared
        self._after: Callable[[], None] = lambda: None

    def commit(self, copied: Copied, *, replaces: bool = False) -> manifests.Manifest:
        """Returns the manifest once the step is durable. If that fails, removes the draft and raises."""
        stages = Stages(copied.step, self._job)
        try:
            with self._job.working(), stages.told():
                stages.agree(copied.spec)
                manifest = self._lead(copied, stages, replaces) if self._job.leads else None
                if manifest is None:
                    self._follow(copied, stages)
                stages.reach("commit")
            return manifest or self._read(copied)
        except BaseException:
            if self._job.leads:
                self._discard(copied.step)
            raise
        finally:
            copied.release()

    def _read(self, copied: Copied) -> manifests.Manifest:
        """What process 0 has committed. The step is durable: a process that cannot read it here has not failed."""
        try:
            return self._run.manifest(copied.step, fresh=True)
        except Exception as problem:  # of the network, or of a client
            _log.warning("step %d is saved; its manifest could not be read here: %s", copied.step, problem)
            return copied.manifest

    def _lead(self, copied: Copied, stages: Stages, replaces: bool) -> manifests.Manifest:
        self._look(copied.step, replaces)
        draft, reports = self._begin(copied.step), list[Any]()
        sent = orbax.write(
            draft,
            copied.contents,
            self._compression,
            made=lambda: stages.reach("directories"),
            written=lambda: reports.extend(filter(None, stages.reach("arrays"))),
            check=self._shared.hold,
        )
        others = sealing.unpack(found for found, _ in reports)
        distrusted = self._verdict(copied, [marks for _, marks in reports])
        with self._confirmed(draft):
            manifest, data = self._seal(copied, _Written(draft, {**copied.kept, **others}, sent), distrusted)
        self._publish(copied.step, draft, data, replaces)
        self._after = lambda: self._run.after_publish(manifest, data)
        return manifest

    def _verdict(self, copied: Copied, marks: Sequence[str]) -> str | None:
        """Why the step is not to be trusted; raises SaveError if it is not to be saved either."""
        distrusted = copied.verdict([copied.marks(), *marks])
        if distrusted is not None and self._refuses_nonfinite:
            raise SaveError(
                f'{distrusted} (nonfinite="refuse"). No checkpoint of step {copied.step} is written, and those of '
                "earlier steps stay",
                step=copied.step,
            )
        return distrusted

    def after_commit(self) -> None:
        """Called once the caller was told that the step is durable: what takes a bucket a few more requests."""
        after, self._after = self._after, lambda: None
        try:
            after()
        except Exception as problem:  # of a client
            _log.warning("a note about a save could not be removed; it does no harm: %s", problem)

    @contextlib.contextmanager
    def _confirmed(self, draft: epath.Path) -> Iterator[None]:
        """Asks while the block runs whether this process still has the right to write; raises SaveError if not.

        On a disk it asks at the end: that takes no time.
        """
        if paths.is_local(draft):
            yield
            self._shared.confirm()
            return
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            confirmed = thread.submit(self._shared.confirm)
            yield
            confirmed.result()

    def _look(self, step: int, replaces: bool) -> None:
        """Raises if the name of the step is taken. `save` looks only at what this process knows."""
        self._run.check_free(step)
        if not replaces and step not in self._run.damaged and self._run.is_listed(step):
            raise CheckpointExistsError(
                f"another checkpoint was written to {self._run.path(step)} meanwhile; it is kept", step=step
            )

    def _discard(self, step: int) -> None:
        """Removes the draft, if the run is still this process's: else it may be that of another."""
        with contextlib.suppress(Exception):  # the failure of the save says more
            self._shared.confirm()
            self._run.discard(step)

    def _begin(self, step: int) -> epath.Path:
        self._run.discard(step)
        return self._run.begin(step)

    def _follow(self, copied: Copied, stages: Stages) -> None:
        """In processes other than 0: writes their arrays, once process 0 has made the directories."""
        draft, here = self._run.draft(copied.step), jax.process_index()
        stages.reach("directories")
        texts = [f"{name}/{manifests.own_place(here, manifests.json_file(name))}" for name in copied.own_values]
        for name, text in zip(copied.own_values, texts, strict=True):
            files.write(draft / text, json.dumps(copied.contents[name]()).encode())
        parts = {
            name: f"{name}/{manifests.own_place(here) if name in copied.own else writing.own_part()}"
            for name in copied.snapshots
        }

        def write(name: str) -> None:
            writing.write(draft / parts[name], copied.snapshots[name], self._compression)

        with concurrent.futures.ThreadPoolExecutor() as threads:
            for _ in threads.map(write, parts):
                pass
        written = sealing.pack(sealing.own_files(draft, texts, parts.values(), copied.kept))
        stages.reach("arrays", [written, copied.marks()])

    # ------------------------------------------------------------ sealing

    def _seal(self, copied: Copied, written: _Written, distrusted: str | None) -> tuple[manifests.Manifest, bytes]:
        """Checks that the draft holds what was meant, writes the manifest, and makes the draft durable."""
        draft, others = written.folder, written.others
        if paths.is_local(draft):
            files.write(draft / names.COMMITTED, self._marker(copied.step), durable=False)
        folders, sizes, unread = sealing.look_through(draft, written.sent)
        found = recorded.record_files(draft, sizes, recorded.checks_itself(draft), {**unread, **others})
        sealing.check(copied.step, draft, self._meant(copied, written), found)
        manifest = copied.seal(found, distrusted)
        data = manifests.encode(manifest)
        self._shared.hold()
        files.write(draft / manifests.NAME, data, durable=False)
        self._run.keep_pin(copied.step)
        folders = sealing.without_parts(draft, folders, others)
        own = found.keys() - others.keys()
        ours = [name for name in own if not sealing.is_of_database(name)]  # TensorStore flushes its own
        files.sync([*folders, *(draft / name for name in [*ours, manifests.NAME])])
        return manifest, data

    def _publish(self, step: int, draft: epath.Path, manifest: bytes, replaces: bool) -> None:
        """Gives the draft the name of the step, durably."""
        if not paths.is_local(draft):  # a bucket has no rename: the last file makes the draft a step
            self._shared.hold()
            files.write(draft / names.COMMITTED, self._marker(step))
            self._check_in_time(draft, manifest)
        replaced = self._run.publish(step, replaces=replaces)
        files.sync([self._run.directory])
        if replaced is not None:
            self._run.remove(replaced)

    def _check_in_time(self, draft: epath.Path, manifest: bytes) -> None:
        """Takes the marker back if this process was stopped just before, and another has the run now."""
        try:
            self._shared.hold()
        except SaveError:
            with contextlib.suppress(FileNotFoundError):
                if paths.read_bytes(draft / manifests.NAME) != manifest:
                    raise  # the other has written its own step there
            objects.delete(draft / names.COMMITTED)
            raise

    def _marker(self, step: int) -> bytes:
        return f"Checkpoint commit was successful to {self._run.directory / str(step)}".encode()

    def _meant(self, copied: Copied, written: _Written) -> sealing.Meant:
        """What the step is to hold."""
        plans = {name: snapshot.plan for name, snapshot in copied.snapshots.items()}
        parts = {
            f"{name}/{manifests.own_place(each)}": plans[name]
            for name in copied.own & plans.keys()
            for each in range(1, jax.process_count())
        }
        return sealing.Meant(self._texts(copied, written), written.others, parts | plans, self._compression)

    def _texts(self, copied: Copied, written: _Written) -> Mapping[str, bytes]:
        """The files beside the arrays, and their contents."""
        texts = {
            f"{name}/{manifests.json_file(name)}": json.dumps(copied.contents[name]()).encode()
            for name in copied.contents.keys() - copied.snapshots.keys()
        }
        for item, snapshot in copied.snapshots.items():
            texts |= {f"{item}/{name}": data for name, data in item_files.files(snapshot.plan).items()}
        texts[names.STEP_METADATA] = _metadata(copied.step, written, set(copied.contents))
        if paths.is_local(written.folder):
            texts[names.COMMITTED] = self._marker(copied.step)
        return texts


def _metadata(step: int, written: _Written, items: set[str]) -> bytes:
    """Orbax's metadata of the step, checked to be of this step."""
    place = written.folder / names.STEP_METADATA
    try:
        data = written.sent.get(names.STEP_METADATA) or paths.read_bytes(place)
        found = json.loads(data)
        if found["custom_metadata"] == names.SIGNATURE and items <= found["item_handlers"].keys():
            return data
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise SaveError(f"{place} is not what Orbax wrote, so step {step} is not committed", step=step)

"""For each sentence of the guarantees changes of our code that break it, and the test that must notice.

docs/guarantees.md lists them; `make soak` makes each one, in a copy of the package, and runs its test.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    sentence: str
    what: str
    file: str
    old: str
    new: str
    test: str


SENTENCES = {
    "1a": "A checkpoint is whole or invisible: SIGKILL at any moment leaves the last committed one restorable",
    "1b": "What was left over is removed later",
    "2a": "What is restored is bit for bit what was saved, or an error: any flipped bit is detected",
    "2b": "A file that is truncated, missing or exchanged is detected",
    "2c": "A sealed step holds what was meant",
    "3a": "`restore()` walks back to the newest good step",
    "3b": "It says so loudly and in `.skipped`",
    "3c": "A step asked for by number is never replaced by another",
    "4": "After `save` returns, the caller may donate, delete or overwrite the arrays, numpy ones included",
    "5": "An accepted save is not lost when the script ends, raises, calls `sys.exit` or gets SIGTERM",
    "6a": "A failed save raises at the next call at the latest, and names its step",
    "6b": "It takes nothing with it: older checkpoints stay listed and on disk",
    "6c": "`latest()` never names an uncommitted step",
    "7a": "Retention deletes only after a newer checkpoint is durable",
    "7b": "Never the last good one",
    "7c": "Never a pinned one",
    "7d": "A NaN metric is never best",
    "7e": "Metrics survive a restart",
    "7f": "One failed deletion does not stop the next",
    "7g": "A step loses items only if nothing but `params_only` keeps it, and never the newest whole step",
    "7h": "A step that loses items is whole before and after",
    "8": "Evaluators may read while the trainer writes and deletes",
    "9a": "Nothing read from disk is executed",
    "9b": "Leaf and item names from disk never leave the checkpoint's directory",
    "9c": "No symlink is followed to write",
    "10a": "The state is exact: weak types, dtypes, kinds and places as they were saved",
    "10b": "Under every guard that JAX has",
    "10c": "Saving changes nothing in the caller's objects",
    "11a": "Retention never deletes the step that was committed last",
    "11b": "Nor anything that is not a step of this run",
    "11c": "It counts only steps that are whole and trusted",
    "11d": "After `rewind` the run goes on from there; what was later is set aside, and comes back",
    "12a": "Ctrl-C, a signal, an exception at any moment in any call: an accepted save is durable in the end",
    "12b": "The manager can be used again",
    "13a": "A damaged, unreadable, unfinished or foreign file is an error of ours that names it, and a walk-back",
    "13b": "Never a bare exception of a library below, a hang, or a dead process",
    "14a": "Processes that do not agree on what they save are told so, by leaf, before anything is committed",
    "14b": "Each gets back its own state",
    "14c": "None waits longer than `timeout_s` for one that is gone",
    "16": "What is not done is said: leaves kept, ignored or placed otherwise than asked",
}  # fmt: skip
"""Each sentence of the guarantees."""

MUTATIONS = [
    Mutation(
        "1a", "a step that is being written is listed",
        "run/catalog.py", "int(name) for name in self._storage.find_steps(filter(STEP.fullmatch, entries))",
        "int(name.partition('.')[0]) for name in entries if name[0].isdigit()",
        "tests/run/test_local.py::test_only_whole_numbers_are_steps",
    ),
    Mutation(
        "1a", "what the small files hold is not flushed before the rename",
        "saving/committing.py", "files.sync([*folders, *(draft / name for name in [*ours, manifests.NAME])])",
        "files.sync(folders)",
        "tests/orbax/test_orbax.py::test_everything_is_flushed_before_the_step_has_its_name",
    ),
    Mutation(
        "1a", "names are not flushed before the rename",
        "saving/committing.py", "files.sync([*folders, *(", "files.sync([*(",
        "tests/orbax/test_orbax.py::test_everything_is_flushed_before_the_step_has_its_name",
    ),
    Mutation(
        "1a", "what was copied to the mirror is not read back",
        "run/mirror.py", "        self._check(step, draft, marker)\n", "",
        "tests/run/test_mirror.py::test_a_copy_that_was_damaged_on_its_way_is_never_shown",
    ),
    Mutation(
        "1a", "what was begun in the mirror for another save is gone on with",
        "run/mirror.py", "if not transfer.is_equal(source / name, draft / name):", "if not draft.exists():",
        "tests/run/test_mirror.py::test_what_was_begun_for_another_save_of_the_step_is_begun_anew",
    ),
    Mutation(
        "1a", "what another process has not copied to the mirror is left out",
        "run/mirror.py", "missing = {name for name, size in sizes.items() if there.get(name) != size}",
        'missing = {name for name in sizes if name not in there and "process_1/" not in name}',
        "tests/run/test_mirror.py::test_a_process_killed_as_it_copies_leaves_the_rest_to_process_0",
    ),
    Mutation(
        "1a", "a process copies to a mirror that it does not share",
        "run/parts.py", "    return is_of_it and not (", "    return not (",
        "tests/run/test_mirror.py::test_what_another_process_cannot_copy_process_0_copies",
    ),
    Mutation(
        "1a", "a lock whose file was removed is not taken again",
        "run/lock.py", "if descriptor is not None and not _is_still(self.path, descriptor):",
        "if False:",
        "tests/run/test_strangers.py::test_another_process_that_took_a_run_whose_lock_was_removed_is_named",
    ),
    Mutation(
        "1a", "a second writer in a bucket is let in",
        "run/claim.py",
        '            if found is None or self._is_own(found) or self._is_over(found, _now() - seen_at):\n',
        '            if True:\n',
        "tests/run/test_claim.py::test_a_second_writer_is_told_who_writes_and_a_reader_needs_no_claim",
    ),
    Mutation(
        "1a", "a claim is not renewed",
        "run/claim.py",
        '        while self._lost is None and not over.wait(self._lease_s / _RENEWALS):\n',
        '        while False:\n',
        "tests/run/test_claim.py::test_a_claim_is_renewed_as_long_as_its_process_lives",
    ),
    Mutation(
        "1a", "who was stopped beyond its lease goes on writing",
        "run/claim.py",
        '        if self._lost is not None or _now() >= self._ends:\n            self.renew()\n',
        '        return\n',
        "tests/run/test_claim.py::test_a_holder_that_was_stopped_beyond_its_lease_does_not_commit",
    ),
    Mutation(
        "1a", "a file that was sent to a bucket is not compared with what is there",
        "format/objects.py", "        return self.size == len(data) and self.md5 in (", "        return True or (",
        "tests/test_remote.py::"
        "test_a_small_file_that_another_program_changes_before_the_manifest_is_there_is_noticed",
    ),
    Mutation(
        "1a", "a note that cannot be removed ends what follows a commit",
        "saving/committing.py",
        "        except Exception as problem:  # of a client\n",
        "        except ZeroDivisionError as problem:\n",
        "tests/test_remote.py::test_a_note_that_cannot_be_removed_does_no_harm",
    ),
    Mutation(
        "1a", "a file in a bucket is written over one of another process",
        "format/objects.py",
        '    if store.create(key, data) is None and',
        '    store.write(key, data)\n    if False and',
        "tests/run/test_claim.py::test_a_file_of_a_step_that_another_process_has_written_is_not_written_over",
    ),
    Mutation(
        "2a", "a small file is sent to a bucket between lines of text",
        "format/objects.py",
        "    open_objects(path).write(key_of(path), data)\n",
        "    client_of(path).pipe_file(str(path), data)\n",
        "tests/format/test_objects.py::test_whatever_the_last_byte_is_it_arrives",
    ),
    Mutation(
        "1b", "leftovers of an interrupted save stay",
        "run/catalog.py", "if why not in (SET_BACK, *STAYS)", "if False",
        "tests/run/test_local.py",
    ),
    Mutation(
        "1b", "what a process has left in a bucket that may still live stays",
        "run/bucket.py", "for name in saved if is_alone or name not in others",
        "for name in saved if name not in others",
        "tests/run/test_claim.py::test_the_holder_is_killed_in_a_save_and_the_next_one_goes_on_without_what_it_left",
    ),
    Mutation(
        "2a", "the checksum of a small chunk is not compared",
        "arrays/chunks.py", "if google_crc32c.value(data) != RESIDUE:", "if False:",
        "tests/arrays/test_arrays.py::test_no_bit_of_a_chunk_can_change_unnoticed",
    ),
    Mutation(
        "2a", "the checksum of a small array is not compared",
        "arrays/small.py", "if google_crc32c.value(data) != RESIDUE:", "if False:",
        "tests/arrays/test_small.py",
    ),
    Mutation(
        "2a", "the checksum of a node of the database is not compared",
        "arrays/nodes.py",
        'if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):', "if False:",
        "tests/arrays/test_nodes.py::test_no_bit_of_a_node_can_change_unnoticed",
    ),
    Mutation(
        "2a", "the checksum of a file is not compared",
        "format/recorded.py", "if found != file.crc32:", "if False:",
        "tests/test_crash.py::test_damage_in_any_file_of_the_newest_step_gives_the_one_before_with_a_warning",
    ),
    Mutation(
        "2a", "the checksum of the manifest is not compared",
        "format/manifest.py", "if seal != _seal(text):", "if False:",
        "tests/format/test_manifest.py",
    ),
    Mutation(
        "2b", "a small file of arrays has no checksum",
        'format/recorded.py', "least_bytes = _SMALL_BYTES if paths.is_local(directory) else 0", "least_bytes = 0",
        'tests/saving/test_sealing.py::test_a_database_of_another_save_that_has_the_same_size_is_found',
    ),
    Mutation(
        "2b", "a remembered manifest is that of its number",
        'run/catalog.py', 'self._manifests.get(step, stamp)',
        'self._manifests.get(step, self._manifests._known.get(step, (None,))[0])',
        'tests/run/test_manifest_cache.py::test_a_step_that_another_process_replaced_is_told_of_as_it_is_now',
    ),
    Mutation(
        "2b", "a file that is missing is passed over",
        "format/recorded.py", '        raise damaged("is missing") from None\n', "        return\n",
        "tests/test_crash.py::test_damage_in_any_file_of_the_newest_step_gives_the_one_before_with_a_warning",
    ),
    Mutation(
        "2c", "what lies in a step is not compared with what was meant",
        'saving/committing.py',
        '        sealing.check(copied.step, draft, self._meant(copied, draft, others, sent), found)\n',
        '',
        'tests/saving/test_sealing.py::test_what_somebody_does_to_a_step_while_it_is_written_is_never_sealed_as_whole',
    ),
    Mutation(
        '2c', 'what other processes have written is not compared with what they have reported',
        'saving/sealing.py', '        if found.get(name) != file:', '        if False:',
        'tests/saving/test_sealing.py::test_what_other_processes_have_written_is_what_they_have_reported_and_nothing_else',
    ),
    Mutation(
        '2b', 'of what several processes have written nobody checks the files',
        'format/recorded.py', 'int(written_by[1]) % count != here', 'True',
        'tests/format/test_recorded.py::test_of_what_each_process_has_written_each_file_is_checked_by_one_and_all_else_by_all',
    ),
    Mutation(
        "3a", "a damaged newest step ends a restore",
        "restoring/restorer.py", "                skipped[candidate] = str(problem)\n", "                raise\n",
        "tests/test_manager.py::test_restoring_walks_back_past_a_damaged_step_and_says_so",
    ),
    Mutation(
        "3a", "a step that lacks what is asked for ends a restore",
        "restoring/restorer.py",
        "                reduced.append(problem)\n",
        "                raise\n",
        "tests/run/test_reducing.py::test_a_restore_of_the_newest_passes_over_a_milestone_that_lacks_what_is_asked_for",
    ),
    Mutation(
        "3b", "nothing is said of a step that is passed over",
        "restoring/restorer.py",
        '_log.warning("step %d is passed over as damaged: %s", candidate, problem)', "pass",
        "tests/test_manager.py::test_restoring_walks_back_past_a_damaged_step_and_says_so",
    ),
    Mutation(
        "3c", "a step asked for by number may be another",
        "restoring/restorer.py", "return self._restore(self._job.decide(_CHOICE, lambda: step), request)",
        "return self.newest(request)",
        "tests/test_manager.py::test_the_newest_the_best_or_one_by_number",
    ),
    Mutation(
        "4", "numpy arrays are not copied",
        "arrays/to_host.py", 'np.array(leaf, order="C")', 'np.asarray(leaf, order="C")',
        "tests/arrays/test_arrays.py::test_the_caller_may_do_what_it_likes_once_save_has_returned",
    ),
    Mutation(
        "5", "the hook at the end of the script runs when executors are gone",
        "processes/background.py", "threading._register_atexit(drain_at_exit)", "pass",
        "tests/test_crash.py::test_a_script_that_leaves_right_after_save_loses_nothing",
    ),
    Mutation(
        "5", "SIGTERM ends the process at once",
        "processes/signals.py", "        signal.signal(signal.SIGTERM, _end_when_drained)", "        pass",
        "tests/test_crash.py::test_a_script_that_leaves_right_after_save_loses_nothing",
    ),
    Mutation(
        "5", "a signal does not make the next save happen",
        "processes/signals.py", "(decided or (self.signalled and self._guarded))", "decided",
        "tests/test_crash.py::test_a_second_signal_ends_at_once_and_a_handler_that_was_there_is_called",
    ),
    Mutation(
        "5", "Ctrl-C ends the wait for the last save",
        "processes/background.py", '    signal.signal(signal.SIGINT, _warn_first)\n', '',
        "tests/processes/test_background.py::test_ctrl_c_while_the_last_save_is_waited_for_is_asked_for_twice",
    ),
    Mutation(
        "6a", "a failed save is not raised at the next call",
        "saving/queue.py", "                    raise save.failure\n", "                    pass\n",
        "tests/test_manager.py::test_a_failed_save_raises_at_the_next_call_and_takes_nothing_with_it",
    ),
    Mutation(
        "6a", "what `result()` has raised is raised again by the next call",
        "results.py", "            save.was_raised = True\n", "",
        "tests/run/test_sharing.py::test_an_old_result_does_not_take_the_failure_of_a_newer_save",
    ),
    Mutation(
        "6b", "what a failed save has written stays",
        "saving/committing.py",
        "            self._run.discard(step)\n", "",
        "tests/test_faults.py::test_a_write_that_fails_at_any_point_is_said_and_harms_nothing",
    ),
    Mutation(
        "6c", "the step that is being written is the latest",
        "manager.py", "return max(self._catalog.steps(), default=None)",
        "return max([*self._catalog.steps(), self._pending.step or 0])",
        "tests/test_faults.py::test_a_slow_disk_holds_up_no_caller_for_longer_than_asked",
    ),
    Mutation(
        "7a", "older steps go before the newer one is durable",
        "saving/saver.py", "            manifest = self._committer.commit(copied,",
        "            [self._catalog.delete(each) for each in self._catalog.steps() if self._options.keep]\n"
        "            manifest = self._committer.commit(copied,",
        "tests/test_faults.py::test_a_write_that_fails_at_any_point_is_said_and_harms_nothing",
    ),
    Mutation(
        "7b", "the newest step is no exception",
        "policies.py", ' + ["newest"] * (step == newest)', "",
        "tests/test_policies.py",
    ),
    Mutation(
        "7b", "a policy that fails keeps nothing",
        "policies.py", 'wanted.append((f"{name} failed", {record.step for record in history}))', "pass",
        "tests/test_custom_policies.py::test_a_policy_that_fails_deletes_nothing_and_the_log_says_so_once",
    ),
    Mutation(
        "7c", "a pin that comes meanwhile is not seen",
        "run/history.py", " or self._catalog.is_pinned(step)", "",
        "tests/run/test_retention_harm.py::test_a_decision_is_looked_at_again_before_each_deletion",
    ),
    Mutation(
        "7c", "a pin is lost as its step is replaced",
        "saving/committing.py", "        self._run.keep_pin(copied.step)\n", "",
        "tests/test_crash.py::test_killed_as_a_pinned_step_is_replaced_the_step_is_pinned",
    ),
    Mutation(
        "7d", "NaN is ranked",
        "policies.py", " and not math.isnan(value) else None", " else None",
        "tests/test_policies.py",
    ),
    Mutation(
        "7e", "metrics are forgotten at a restart",
        "format/manifest.py", 'metrics=body["metrics"]', "metrics={}",
        "tests/test_manager.py::test_retention_keeps_latest_best_and_every_n_and_survives_a_restart",
    ),
    Mutation(
        "7f", "a failed deletion ends the others",
        "run/retention.py", '_log.exception("step %d could not be %s", step, what)', "raise",
        "tests/test_faults.py::test_a_deletion_that_fails_is_logged_does_not_stop_the_next_and_is_finished_later",
    ),
    Mutation(
        "7g", "a step that another policy keeps too loses items",
        "policies.py",
        "if why and names.issuperset(why)}",
        "if not names.isdisjoint(why)}",
        "tests/run/test_reducing.py::test_only_what_nothing_else_keeps_is_reduced_and_never_what_training_resumes_from",
    ),
    Mutation(
        "7g", "the newest whole step is no exception",
        "policies.py",
        '        found += ["newest whole step"] * (step == newest_whole != newest)\n',
        "",
        "tests/run/test_reducing.py::test_only_what_nothing_else_keeps_is_reduced_and_never_what_training_resumes_from",
    ),
    Mutation(
        "7g", "a state that holds the parameters goes",
        "run/history.py",
        "if step in manifests.keys() - whole.keys()}",
        "if step in manifests}",
        "tests/run/test_reducing.py::test_a_state_that_holds_the_parameters_is_left_whole_and_that_is_said_once",
    ),
    Mutation(
        "7g", "a step loses items before it was copied to the mirror",
        "run/retention.py",
        "            if is_spared(step):\n",
        "            if by is None and is_spared(step):\n",
        "tests/run/test_reducing.py::test_a_step_is_not_reduced_before_it_was_copied",
    ),
    Mutation(
        "7g", "a pin at the last moment is not seen",
        "run/local.py",
        "            _check_still(old, was, manifest.step)\n",
        "            pass\n",
        "tests/run/test_reducing.py::test_a_step_that_is_pinned_or_replaced_meanwhile_stays_whole",
    ),
    Mutation(
        "7h", "what stays of a step is not flushed before the swap",
        "run/local.py",
        "        files.sync([draft / manifests.NAME, *files.walk(draft)[0]])\n",
        "",
        "tests/run/test_reducing.py::test_where_there_are_no_hard_links_the_files_are_copied_and_flushed",
    ),
    Mutation(
        "7h", "the step is removed before the other has its name",
        "run/local.py",
        "        old = self._swap(draft, final)\n",
        "        directories.remove(final)\n        old = draft.rename(final)\n        return []\n",
        "tests/run/test_reducing.py::test_killed_at_each_moment_a_step_is_whole_before_or_after_and_nothing_is_left_over",
    ),
    Mutation(
        "7h", "what an interrupted reduction has left stays",
        "run/local.py",
        "    REDUCING: directories.INTERRUPTED_REDUCTION,\n",
        "",
        "tests/run/test_reducing.py::test_killed_at_each_moment_a_step_is_whole_before_or_after_and_nothing_is_left_over",
    ),
    Mutation(
        "7h", "what a reduction has left in a bucket stays",
        "run/bucket.py",
        "        found += [(place, directories.INTERRUPTED_REDUCTION) for place in self._left_of_reductions()]\n",
        "",
        "tests/run/test_reducing.py::test_items_whose_deletion_fails_are_deleted_by_the_next_start",
    ),
    Mutation(
        "7h", "a step in a bucket that was saved anew meanwhile gets an old manifest",
        "run/bucket.py",
        "        is_same = found is not None and found.data == was\n",
        "        is_same = True\n",
        "tests/run/test_reducing.py::test_a_step_in_a_bucket_that_was_saved_anew_meanwhile_keeps_its_manifest",
    ),
    Mutation(
        "7h", "a step that was reduced counts as another save in the mirror",
        "run/mirror.py",
        "return not reducing.is_same_save(here, there)",
        "return (here.time, here.files) != (there.time, there.files)",
        "tests/run/test_reducing.py::test_what_was_reduced_at_home_is_whole_in_a_mirror_that_keeps_all_and_comes_from_there",
    ),
    Mutation(
        "8", "a restore that was overtaken is not read again",
        "restoring/restorer.py", "if request.broadcast or not (is_replaced or is_reduced):", "if True:",
        "tests/test_crash.py::test_a_reader_beside_a_writer_sees_whole_steps_or_a_clear_error",
    ),
    Mutation(
        "8", "a read-only manager cleans up",
        "assembly.py", "    if not options.read_only:\n", "    catalog.tidy()\n    if not options.read_only:\n",
        "tests/test_manager.py::test_closed_and_read_only_managers_do_not_save",
    ),
    Mutation(
        "8", "a step that was reduced is a new one for who watches",
        "run/history.py",
        "if found is not None and not (found.reduced and saved_at.get(step) == found.time):",
        "if found is not None:",
        "tests/run/test_reducing.py::test_a_milestone_is_no_new_checkpoint_for_who_watches",
    ),
    Mutation(
        "9a", "a pickle may set attributes on what it names",
        "interop/opcodes.py", "        if type(made) is not Call or made.state is not None:\n",
        "        if type(made) is Name:\n            [setattr(made.meaning, *pair) for pair in state[1].items()]\n"
        "        elif False:\n",
        "tests/interop/test_pickles.py::test_nothing_that_a_pickle_does_to_a_type_lasts",
    ),
    Mutation(
        "9b", "a name in a manifest may lead anywhere",
        "format/schema.py", "        if not stays_inside(name):\n", "        if False:\n",
        "tests/format/test_manifest.py::test_names_that_lead_outside_of_the_checkpoint_are_refused",
    ),
    Mutation(
        "9c", "symlinks are followed to write",
        "format/paths.py", 'getattr(os, "O_NOFOLLOW", 0)', '(0 if "PINNED" in str(path) else os.O_NOFOLLOW)',
        "tests/test_links.py::test_the_error_names_the_link_and_says_what_to_do",
    ),
    Mutation(
        "10a", "the template decides about weak types",
        "restoring/matching.py", "return wants._replace(kind=\"jax\", dtype=saved.dtype, weak=saved.weak)",
        "return wants._replace(kind=\"jax\", dtype=saved.dtype)",
        "tests/test_exactness.py::test_what_was_saved_decides_about_weak_types",
    ),
    Mutation(
        "10a", "opt_state without a place of its own goes to the default device",
        "trees/following.py",
        "if own is None:\n        return followed\n", "if own is None:\n        return HERE\n",
        "tests/test_exactness.py::test_bits_types_and_places_are_those_of_the_run",
    ),
    Mutation(
        "10a", "a plan that is kept serves whatever is asked for",
        "restoring/planning.py", "if _are(items, manifest.items) and is_alike(before, asked):", "if True:",
        "tests/restoring/test_planning.py",
    ),
    Mutation(
        "10b", "a copy of a save is an implicit transfer",
        "arrays/to_host.py", "return jax.transfer_guard_device_to_host(\"allow\")",
        "return jax.transfer_guard_host_to_device(\"allow\")",
        "tests/test_exactness.py::test_a_save_and_a_restore_make_no_implicit_transfer",
    ),
    Mutation(
        "10c", "an object that answers every name is asked for its state",
        "trees/iterators.py",
        "return not is_tree and all(\n        callable(inspect.getattr_static(value, name, None))",
        "return all(\n        callable(getattr(value, name, None))",
        "tests/saving/test_items.py::test_the_streams_of_nnx_come_back_exactly_and_saving_draws_nothing",
    ),
    Mutation(
        "11a", "what was saved last is no exception",
        "policies.py", 'found += ["last saved"] * (step == committed != newest)', "pass",
        "tests/run/test_retention.py::test_what_was_just_saved_is_kept_although_later_steps_are_there",
    ),
    Mutation(
        "11b", "a directory that is somebody's counts as a step",
        "run/local.py", "            if not recognize.is_step(path):\n", "            if False:\n",
        "tests/test_foreign_files.py::test_a_directory_that_nobody_of_us_wrote_is_no_step_and_is_left_alone",
    ),
    Mutation(
        "11b", "a copy of a step that is half made counts as a step",
        "run/recognize.py", 'return isinstance(found, dict) and "tree_metadata" in found and _LATER not in found',
        "return True",
        "tests/run/test_strangers.py::test_fifty_kinds_of_strangers_are_not_there_for_us_and_stay",
    ),
    Mutation(
        "11b", "a copy of a step counts under its new number",
        "run/recognize.py", "or not _is_of_another_step(path, int(head[1]))",
        "or True",
        "tests/run/test_strangers.py::test_fifty_kinds_of_strangers_are_not_there_for_us_and_stay",
    ),
    Mutation(
        "11b", "a folder that is named as Orbax's metadata makes a step",
        "run/recognize.py", "paths.may_exist(path) and not os.path.isdir(path)", "paths.may_exist(path)",
        "tests/run/test_strangers.py::test_fifty_kinds_of_strangers_are_not_there_for_us_and_stay",
    ),
    Mutation(
        "11b", "a symlink to a step of the run counts as one",
        "run/recognize.py", "    if _leads_beside(path):\n",
        "    if False:\n",
        "tests/run/test_strangers.py::test_fifty_kinds_of_strangers_are_not_there_for_us_and_stay",
    ),
    Mutation(
        "11b", "a copy of a step under another name counts as one",
        "run/recognize.py", "    if is_renamed(path):\n",
        "    if False:\n",
        "tests/run/test_strangers.py::test_a_copy_of_a_step_under_another_name_is_no_step_also_if_no_other_is_left",
    ),
    Mutation(
        "11b", "a step is written into what somebody has put there",
        "run/catalog.py", "        if self._storage.is_somebodys(str(step)):\n",
        "        if False:\n",
        "tests/run/test_strangers.py::test_a_number_that_a_stranger_has_is_refused_by_name_and_the_others_are_saved",
    ),
    Mutation(
        "11b", "in a bucket any object that is named as the marker is one",
        "run/bucket.py", "if marker and not marker.startswith(recognize.MARKED):", "if False:",
        "tests/run/test_strangers.py::test_strangers_in_a_bucket_are_not_there_for_us_and_stay",
    ),
    Mutation(
        "11b", "what is being deleted lies beside the steps",
        "run/local.py", 'self._own.folder(DELETING) / f"{step}-{time.time_ns()}"',
        'self.path / f".deleted-{step}-{time.time_ns()}"',
        "tests/run/test_whereabouts.py::test_over_the_life_of_a_run_nothing_is_touched_outside_of_steps_and_our_folder",
    ),
    Mutation(
        "11c", "a damaged step counts among those to keep",
        "restoring/restorer.py", "self._home.mark_damaged(seen)", "pass",
        "tests/test_crash.py::test_a_damaged_step_is_not_counted_not_deleted_and_its_number_is_free_again",
    ),
    Mutation(
        "11c", "a step that lacks a file counts",
        "run/history.py", "return dataclasses.replace(info, distrusted=missing)", "return info",
        "tests/run/test_retention_harm.py::test_a_step_that_lacks_a_file_is_not_counted_and_not_deleted",
    ),
    Mutation(
        "11c", "steps are deleted while the newest is not understood",
        "run/history.py", "        if unclear:\n", "        if False:\n",
        "tests/run/test_retention_harm.py::test_nothing_is_deleted_while_a_newest_step_is_not_understood",
    ),
    Mutation(
        "11c", "a decision is not looked at again",
        "run/retention.py", "if history.still_holds(decision, step):", "if True:",
        "tests/run/test_retention_harm.py::test_a_decision_is_looked_at_again_before_each_deletion",
    ),
    Mutation(
        "11d", "a rewind moves before it says what it moves",
        "run/moving.py",
        "            self._storage.write_plan(branching.encode(plan.moves))\n            self.finish()\n",
        "            for at in range(len(plan.moves)):\n                self._storage.move(plan.moves[at:])\n",
        "tests/run/test_rewind.py::test_killed_at_any_moment_it_is_done_or_not_begun",
    ),
    Mutation(
        "11d", "a rewind that was interrupted is not finished",
        "run/catalog.py", "        try:\n            self.finish_rewind()\n", "        try:\n            pass\n",
        "tests/run/test_rewind.py::test_killed_at_any_moment_it_is_done_or_not_begun",
    ),
    Mutation(
        "11d", "the newest step leaves before the others",
        "run/branches.py", "reverse=newest_first", "reverse=True",
        "tests/run/test_rewind.py::test_killed_at_any_moment_it_is_done_or_not_begun",
    ),
    Mutation(
        "11d", "what was set aside is removed at the next start",
        "run/directory.py", "STAYS = (KEPT, BRANCH)", "STAYS = (KEPT,)",
        "tests/run/test_rewind.py::test_retention_best_and_leftovers_leave_alone_what_was_set_aside",
    ),
    Mutation(
        "11d", "a branch comes back without what it goes on from",
        "run/branches.py", "while step not in listed or (wanted and mark(str(step)) != wanted):",
        "while step not in listed:",
        "tests/run/test_rewind.py::test_a_branch_comes_back_with_the_steps_that_it_goes_on_from",
    ),
    Mutation(
        "11d", "the mirror keeps what was set aside",
        "saving/aftermath.py", "                mirror.rewind(there)\n", "                pass\n",
        "tests/run/test_rewind.py::test_the_mirror_goes_back_too",
    ),
    Mutation(
        "11d", "policies go by what was set aside",
        "saving/saver.py",
        "        self._last, self._is_empty = None, False\n        self._shared", "        self._shared",
        "tests/run/test_rewind.py::test_policies_go_by_the_branch_that_is_live",
    ),
    Mutation(
        "11d", "the next start does not say that another branch was saved last",
        "restoring/restorer.py", "                self._warn_of_lower(candidate)\n", "",
        "tests/run/test_rewind.py::test_without_a_rewind_the_save_and_the_next_start_say_what_is_meant",
    ),
    Mutation(
        "12a", "what a caller changed after an interrupt is saved",
        "arrays/writing.py", "        if self._is_abandoned:\n", "        if False:\n",
        "tests/processes/test_background.py::test_ctrl_c_at_any_moment_loses_nothing_and_the_manager_goes_on",
    ),
    Mutation(
        "12a", "a thread that an exception ends is not followed by another",
        "processes/background.py", '            if not self._works.locked():', '            if False:',
        "tests/processes/test_background.py::test_a_thread_that_an_exception_ends_leaves_its_tasks_to_the_next",
    ),
    Mutation(
        "12b", "two managers of a run have a queue each",
        "run/lock.py", '_runs.get(self._key) or Shared()', 'Shared()',
        "tests/run/test_sharing.py::test_two_managers_do_not_write_the_same_step",
    ),
    Mutation(
        "12b", "a link to a run is another run",
        "run/lock.py", 'os.path.realpath(directory) if', 'str(directory) if',
        "tests/run/test_sharing.py::test_two_managers_of_one_run_save_in_turn_and_lose_nothing",
    ),
    Mutation(
        "12b", "an interrupt while a run is locked locks its own process out",
        "run/lock.py", "            self._close_opened()\n            self.opened =", "            self.opened =",
        "tests/run/test_sharing.py::test_an_interrupt_while_the_lock_is_taken_does_not_lock_this_process_out",
    ),
    Mutation(
        "12b", "a forked child may write",
        "saving/saver.py",
        "        if self._shared.process != os.getpid():\n            raise",
        "        if False:\n            raise",
        "tests/run/test_sharing.py::test_a_forked_child_reads_and_writes_nothing",
    ),
    Mutation(
        "12b", "a manager closed by its callback lets go at once",
        "manager.py", 'elif self._pending.is_current():', 'elif False:',
        "tests/run/test_sharing.py::test_a_callback_may_call_every_method",
    ),
    Mutation(
        "12b", "the garbage collector takes a lock",
        "run/lock.py", '_thread.start_new_thread(_settle, ())', '_settle()',
        "tests/run/test_sharing.py::test_what_the_garbage_collector_calls_takes_no_lock_and_waits_for_nothing",
    ),
    Mutation(
        "13a", "what a manifest says is not looked at",
        "format/manifest.py", "        schema.check_manifest(body)\n", "",
        "tests/format/test_manifest.py::test_every_field_that_is_anything_else_is_damage_or_is_of_use",
    ),
    Mutation(
        "13a", "an error of the disk comes as it is",
        "format/recorded.py",
        "except (OSError, ValueError) as problem:  # a directory in its place, a bad sector,",
        "except ValueError as problem:  #",
        "tests/test_odd_files.py::test_anything_in_the_place_of_any_file_or_folder_is_said_and_walked_back_from",
    ),
    Mutation(
        "13b", "files are mapped",
        'arrays/reading.py', '        return ts.Context()  # files are read',
        '        return ts.Context({"file_io_mode": {"mode": "memmap"}})  # files are read',
        'tests/test_truncated.py',
    ),
    Mutation(
        "13b", "a device without an end is read",
        'format/paths.py', 'if stat.S_ISREG(os.fstat(descriptor).st_mode):',
        'if True:',
        'tests/test_odd_files.py::test_anything_in_the_place_of_any_file_or_folder_is_said_and_walked_back_from',
    ),
    Mutation(
        "13b", "a process without open files passes good steps over",
        'format/paths.py', 'getattr(problem, "errno", None) in _EXHAUSTED',
        'False',
        'tests/test_odd_files.py::test_a_process_that_may_open_no_more_files_says_so_and_passes_nothing_over',
    ),
    Mutation(
        "14a", "what the processes save is not compared",
        "processes/job.py", "        if is_other:\n", "        if False:\n",
        "tests/processes/test_job.py::test_what_differs_in_one_process_is_refused_in_all_by_leaf_and_nothing_is_written",
    ),
    Mutation(
        "14a", "a directory that is not shared is not looked for",
        "run/opening.py", "while token and not _has(directory, token):", "while False:",
        "tests/processes/test_job.py::test_directories_that_are_not_shared_are_refused_in_all",
    ),
    Mutation(
        "14b", "each process gets the state of the first",
        "run/values.py", "{manifests.own_place(process, item.file)}", "{manifests.own_place(0, item.file)}",
        "tests/processes/test_job.py::test_each_process_gets_its_own_iterator_back_and_another_number_is_told",
    ),
    Mutation(
        "14c", "a process that is slow is not waited for",
        "processes/heartbeat.py", "if self._newest.get(i) != each}", "if False}",
        "tests/processes/test_job.py::test_a_save_that_is_slow_in_one_process_is_not_failed_by_the_others",
    ),
    Mutation(
        "14c", "a question to a coordinator that stands still has no bound",
        "processes/coordinator.py", "if not question.comes(wait_s):", "if not question.comes(1e6):",
        "tests/processes/test_emergencies.py::"
        "test_the_others_name_who_is_missing_in_time_and_the_job_goes_on_from_the_last_step",
    ),
    Mutation(
        "14c", "a program of several processes has no bound",
        "processes/job.py", "errand.comes(self.timeout_s - pulse_s)", "errand.comes(1e6)",
        "tests/processes/test_emergencies.py::"
        "test_the_others_name_who_is_missing_in_time_and_the_job_goes_on_from_the_last_step",
    ),
    Mutation(
        "14c", "a wait for a save does not say which process is missing",
        "results.py", "raise save.named(late)", "raise late",
        "tests/processes/test_emergencies.py::"
        "test_the_others_name_who_is_missing_in_time_and_the_job_goes_on_from_the_last_step",
    ),
    Mutation(
        "14c", "a question that its caller has left is asked all the same",
        "processes/coordinator.py", "while not self.is_left:", "while True:",
        "tests/processes/test_coordinator.py::"
        "test_a_question_that_was_left_is_over_before_the_next_and_one_that_was_not_begun_is_dropped",
    ),
    Mutation(
        "14c", "a question does not wait for the one before it",
        "processes/coordinator.py", "with self._asking:", "with contextlib.nullcontext():",
        "tests/processes/test_job.py::test_an_interrupt_as_process_0_decides_leaves_it_able_to_decide_again",
    ),
    Mutation(
        "16", "nothing is said of what `partial` kept",
        "restoring/restorer.py", "        _warn_of_partial(step, passed)\n", "",
        "tests/test_exactness.py::test_partial_says_what_it_kept_and_what_it_did_not_read",
    ),
    Mutation(
        "16", "it is not said why an item is gone",
        "restoring/matching.py",
        "    _refuse_reduced(manifest, templates, request)\n",
        "",
        "tests/run/test_reducing.py::test_who_asks_for_what_is_gone_is_told_why",
    ),
    Mutation(
        "16", "a rename that matches nothing is accepted",
        "restoring/matching.py", "if rule not in used]", "if False]",
        "tests/test_exactness.py::test_a_rename_that_matches_nothing_is_refused",
    ),
    Mutation(
        "16", "nothing is said of what a mesh cannot carry",
        "trees/meshes.py", "    if lost:\n", "    if False:\n",
        "tests/trees/test_placement.py::test_what_a_mesh_lacks_or_does_not_divide_is_replicated_and_said_once",
    ),
]  # fmt: skip

"""The guards whose absence a test must notice (`mutations.py` takes them out one by one).

Each is a text of a source file that stands there exactly once, what stands there without the guard, and the test that must fail then. When
the source changes, its row is to be changed here too.
"""

from typing import NamedTuple

DURABLE, LOADER = "tests/configs/test_durable.py::", "tests/configs/test_loader.py::"
ARENA, BLOCKS, COMMIT = (f"tests/pretrain/checkpoint/test_{name}.py::" for name in ("arena", "blocks", "commit"))
RETENTION, SAVES = "tests/pretrain/checkpoint/test_retention.py::", "tests/pretrain/checkpoint/test_saves.py::"
LEASE, FOLDER, GUARD = (f"tests/pretrain/run/test_{name}.py::" for name in ("lease", "folder", "guard"))

IN_FLIGHT = SAVES + "test_a_save_is_committed_at_a_later_step_when_all_have_written"
TOGETHER = COMMIT + "test_two_ranks_commit_fail_and_recover_together"
IN_ORDER = DURABLE + "test_everything_in_a_folder_reaches_the_disk_before_its_name"
IN_TIME = DURABLE + "test_a_file_reaches_the_disk_before_its_name_and_its_name_before_the_return"
FLIPPED = BLOCKS + "test_every_flipped_bit_truncation_and_growth_is_found"
ODD_MANIFEST = BLOCKS + "test_a_manifest_with_too_few_sums_or_an_unknown_name_is_damage"
COVERED = "tests/pretrain/checkpoint/test_fragments.py::test_a_gap_or_an_overlap_is_found"
SELF_TEST = "tests/pretrain/checkpoint/test_self_test.py::test_every_stage_passes_and_what_is_broken_does_not"
ATTEMPTS = "tests/pretrain/run/test_supervisor.py::test_it_begins_again_while_that_may_help"


class Mutation(NamedTuple):
    """A guard, and how it is taken out."""

    guard: str
    """What would be gone, in words."""
    file: str
    old: str
    new: str
    test: str
    """What must fail then: a test of pytest's naming."""


MUTATIONS = (
    # --- a file, a folder: on the disk before its name, and whole ---
    Mutation("a file is synced before its name", "configs/durable.py", "            os.fsync(file.fileno())\n", "", IN_TIME),
    Mutation(
        "the folder is synced behind a file's name",
        "configs/durable.py",
        "        temporary.unlink(missing_ok=True)\n    sync_path(path.parent)\n",
        "        temporary.unlink(missing_ok=True)\n",
        IN_TIME,
    ),
    Mutation(
        "a file gets its name when it is whole",
        "configs/durable.py",
        "        temporary.replace(path)\n    finally:",
        "        path.write_bytes(content)\n    finally:",
        IN_TIME,
    ),
    Mutation(
        "files are synced before the rename",
        "configs/durable.py",
        "        sync_path(path)\n    sync_path(temporary)",
        "        pass\n    sync_path(temporary)",
        IN_ORDER,
    ),
    Mutation(
        "the folder is synced before the rename",
        "configs/durable.py",
        "    sync_path(temporary)\n    temporary.rename",
        "    temporary.rename",
        IN_ORDER,
    ),
    Mutation(
        "the sync is before the rename, not behind it",
        "configs/durable.py",
        "    sync_path(temporary)\n    temporary.rename(final)\n",
        "    temporary.rename(final)\n    sync_path(final)\n",
        IN_ORDER,
    ),
    Mutation("the parent is synced behind the rename", "configs/durable.py", "    sync_path(final.parent)\n", "", IN_ORDER),
    Mutation("a link is not followed", "configs/durable.py", "os.O_NOFOLLOW | ", "", DURABLE + "test_only_a_plain_file_is_opened_as_one"),
    Mutation(
        "a sealed record is compared with its sum",
        "configs/sealed.py",
        "if digest != sha256(text).hexdigest().encode():",
        "if False:",
        "tests/configs/test_sealed.py::test_every_flipped_bit_is_found",
    ),
    Mutation(
        "a rank's file is synced",
        "pretrain/checkpoint/blocks.py",
        "        os.fsync(file.fileno())\n",
        "",
        ARENA + "test_what_is_announced_has_reached_the_disk",
    ),
    Mutation(
        "the folder of a rank's files is synced",
        "pretrain/checkpoint/writer.py",
        "    sync_folder(folder)\n",
        "",
        ARENA + "test_what_is_announced_has_reached_the_disk",
    ),
    Mutation(
        "a write that took a part goes on",
        "pretrain/checkpoint/blocks.py",
        "    while written < len(view):\n",
        "    if written < len(view):\n",
        BLOCKS + "test_a_disk_that_takes_a_part_at_a_time_gets_all",
    ),
    # --- what is read is what was written ---
    Mutation(
        "a block is compared with its sum",
        "pretrain/checkpoint/blocks.py",
        """num_read != len(block) or _digest(block) != self.records[name]["sha256"][number]""",
        "num_read != len(block)",
        FLIPPED,
    ),
    Mutation("a file's size is compared", "pretrain/checkpoint/blocks.py", """if size != record["bytes"]:""", "if False:", FLIPPED),
    Mutation(
        "each block has a sum",
        "pretrain/checkpoint/blocks.py",
        """if len(record["sha256"]) != -(-size // BLOCK_BYTES):""",
        "if False:",
        ODD_MANIFEST,
    ),
    Mutation(
        "no range ends behind its file",
        "pretrain/checkpoint/blocks.py",
        "if end > self._size(name):",
        "if False:",
        BLOCKS + "test_a_range_behind_the_end_is_damage",
    ),
    Mutation(
        "the manifest is compared with its seal",
        "pretrain/checkpoint/verify.py",
        "if seal != seal_of(content):",
        "if False:",
        COMMIT + "test_every_flipped_bit_of_the_manifest_is_found_and_named",
    ),
    Mutation(
        "a manifest names files of ranks alone",
        "pretrain/checkpoint/verify.py",
        """if stray := sorted(name for name in content["files"] if not FILE_NAME.fullmatch(name)):""",
        "if stray := list[str]():",
        COMMIT + "test_a_name_that_no_rank_writes_is_found_though_the_seal_is_right",
    ),
    Mutation(
        "a commit of another format is not read",
        "pretrain/checkpoint/verify.py",
        """if content["format"] != FORMAT:""",
        "if False:",
        COMMIT + "test_a_manifest_of_another_format_is_not_judged",
    ),
    Mutation(
        "a stray file is a problem",
        "pretrain/checkpoint/verify.py",
        "stray = sorted(set(names_in(commit.files_folder)) - set(commit.files) - {MANIFEST})",
        "stray = list[str]()",
        COMMIT + "test_a_stray_file_is_found_and_named",
    ),
    Mutation(
        "the newest is the highest step",
        "pretrain/checkpoint/verify.py",
        "sorted(found, reverse=True)]",
        "found]",
        COMMIT + "test_the_newest_is_the_highest_step",
    ),
    Mutation(
        "no element of a weight is missing or there twice",
        "pretrain/checkpoint/index.py",
        "if place.first != position:",
        "if False:",
        COVERED,
    ),
    Mutation("a weight has its last elements", "pretrain/checkpoint/index.py", "if position != prod(shape):", "if False:", COVERED),
    Mutation(
        "weights are the master weights, rounded",
        "pretrain/checkpoint/fragments.py",
        "if equal and not bool(torch.stack(equal).all()):",
        "if False:",
        SELF_TEST,
    ),
    Mutation(
        "what comes back is compared before the first step",
        "pretrain/checkpoint/self_test.py",
        "if different := arena.differences(image_of(engine, rank, world_size, {})):",
        "if different := list[str]():",
        SELF_TEST,
    ),
    # --- the commit ---
    Mutation(
        "the manifest is there before the rename",
        "pretrain/checkpoint/commit.py",
        "            write_manifest(commit)\n            if not self._still_ours():\n                raise OSError(TAKEN_OVER)\n"
        "            commit_folder(commit.folder, commit_folder_of(place.checkpoints, commit.state.step))\n",
        "            if not self._still_ours():\n                raise OSError(TAKEN_OVER)\n"
        "            commit_folder(commit.folder, commit_folder_of(place.checkpoints, commit.state.step))\n"
        "            write_manifest(replace(commit, folder=commit_folder_of(place.checkpoints, commit.state.step)))\n",
        COMMIT + "test_killed_at_each_point_there_is_the_old_commit_or_the_new_one",
    ),
    Mutation(
        "only who holds the lease commits",
        "pretrain/checkpoint/commit.py",
        "if not self._still_ours():",
        "if False:",
        COMMIT + "test_the_lease_is_asked_last_when_everything_is_written",
    ),
    Mutation(
        "the lease is asked last",
        "pretrain/checkpoint/commit.py",
        "            write_manifest(commit)\n            if not self._still_ours():\n                raise OSError(TAKEN_OVER)\n",
        "            if not self._still_ours():\n                raise OSError(TAKEN_OVER)\n            write_manifest(commit)\n",
        COMMIT + "test_the_lease_is_asked_last_when_everything_is_written",
    ),
    Mutation(
        "a rank that cannot write is heard",
        "pretrain/checkpoint/commit.py",
        "enumerate(gathered) if problem is not None]",
        "enumerate(gathered) if problem is not None and rank == 0]",
        TOGETHER,
    ),
    Mutation(
        "a rank that cannot load is heard",
        "pretrain/checkpoint/commit.py",
        "for problem in gathered if problem is not None})",
        "for problem in gathered[:1] if problem is not None})",
        TOGETHER,
    ),
    Mutation(
        "an answer of the save before commits nothing",
        "pretrain/checkpoint/commit.py",
        " and step > self._commit.state.step and",
        " and",
        IN_FLIGHT,
    ),
    Mutation(
        "all ranks have written before the commit",
        "pretrain/checkpoint/commit.py",
        "num_written == world_size:",
        "num_written > 0:",
        IN_FLIGHT,
    ),
    Mutation(
        "one save is in flight at most",
        "pretrain/checkpoint/commit.py",
        "        problem = self.settle()\n        self._place,",
        "        problem = None\n        self._place,",
        IN_FLIGHT,
    ),
    Mutation(
        "failed saves in a row end the run",
        "pretrain/checkpoint/commit.py",
        "if self._failures == FAILURES_IN_A_ROW:",
        "if False:",
        IN_FLIGHT,
    ),
    Mutation(
        "a save that succeeds forgives the failed ones",
        "pretrain/checkpoint/commit.py",
        "self._failures + 1 if problem else 0",
        "self._failures + 1 if problem else self._failures",
        IN_FLIGHT,
    ),
    Mutation("a failed save leaves nothing", "pretrain/checkpoint/commit.py", "            give_up(commit.folder)\n", "", TOGETHER),
    Mutation(
        "with damaged commits alone nothing begins anew", "pretrain/checkpoint/commit.py", "    if rejected:\n", "    if False:\n", TOGETHER
    ),
    Mutation(
        "what was rejected is not replaced",
        "pretrain/checkpoint/commit.py",
        "    while is_commit(target := rejected / f\"{folder.name}{f'.{number}' if number else ''}\"):\n        number += 1\n",
        "    target = rejected / f\"{folder.name}{f'.{number}' if number else ''}\"\n",
        COMMIT + "test_what_is_rejected_never_replaces_what_was_rejected_before",
    ),
    # --- what is kept ---
    Mutation(
        "what is damaged is neither deleted nor counted",
        "pretrain/checkpoint/verify.py",
        """return commit if all(size_of(commit.files_folder / name) == known["bytes"] for name, known in commit.files.items()) else None""",
        "return commit",
        RETENTION + "test_what_is_damaged_neither_goes_nor_counts",
    ),
    Mutation(
        "the newest stay",
        "pretrain/checkpoint/retention.py",
        "if place < num_newest else None",
        "if place < num_newest - 1 else None",
        RETENTION + "test_the_newest_are_kept",
    ),
    Mutation(
        "the beginning of another run stays",
        "pretrain/checkpoint/retention.py",
        "if begun := children.get(commit.state.step):",
        "if begun := list[str]():",
        RETENTION + "test_the_beginning_of_another_run_stays",
    ),
    Mutation(
        "what goes has no commit's name",
        "pretrain/checkpoint/retention.py",
        "[uncommit(commit.folder, commit.attempt) for commit in old]",
        "[commit.folder for commit in old]",
        RETENTION + "test_a_deletion_cut_short_leaves_no_half_commit",
    ),
    Mutation(
        "there is room for what is to come",
        "pretrain/checkpoint/retention.py",
        "if free < wanted:",
        "if False:",
        RETENTION + "test_room_is_wanted_for_what_is_still_to_come",
    ),
    Mutation(
        "a rollback moves none of a later attempt",
        "pretrain/checkpoint/set_aside.py",
        " and _attempt_of(commit) <= attempt:",
        ":",
        "tests/pretrain/checkpoint/test_set_aside.py",
    ),
    # --- processes ---
    Mutation(
        "a writer does not hear what stops a run",
        "pretrain/checkpoint/writer.py",
        "        signal.signal(number, signal.SIG_IGN)\n",
        "        signal.signal(number, signal.SIG_DFL)\n",
        ARENA + "test_what_stops_a_run_does_not_stop_its_writer",
    ),
    Mutation(
        "a writer ends with its rank",
        "pretrain/checkpoint/writer.py",
        "    end_with_parent(parent)\n",
        "",
        ARENA + "test_a_writer_that_is_stopped_ends_with_its_rank",
    ),
    Mutation(
        "a rank ends with its parent",
        "pretrain/run/signals.py",
        "    _prctl(_PR_SET_PDEATHSIG, how)\n",
        "    return\n",
        "tests/pretrain/run/test_signals.py::test_a_rank_ends_with_its_parent",
    ),
    Mutation(
        "a rank whose parent is gone ends at once",
        "pretrain/run/signals.py",
        "if os.getppid() != parent:",
        "if False:",
        "tests/pretrain/run/test_signals.py::test_a_rank_whose_parent_ended_before_it_asked_ends_at_once",
    ),
    Mutation(
        "a writer that died is a problem",
        "pretrain/checkpoint/arena.py",
        """if not line.endswith(b"\\n"):""",
        "if False:",
        ARENA + "test_a_writer_that_is_killed_is_a_problem_and_the_next_save_has_another",
    ),
    Mutation(
        "one process holds a run",
        "pretrain/run/lease.py",
        "os.O_CREAT | os.O_EXCL | os.O_WRONLY",
        "os.O_CREAT | os.O_WRONLY",
        LEASE + "test_a_second_process_is_refused_and_changes_nothing",
    ),
    Mutation(
        "nobody renews the lease of another",
        "pretrain/run/lease.py",
        "                if holds_lease(self._folder, self.attempt):\n                    os.utime",
        "                if True:\n                    os.utime",
        LEASE + "test_beats_while_it_lives_but_never_on_anothers_lease",
    ),
    Mutation(
        "a process of the same number is not the holder",
        "pretrain/run/lease.py",
        """abs(process.create_time() - float(holder.get("process_started", 0))) > 2 or """,
        "",
        LEASE + "test_another_process_of_the_same_number_is_not_the_holder",
    ),
    Mutation(
        "attempts in vain are bounded",
        "pretrain/run/supervisor.py",
        "        if in_vain >= config.run.attempts_in_vain:\n            if",
        "        if False:\n            if",
        ATTEMPTS,
    ),
    Mutation(
        "what fails twice in the same way is not tried again",
        "pretrain/run/supervisor.py",
        "if in_vain and verdict.status == EXIT_DEFECT and _cause(verdict.message) == cause:",
        "if False:",
        ATTEMPTS,
    ),
    Mutation(
        "a lack of memory is not tried again",
        "pretrain/run/outcome.py",
        "first.comes_again or bool(OUT_OF_MEMORY.search(first.message))",
        "first.comes_again",
        "tests/pretrain/run/test_outcome.py::test_a_lack_of_memory_would_come_again",
    ),
    Mutation(
        "a run that lost its commits does not begin anew",
        "pretrain/run/folder.py",
        "if committed and not newest_step and not any(there):",
        "if False:",
        FOLDER + "test_a_run_whose_checkpoints_are_gone_does_not_begin_at_nothing",
    ),
    Mutation(
        "a run keeps what it must keep of its run file",
        "pretrain/run/folder.py",
        "if different and self.has_begun():",
        "if False:",
        FOLDER + "test_another_configuration_is_refused_with_exactly_the_keys_that_differ",
    ),
    # --- numbers ---
    Mutation(
        "a loss that is not finite reaches the gradient",
        "pretrain/engine/finite.py",
        "return scale + 0.0 * loss.detach()",
        "return scale",
        "tests/pretrain/engine/test_finite.py::test_the_factor_is_nan_for_a_loss_that_is_not_finite",
    ),
    Mutation(
        "stage 0 skips what is not finite",
        "pretrain/engine/finite.py",
        "        if not optimizer.overflow:\n            apply()\n",
        "        apply()\n",
        "tests/pretrain/engine/test_finite.py::test_a_bad_number_of_one_rank_is_skipped_by_both_and_counted",
    ),
    Mutation(
        "skipped steps in a row end the run",
        "pretrain/run/guard.py",
        "if in_a_row >= limit:",
        "if False:",
        GUARD + "test_skips_are_counted_in_a_row_and_the_fifth_ends_the_run",
    ),
    Mutation(
        "a bad loss that was learnt from is a defect",
        "pretrain/run/guard.py",
        "elif not math.isfinite(one.loss):",
        "elif False:",
        GUARD + "test_what_was_applied_with_a_loss_that_is_not_finite_is_a_defect",
    ),
    Mutation(
        "replicas are compared",
        "pretrain/engine/replicas.py",
        "if not wrong_RP.any():",
        "if True:",
        "tests/pretrain/engine/test_replicas.py::test_a_flipped_bit_is_found_and_its_rank_named",
    ),
    Mutation(
        "a step is applied on all ranks or on none",
        "pretrain/watch/verdicts.py",
        "if num_applied not in (0, self._layout.world_size):",
        "if False:",
        "tests/pretrain/watch/test_verdicts.py::test_a_step_that_some_ranks_applied_is_a_defect",
    ),
    # --- what comes from outside ---
    Mutation(
        "what is said holds no secret",
        "configs/redaction.py",
        """return re.sub(pattern, lambda found: f"[{forms[found[0]]}]", text)""",
        "return text",
        "tests/configs/test_redaction.py::test_a_secret_of_the_environment_is_replaced_however_it_is_written",
    ),
    Mutation(
        "a rank's record holds no secret",
        "pretrain/run/outcome.py",
        """"message": redact(outcome.message)""",
        """"message": outcome.message""",
        "tests/pretrain/run/test_outcome.py::test_a_record_holds_no_secret",
    ),
    Mutation(
        "a run file has no aliases",
        "configs/loader.py",
        "if self.check_event(yaml.AliasEvent):",
        "if False:",
        LOADER + "test_broken_and_hostile_files_are_refused_in_words",
    ),
    Mutation(
        "a run file is of bounded length",
        "configs/loader.py",
        "MOST_CHARACTERS = 1 << 18",
        "MOST_CHARACTERS = 1 << 40",
        LOADER + "test_broken_and_hostile_files_are_refused_in_words",
    ),
    Mutation(
        "names lead nowhere",
        "configs/section.py",
        """NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")""",
        """NAME_PATTERN = re.compile(r"(?s).+")""",
        "tests/configs/test_schema.py::test_names_that_cannot_be_folders_are_refused",
    ),
)

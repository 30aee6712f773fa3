"""The campaign of faulty launches: what goes wrong where runs are launched, and the test that holds each to its promise.

    python -m tests.faults.launches

Each is refused, or ended within its bound, with a message that names the cause. Out: a line for each fault, with the cases tried. All of
them are tests of `make test` and `make test-long` too; what needs a real Slurm, hosts or Ray cluster is `make cluster-tests`.
"""

import sys
from collections import Counter
from collections.abc import Sequence

import pytest

FAULTS = {
    "a hostfile: missing, empty, no text, no or wrong slots, a host twice, a hostile name": (
        "tests/launch/test_hostfile.py::test_a_bad_hostfile_is_refused_with_its_line"
    ),
    "no hosts, hosts twice, more hosts asked for than there are": (
        "tests/launch/test_hostfile.py::test_a_cluster_that_does_not_say_which_hosts_is_refused"
    ),
    "a hostile host name": "tests/launch/test_hostfile.py::test_a_hostile_name_is_no_host",
    "hosts that cannot be reached, or are no hosts of ours": (
        "tests/launch/test_ssh.py::test_hosts_that_cannot_take_part_are_named_together_and_nothing_starts"
    ),
    "a host without Python, scratch, or the first host's name": "tests/launch/test_ssh.py::test_what_a_host_lacks_is_said",
    "a host that does not see the run's folder": "tests/launch/test_ssh.py::test_a_folder_that_hosts_do_not_see_is_said",
    "a port in use where the run meets": "tests/launch/test_local.py::test_a_port_that_is_taken_is_passed_over",
    "ports in use on a node": "tests/launch/test_preflight.py::test_ports_that_are_taken",
    "a meeting place that is none": "tests/pretrain/run/test_team.py::test_a_rendezvous_that_is_none_is_refused",
    "a node that is absent": "tests/pretrain/run/test_team.py::test_an_absent_node_is_named",
    "a node that is absent, before step 0": "tests/launch/test_doctor.py::test_a_node_that_is_absent_is_named",
    "a node that is cut off": "tests/pretrain/run/test_team.py::test_a_node_that_is_cut_off_is_named_and_the_run_goes_on_when_it_is_back",
    "a host whose connection falls": "tests/launch/test_ssh.py::test_a_host_whose_connection_fell_is_taken_in_again",
    "a host that does not come back": "tests/launch/test_ssh.py::test_a_host_that_does_not_come_back_is_given_up",
    "a first node's name that leads nowhere": "tests/launch/test_preflight.py::test_a_name_that_leads_nowhere",
    "a first node's name that leads each node to itself": "tests/launch/test_preflight.py::test_a_name_that_leads_others_to_themselves",
    "another configuration on a node": "tests/pretrain/run/test_team.py::test_a_node_that_is_not_like_the_first_is_refused_by_name",
    "another version of a library on a node": "tests/launch/test_doctor.py::test_two_nodes_of_which_one_has_another_version",
    "mixed drivers, versions, code": "tests/launch/test_doctor.py::test_mixed_versions_are_named_with_both_values",
    "code that differs in a byte": "tests/launch/test_preflight.py::test_code_that_differs_in_a_byte_has_another_hash",
    "a variable that would not arrive": "tests/launch/test_kubernetes.py::test_a_passed_name_without_a_secret_is_refused",
    "values with quotes, commas, $, newlines": "tests/launch/test_plan.py::test_hostile_values_arrive_byte_for_byte",
    "the same in manifests": "tests/launch/test_kubernetes.py::test_values_arrive_as_they_are",
    "the same in a job of Ray": "tests/launch/test_ray_job.py::test_the_job_script_carries_any_environment_and_keeps_the_exit_status",
    "hostile names of folders": "tests/launch/test_plan.py::test_hostile_folders_are_one_word_in_the_script",
    "folders with Slurm's own placeholders": "tests/launch/test_slurm.py::test_a_folder_that_slurm_would_read_otherwise",
    "values that no environment can carry": "tests/launch/test_validate.py::test_what_no_environment_can_carry",
    "variables that bash lets nobody set": "tests/launch/test_validate.py::test_what_bash_lets_nobody_set",
    "a crash at each start, over requeues": (
        "tests/pretrain/run/test_supervisor.py::test_a_launch_s_attempts_in_vain_are_counted_over_its_starts"
    ),
    "supervisors killed at each start": "tests/launch/test_slurm.py::test_supervisors_that_were_killed_have_made_an_attempt",
    "a job that should, or should not, be queued again": "tests/launch/test_slurm.py::test_when_the_job_goes_back_into_the_queue",
    "a setup command that fails": "tests/launch/test_plan.py::test_a_setup_that_fails_ends_the_node",
    "an exit status that could get lost: this machine": "tests/launch/test_local.py::test_the_exit_status_is_the_nodes",
    "an exit status that could get lost: ssh": "tests/launch/test_ssh.py::test_exit_statuses_arrive",
    "an exit status that could get lost: Ray": (
        "tests/launch/test_ray_job.py::test_a_job_is_submitted_and_followed_and_its_exit_status_is_kept"
    ),
    "an exit status that could get lost: pods": "tests/launch/test_kubernetes.py::test_only_stopped_early_becomes_retryable",
    "a launcher killed by SIGKILL": "tests/launch/test_ssh.py::test_a_launcher_that_is_killed_leaves_no_process",
    "a launcher that falls silent": "tests/launch/test_ssh.py::test_a_launcher_that_falls_silent_leaves_no_process",
    "a supervisor killed by SIGKILL": (
        "tests/pretrain/run/test_team.py::test_a_supervisor_that_is_killed_takes_its_ranks_along_and_the_others_give_up"
    ),
    "a doctor killed by SIGKILL": "tests/launch/test_doctor.py::test_a_killed_doctor_leaves_no_process",
    "nodes that do not end": "tests/launch/test_ssh.py::test_nodes_that_do_not_end_in_their_grace_are_ended",
    "Slurm's signal before the time ends": "tests/launch/test_slurm.py::test_the_signal_reaches_the_supervisors",
    "a signal to the launcher": "tests/launch/test_ssh.py::test_a_signal_is_passed_on_to_all_nodes",
    "the end of a pod": "tests/launch/test_kubernetes.py::test_a_stop_reaches_the_supervisor_and_its_save_is_waited_for",
    "a signal while the doctor looks": "tests/launch/test_doctor.py::test_a_stop_before_the_training_can_be_started_again",
    "a manifest with a field that does not exist": "tests/launch/test_kubernetes.py::test_a_field_that_does_not_exist_would_be_found",
    "a server that refuses, or does not answer": "tests/launch/test_kubernetes.py::test_a_server_that_does_not_answer_is_not_waited_for",
    "what Slurm refuses": "tests/launch/test_slurm.py::test_a_refusal_names_the_key",
    "a server of Ray that takes jobs from everybody": (
        "tests/launch/test_ray_job.py::test_a_server_that_takes_jobs_from_everybody_is_refused"
    ),
    "a slow device": "tests/launch/test_doctor.py::test_a_slow_device_is_named",
    "a device that somebody else uses": "tests/launch/test_doctor.py::test_a_device_that_somebody_else_uses_is_named",
    "a wrong sum, a slow link": "tests/launch/test_doctor.py::test_a_wrong_sum_and_a_slow_link_are_named",
    "GPUs that are missing, of another kind, or broken": "tests/launch/test_preflight.py::test_gpus",
    "a folder that cannot be written": "tests/launch/test_preflight.py::test_a_folder_that_cannot_be_written",
    "a disk without room, before anything starts": "tests/launch/test_local.py::test_a_disk_without_room",
    "a disk without room on a node": "tests/launch/test_preflight.py::test_a_disk_without_room",
    "a disk that gives back other bytes": "tests/launch/test_preflight.py::test_a_disk_that_gives_back_other_bytes",
    "a checkpoint that comes back changed": "tests/launch/test_preflight.py::test_a_checkpoint_that_comes_back_changed",
    "a shared folder that is not shared": "tests/launch/test_preflight.py::test_shared_folders",
    "data that are not there, or not finished": "tests/launch/test_local.py::test_data_that_is_not_there_or_not_finished",
    "data of another tokenizer": "tests/launch/test_local.py::test_data_of_another_tokenizer",
    "a batch that does not divide": "tests/launch/test_local.py::test_a_batch_that_does_not_divide",
    "a check that hangs": "tests/launch/test_preflight.py::test_a_stuck_check_is_named_in_time_and_the_others_pass",
}
"""What goes wrong, in the order of a launch, and the test of it. Its cases are counted."""


class Record:
    """A plugin of pytest: how the cases of each test ended."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(report.nodeid.partition("[")[0], Counter())[report.outcome] += 1


def main(arguments: Sequence[str] = ()) -> int:
    """Run them all. Returns 0 when every case of every fault was run and passed. arguments: of pytest."""
    record = Record()
    pytest.main(["-q", *arguments, *FAULTS.values()], plugins=[record])
    whole = 0
    for fault, test in FAULTS.items():
        outcomes = record.outcomes.get(test, Counter())
        whole += set(outcomes) == {"passed"}
        print(f"{fault}: " + (", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "not run"))
    print(f"{whole} of {len(FAULTS)} faults of launches as promised, {sum(map(Counter.total, record.outcomes.values()))} cases")
    return int(whole != len(FAULTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

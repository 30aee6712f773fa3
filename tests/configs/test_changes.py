"""What may differ when a run goes on: the class of every key, written out, and what two configurations differ in."""

from typing import Any

import pytest

from configs.changes import Change, all_keys, changes_between, differing_keys
from configs.schema import RunConfig
from tests.configs.keys import LEAVES, another, value_at, with_value

# Written out here, so that a class is a decision. A key that is in neither table is refused.
FREE = {
    *("run.name", "run.root", "run.readable_by", "run.attempts_in_vain"),
    *("data.cache", "data.cache_bytes", "data.quarantine_limit", "data.workers", "data.verify_before_training"),
    *("data.tokenizer.engine", "data.tokenizer.checked_fraction"),
    *("mixture.max_epochs", "performance.compile_cache"),
    *(key for key in LEAVES if key.startswith(("checkpoint.", "stall.")) and key != "checkpoint.store"),
    *(key for key in LEAVES if key.startswith(("watch.", "profile."))),
    *("evaluate.prompts", "evaluate.prompt_tokens"),
}
IN_NEW_DATA = {
    *(f"data.{key}" for key in ("sources", "clean", "deduplicate", "held_out_fraction", "work_unit_bytes", "shard_tokens")),
    *("data.packed_lengths", "data.largest_document_bytes", "data.tokenizer.path"),
}
APPLIED = {
    "data.root",
    "mixture.stages",
    *(f"optimizer.{key}" for key in ("peak_lr", "muon_peak_lr", "muon_momentum", "beta1", "beta2", "epsilon", "weight_decay")),
    *("optimizer.clip_norm", "optimizer.offload"),
    *(f"schedule.{key}" for key in ("kind", "warmup_tokens", "decay_tokens", "final_ratio")),
    *("training.total_tokens", "training.micro_batch_samples"),
    "precision",
    *("parallel.zero_stage", "parallel.processes", "parallel.cpu_processes"),
    *(f"performance.{key}" for key in ("compile", "activation_checkpointing", "loss_memory_bytes", "fp8")),
    *(f"evaluate.{key}" for key in ("every_steps", "micro_batch_samples", "tasks", "tasks_every_steps", "tasks_limit")),
    *(key for key in LEAVES if key.startswith("guard.")),
    "deepspeed",
}
# What decided the past: it may never leave this class.
DECIDED = ("model.", "objective.", "run.seed", "data.seed", "data.tokenizer.vocabulary_size", "optimizer.kind", "training.sequence_length")


def test_every_key_has_the_class_that_is_written_here() -> None:
    keys = {key.name: key for key in all_keys()}
    assert keys.keys() == LEAVES.keys()
    free, applied = ({name for name, key in keys.items() if key.at_resume == kind} for kind in ("free", "applied"))
    assert free == FREE
    assert applied == APPLIED | IN_NEW_DATA
    assert {key.at_resume for name, key in keys.items() if name.startswith(DECIDED)} == {"refused"}


def test_the_table_has_the_defaults_and_the_words_of_the_schema() -> None:
    keys = {key.name: key for key in all_keys()}
    assert (keys["optimizer.peak_lr"].default, keys["data.sources"].default, keys["deepspeed"].default) == (3e-4, [], {})
    assert keys["mixture.stages"].default == [{"from_tokens": 0, "weights": None, "epochs": None, "sequence_length": None}]
    assert keys["run.seed"].description.startswith("Seeds initial weights")


@pytest.mark.parametrize("dotted", LEAVES)
def test_a_key_that_is_changed_is_found_alone_with_its_class(dotted: str) -> None:
    before = RunConfig()
    now = with_value(before, dotted, another(value_at(before, dotted), LEAVES[dotted].annotation))
    (change,) = changes_between(before, now)
    wanted = "free" if dotted in FREE else "applied" if dotted in APPLIED | IN_NEW_DATA else "refused"
    assert (change.key, change.at_resume) == (dotted, wanted)
    assert change.old != change.new
    assert differing_keys(before, now) == ({dotted: (change.old, change.new)} if wanted == "refused" else {})
    if wanted == "applied":
        assert ("{step}" in change.when) == (dotted in APPLIED)


def build(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(sections)


def test_no_difference_is_no_difference() -> None:
    assert changes_between(RunConfig(), RunConfig()) == []


def test_all_differences_are_reported_in_the_schema_s_order() -> None:
    now = build(watch={"log_every_steps": 3}, optimizer={"peak_lr": 1.0}, model={"num_layers": 13})
    assert changes_between(RunConfig(), now) == [
        Change("model.num_layers", 12, 13, "refused", ""),
        Change("optimizer.peak_lr", 3e-4, 1.0, "applied", "from step {step} on"),
        Change("watch.log_every_steps", 10, 3, "free", ""),
    ]
    assert differing_keys(RunConfig(), now) == {"model.num_layers": (12, 13)}


def test_values_are_as_a_run_file_has_them() -> None:
    ramp = ({"until_tokens": 1000, "global_batch_samples": 8},)
    assert differing_keys(RunConfig(), build(training={"batch_ramp": ramp})) == {"training.batch_ramp": ([], [*ramp])}


def test_a_section_that_may_be_null_is_compared_whole_or_key_by_key() -> None:
    """Its keys have its class."""
    scaling = {"kind": "yarn", "factor": 4.0, "original_context": 2048}
    one, two = build(model={"rope_scaling": scaling}), build(model={"rope_scaling": scaling | {"factor": 8.0}})
    assert differing_keys(one, two) == {"model.rope_scaling.factor": (4.0, 8.0)}
    assert differing_keys(RunConfig(), one).keys() == {"model.rope_scaling"}

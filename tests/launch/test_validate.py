"""What a launch is refused for before anything is written: each in a sentence that names what was found and what to change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from launch.validate import FIXED_VARIABLES, SECTIONS, validate_launch
from tests.launch.plans import a_plan, a_run

SLURM: dict[str, Any] = {"slurm": {}}
KUBERNETES: dict[str, Any] = {"kubernetes": {"image": "pretrain:1", "volumes": ({"claim": "all", "path": "/shared"},)}}
EVERY = {**SLURM, **KUBERNETES, "hosts": {"hosts": ("a", "b")}, "ray": {}}


def refusal(folder: Path, kind: str, *overrides: str, sections: dict[str, Any] = EVERY, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        validate_launch(replace(a_plan(folder, kind, **sections), **changes), a_run(folder, *overrides))
    return str(caught.value)


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_plan_that_fits_is_taken(tmp_path: Path, kind: str) -> None:
    validate_launch(a_plan(tmp_path, kind, **EVERY), a_run(tmp_path))
    validate_launch(replace(a_plan(tmp_path, "local"), nodes=1), a_run(tmp_path))


@pytest.mark.parametrize(("kind", "section"), SECTIONS.items())
def test_a_cluster_file_without_the_section_of_its_kind(tmp_path: Path, kind: str, section: str) -> None:
    others = {key: value for key, value in EVERY.items() if key != section}
    said = refusal(tmp_path, kind, sections=others)
    assert f"no section `{section}:`" in said
    assert said.endswith(f"(this one is for: {', '.join(other for other in SECTIONS if other != kind)}).")
    assert "(this one is for: local only)" in refusal(tmp_path, kind, sections={})


def test_many_nodes_on_this_machine(tmp_path: Path) -> None:
    assert "launch local starts one node, this machine, and 2 were asked for" in refusal(tmp_path, "local")


@pytest.mark.parametrize("kind", ["local", "kubernetes", "hostfile", "ray"])
def test_a_chain_elsewhere_than_in_slurm(tmp_path: Path, kind: str) -> None:
    assert "--chain 3" in refusal(tmp_path, kind, nodes=1, chain=3)


@pytest.mark.parametrize("kind", ["local", "hostfile"])
def test_a_build_of_data_where_there_is_no_ray(tmp_path: Path, kind: str) -> None:
    assert "pretrain data build RUN.yaml" in refusal(tmp_path, kind, nodes=1, builds_data=True)


def test_a_batch_that_does_not_divide_names_the_nearest_sizes(tmp_path: Path) -> None:
    said = refusal(tmp_path, "slurm", nodes=3)
    assert said.startswith(
        "3 nodes x 2 processes: a global batch of 8 samples does not divide by 6 ranks x 2 samples; the nearest that do: "
    )
    assert "training.global_batch_samples=12" in said
    validate_launch(replace(a_plan(tmp_path, "slurm", **EVERY), nodes=3, builds_data=True), a_run(tmp_path))  # a build has no batches


@pytest.mark.parametrize("kind", ["slurm", "hostfile"])
@pytest.mark.parametrize(("shared", "what"), [("/shared/runs", "data.root"), ("/shared/datasets", "run.root"), ("/share", "run.root")])
def test_what_lies_where_the_nodes_do_not_see_it(tmp_path: Path, kind: str, shared: str, what: str) -> None:
    said = refusal(tmp_path, kind, sections={**EVERY, "job": {"shared_folders": (shared,)}})
    assert said.startswith(f"{what}: /shared/")
    assert f"job.shared_folders of cluster here ({shared})" in said


def test_shared_folders_hold_everything_or_are_not_said(tmp_path: Path) -> None:
    both = {**EVERY, "job": {"shared_folders": ("/shared/runs/../datasets", "/shared/runs", "/shared/pretrain")}}
    validate_launch(a_plan(tmp_path, "slurm", **both), a_run(tmp_path))
    assert "the folder of the code: /shared/pretrain" in refusal(
        tmp_path, "slurm", sections={**EVERY, "job": {"shared_folders": ("/shared/runs", "/shared/datasets")}}
    )
    validate_launch(a_plan(tmp_path, "slurm", **EVERY), a_run(tmp_path))
    validate_launch(a_plan(tmp_path, "slurm", **both), a_run(tmp_path, "data.root=s3://bucket/web"))


def test_a_container_in_which_nothing_would_be_seen(tmp_path: Path) -> None:
    image = {"runtime": "apptainer", "image": "image.sif"}
    said = refusal(tmp_path, "slurm", sections={**EVERY, "container": image})
    assert "job.shared_folders is empty" in said and "run.root (/shared/runs/mine)" in said
    validate_launch(a_plan(tmp_path, "slurm", **EVERY, container={**image, "mounts": ("/shared:/shared",)}), a_run(tmp_path))


def test_a_shared_folder_that_is_relative(tmp_path: Path) -> None:
    assert "found 'shared', wanted an absolute path" in refusal(
        tmp_path, "slurm", sections={**EVERY, "job": {"shared_folders": ("shared",)}}
    )


def test_pods_see_their_volumes_only(tmp_path: Path) -> None:
    elsewhere = {"kubernetes": {"image": "pretrain:1", "volumes": ({"claim": "all", "path": "/data"},)}}
    assert "run.root: /shared/runs/mine lies in none of kubernetes.volumes" in refusal(tmp_path, "kubernetes", sections=elsewhere)
    assert "(there are none)" in refusal(tmp_path, "kubernetes", sections={"kubernetes": {"image": "pretrain:1"}})


def test_what_no_environment_can_carry(tmp_path: Path) -> None:
    said = refusal(tmp_path, "slurm", sections={**EVERY, "job": {"environment": {"ODD": "a\0b"}}})
    assert said.startswith("the environment variable ODD holds a NUL")
    assert refusal(tmp_path, "slurm", run_folder="/shared/a\0b").startswith("run.root holds a NUL")
    kept = {**EVERY, "job": {"environment": {"ODD": "a,b\"'`$(touch x)\n"}}}
    validate_launch(a_plan(tmp_path, "slurm", **kept), a_run(tmp_path))


@pytest.mark.parametrize("name", sorted(FIXED_VARIABLES))
def test_what_bash_lets_nobody_set(tmp_path: Path, name: str) -> None:
    assert f"the environment variable {name} cannot be set" in refusal(
        tmp_path, "slurm", sections={**EVERY, "job": {"environment": {name: "1"}}}
    )
    assert f"the environment variable {name} cannot be set" in refusal(tmp_path, "slurm", passed=(name,))

"""Cluster files: every one that is packaged, and that mistakes in one's own are said as those in a run file are."""

import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.loader import load_cluster

FOLDER = Path(__file__).parent.parent.parent / "configs" / "clusters"
PACKAGED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Any:
    Path("mine.yaml").write_text(text, encoding="utf-8")
    return load_cluster("mine.yaml", overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


# --- the ready ones ----------------------------------------------------------------------------------------


def test_there_is_a_ready_file_for_each_kind_of_place() -> None:
    assert PACKAGED == ["hosts", "kubernetes-h100", "slurm-a100", "slurm-h100", "slurm-h200", "this-machine"]


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_file_loads_by_name_and_by_path(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert load_cluster(FOLDER / f"{name}.yaml") == load_cluster(str(FOLDER / f"{name}.yaml")) == cluster


@pytest.mark.parametrize("name", [name for name in PACKAGED if re.search(r"[ah]\d00", name)])
def test_a_ready_file_with_gpus_knows_them_whole(name: str) -> None:
    hardware = load_cluster(name).hardware
    missing = [key for key in type(hardware).model_fields if getattr(hardware, key) in (None, 0)]
    assert missing == ["storage_gb_per_second"]  # of a site, not of a node
    assert hardware.gpu is not None
    assert hardware.gpu.lower() in name


def test_the_makers_numbers() -> None:
    """bf16 TFLOPS (dense), GB, GB/s of memory, GB/s of NVLink in one direction: NVIDIA's data sheets."""
    published = {
        "slurm-a100": (312, 80, 2039, 300),
        "slurm-h100": (989, 80, 3350, 450),
        "slurm-h200": (989, 141, 4800, 450),
        "kubernetes-h100": (989, 80, 3350, 450),
    }
    for name, numbers in published.items():
        found = load_cluster(name).hardware
        assert (found.bf16_tflops, found.gpu_memory_gb, found.gpu_memory_gb_per_second, found.intra_node_gb_per_second) == numbers


@pytest.mark.parametrize("name", PACKAGED)
def test_a_ready_file_says_what_a_site_changes(name: str) -> None:
    assert ("CHANGE" in (FOLDER / f"{name}.yaml").read_text()) == (name != "this-machine")


def test_the_example_on_the_front_page_is_a_cluster_file() -> None:
    section = (FOLDER.parent.parent / "README.md").read_text().partition("## Launching on a cluster\n")[2].partition("\n## ")[0]
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    cluster = load(example)
    assert (cluster.hardware.gpus_per_node, cluster.slurm.account, cluster.job.shared_folders) == (8, "lab", ("/shared",))


# --- one's own ---------------------------------------------------------------------------------------------


def test_a_file_of_ones_own_is_named_after_itself_and_overridden() -> None:
    cluster = load("slurm: {partition: long}", "slurm.partition=short", "nodes=3")
    assert (cluster.name, cluster.nodes, cluster.slurm.partition) == ("mine", 3, "short")
    assert load("name: other").name == "other"


def test_a_ready_file_can_be_included() -> None:
    cluster = load("include: [clusters/slurm-h100.yaml]\nname: ours\nslurm: {account: lab}")
    assert (cluster.name, cluster.hardware.gpu, cluster.slurm.account) == ("ours", "H100", "lab")


@pytest.mark.parametrize("name", ["slurm-h1000", "nothing", "../slurm-h100", ""])
def test_a_name_that_there_is_not_lists_those_there_are(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no cluster '{re.escape(name)}'; there are {', '.join(PACKAGED)}, or give the path"):
        load_cluster(name)


def test_a_file_that_is_not_there_names_the_nearest() -> None:
    Path("ours.yaml").write_text("name: ours")
    with pytest.raises(UserError, match=re.escape("our.yaml: no such file. The nearest name there is ours.yaml.")):
        load_cluster("our.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slurm: {partitions: long}", "mine.yaml: slurm.partitions: there is no such key. The nearest is slurm.partition."),
        ("job: {grace: 5}", "mine.yaml: job.grace: there is no such key. The nearest is job.grace_seconds."),
        ("training: {sequence_length: 5}", "mine.yaml: training: there is no such key."),
        ("nodes: two", "mine.yaml: nodes: found the text 'two', wanted a whole number."),
        ("nodes: 0", "wanted greater than 0"),
        ("hardware: {gpu: H100}", "mine.yaml: hardware: gpu and gpus_per_node go together: a name and a number, or null and 0."),
        ("slurm: {extra: [mail]}", "wanted an option of sbatch that begins with --"),
        ('job: {setup: ["a\\nb"]}', "found a line break, wanted one line for each item"),
        ("kubernetes: {}", "mine.yaml: kubernetes.image: found nothing, wanted a value for this key."),
        ("- job", "found a list, wanted sections such as `job:` and `slurm:`."),
    ],
)
def test_mistakes_are_said_as_in_a_run_file(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize("name", ["node;touch x", "$(touch x)", "`x`", "a b", "-oProxyCommand=x", "a\tb", "", "é"])
def test_words_that_a_shell_would_take_for_more_are_refused(name: str) -> None:
    for key in ("hosts.hosts", "slurm.exclude"):
        assert "wanted a host name or an IPv4 address" in refusal("{}", f"{key}={[name]!r}")
    for key in ("slurm.partition", "job.python", "job.network_interface", "hosts.user"):
        assert "wanted letters, digits and @%+=:,./_-" in refusal("{}", f"{key}={name!r}")
    assert "wanted the name of an environment variable" in refusal("{}", f"job.pass_environment={[name]!r}")


def test_secrets_stay_outside_and_their_names_may_stand_here() -> None:
    key = "sk-" + "a1B2" * 10
    for text in (f"job: {{environment: {{SOME_KEY: {key}}}}}", "job: {environment: {HF_TOKEN: abc}}", f"# {key}\nname: mine"):
        said = refusal(text)
        assert "job.pass_environment" in said
        assert key not in said
    manifest = "{image: pretrain:1, image_pull_secret: pull, secrets: {WANDB_API_KEY: [wandb, api-key]}}"
    cluster = load(f"kubernetes: {manifest}\njob: {{pass_environment: [WANDB_API_KEY]}}")
    assert cluster.kubernetes.secrets == {"WANDB_API_KEY": ("wandb", "api-key")}
    assert key not in refusal(f"kubernetes: {{image: pretrain:1, secrets: {{WANDB_API_KEY: [wandb, {key}]}}}}")

"""What a cluster is, and how jobs start there: one file for each, beside the run files, used by every launcher and by the doctor.

In: `configs/clusters/NAME.yaml`, or a file of the user's own. Out: a frozen `ClusterConfig`. No torch, no ray. A run file says what is
trained and is the same everywhere; whatever is of a place (partition, image, modules, environment, paths) stands here.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from configs.section import PositiveFloat, PositiveInt, Section

HOST_PATTERN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
"""Host names and IPv4 addresses: what is put into a command line, never anything that a shell could take for more."""
VARIABLE_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WORD_PATTERN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9@%+=:,./_-]*")


def _matching(pattern: re.Pattern[str], wanted: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"found {text!r}, wanted {wanted}")
        return text

    return AfterValidator(check)


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise ValueError("found a line break, wanted one line for each item")
    return text


HostName = Annotated[str, _matching(HOST_PATTERN, "a host name or an IPv4 address")]
VariableName = Annotated[str, _matching(VARIABLE_PATTERN, "the name of an environment variable: letters, digits, '_'")]
Word = Annotated[str, _matching(WORD_PATTERN, "letters, digits and @%+=:,./_-, without spaces")]
Line = Annotated[str, AfterValidator(_one_line)]
"""One line of shell, the user's own."""
Port = Annotated[int, Field(ge=1024, le=65535)]


class HardwareSection(Section):
    """What one node has. The planner computes with it, the doctor compares."""

    gpu: str | None = None
    """As `nvidia-smi` names it, or a part of that: "H100"; null: none, training is on CPUs."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    gpu_memory_gb: PositiveFloat | None = None
    cpus_per_node: PositiveInt | None = None
    memory_gb: PositiveFloat | None = None
    """Of the host."""
    bf16_tflops: PositiveFloat | None = None
    """Of one GPU, dense, as its maker says."""
    gpu_memory_gb_per_second: PositiveFloat | None = None
    """Bandwidth of one GPU's memory."""
    intra_node_gb_per_second: PositiveFloat | None = None
    """Between GPUs of a node, per GPU, in one direction."""
    inter_node_gb_per_second: PositiveFloat | None = None
    """Between nodes, per node, in one direction."""
    storage_gb_per_second: PositiveFloat | None = None
    """Written to the shared folders by one node."""

    @model_validator(mode="after")
    def _gpu_has_a_name(self) -> "HardwareSection":
        if bool(self.gpu) != bool(self.gpus_per_node):
            raise ValueError("gpu and gpus_per_node go together: a name and a number, or null and 0")
        return self


class JobSection(Section):
    """How a process starts on a node, whatever starts it."""

    python: Word = "python3"
    """The interpreter on the nodes that this project is installed in."""
    setup: tuple[Line, ...] = ()
    """Lines of shell before it, such as `module load cuda/12.8`."""
    environment: dict[VariableName, str] = Field(default_factory=dict)
    """Set on every node. No secrets: those are passed."""
    pass_environment: tuple[VariableName, ...] = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "HF_TOKEN", "HF_HOME")
    """Taken from the shell that launches, where it has them; they travel in a file that only its owner can read. Nothing else is taken."""
    shared_folders: tuple[str, ...] = ()
    """Absolute paths that every node sees as the same. Where given, run folder, data and launch files must lie in one of them."""
    scratch: str = "/tmp"
    """A folder of each node's own, for temporary files and what is compiled."""
    network_interface: Word | None = None
    """Name of the network device that nodes reach each other by (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); null: theirs to find."""
    rendezvous_port: Port = 29400
    """On the first node; where it is taken, the next ones are tried."""
    join_seconds: PositiveFloat = 300.0
    """Until all nodes have to be there; then those that are not are named."""
    grace_seconds: PositiveInt = 120
    """Between the signal to save and the end by force."""
    doctor: bool = True
    """Whether every launch begins with the doctor's checks on all nodes."""


class ContainerSection(Section):
    """A container around each node's process."""

    runtime: Literal["pyxis", "apptainer"]
    image: Word
    mounts: tuple[Word, ...] = ()
    """SOURCE:TARGET[:ro]."""


class SlurmSection(Section):
    """What sbatch is told."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    minutes: PositiveInt = 1440
    """Time limit of a job; the run goes on in the next one."""
    gpus_by: Literal["gres", "gpus-per-node", "none"] = "gres"
    """How this cluster is asked for GPUs."""
    exclusive: bool = True
    """Whole nodes."""
    exclude: tuple[HostName, ...] = ()
    """Nodes that are not wanted."""
    extra: tuple[Line, ...] = ()
    """Other options of sbatch, one each: `--mail-type=FAIL`."""

    @field_validator("extra")
    @classmethod
    def _options(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            if not line.startswith("--"):
                raise ValueError(f"found {line!r}, wanted an option of sbatch that begins with --")
        return lines


class VolumeSection(Section):
    """A claim that the pods mount."""

    claim: Word
    path: str
    read_only: bool = False


class KubernetesSection(Section):
    """What the manifests say."""

    namespace: Word = "default"
    kind: Literal["job", "jobset", "pytorchjob"] = "job"
    """An indexed Job with a headless service; JobSet; or the Kubeflow training operator's."""
    image: Word
    image_pull_secret: Word | None = None
    service_account: Word | None = None
    volumes: tuple[VolumeSection, ...] = ()
    """At least one that all nodes can write to (ReadWriteMany): run folder and data."""
    secrets: dict[VariableName, tuple[Word, Word]] = Field(default_factory=dict)
    """Environment variable -> (name of a Secret, key in it). Only referred to, never written out."""
    gpu_resource: Word = "nvidia.com/gpu"
    resources: dict[Word, Word] = Field(default_factory=dict)
    """Other requests and limits of a pod: `rdma/ib: "8"`, `memory: 1Ti`."""
    shared_memory_gb: PositiveFloat = 64.0
    node_selector: dict[Word, Word] = Field(default_factory=dict)
    tolerations: tuple[dict[str, str], ...] = ()
    queue: Word | None = None
    """Of Kueue (the label kueue.x-k8s.io/queue-name)."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a node may fail for another reason than being stopped early."""
    user_id: PositiveInt = 1000
    """Who runs inside: never root."""


class HostsSection(Section):
    """Bare machines, reached by ssh."""

    hostfile: str | None = None
    """DeepSpeed's: a line `HOST slots=N` each."""
    hosts: tuple[HostName, ...] = ()
    """Or their names; each then has `hardware.gpus_per_node` processes."""
    user: Word | None = None
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    ssh_options: tuple[Word, ...] = ()
    """For `ssh -o`: `StrictHostKeyChecking=accept-new`."""
    connect_seconds: PositiveInt = 10


class RayOnClusterSection(Section):
    """Ray where the cluster is Ray's, and for the data build."""

    address: str | None = None
    """Of the dashboard that takes jobs: http://HEAD:8265."""
    port: Port = 6379
    """Of a head that a launcher starts inside an allocation."""
    cpus_per_node: PositiveInt | None = None
    """null: all of them."""


class ClusterConfig(Section):
    """A cluster file."""

    name: Word
    nodes: PositiveInt = 1
    """How many a launch takes where --nodes does not say."""
    hardware: HardwareSection = HardwareSection()
    job: JobSection = JobSection()
    container: ContainerSection | None = None
    slurm: SlurmSection | None = None
    kubernetes: KubernetesSection | None = None
    hosts: HostsSection | None = None
    ray: RayOnClusterSection | None = None

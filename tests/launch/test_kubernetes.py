"""Manifests for Kubernetes: as the golden files have them, valid for every version, safe for every value; and how they are submitted.

python -m tests.launch.test_kubernetes      writes the golden files anew, to be read before they are committed
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from configs.cluster import ClusterConfig, KubernetesSection
from configs.errors import UserError
from launch import kubernetes
from launch.kubernetes import MANIFESTS, STOPPED_AS_KILLED, delete, object_name, render, submit
from launch.kubernetes_pod import escape
from launch.plan import Code, LaunchPlan

HERE = Path(__file__).parent
KINDS = ("job", "jobset", "pytorchjob")
VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.37")
SCHEMAS = {"JobSet": "jobset.json", "PyTorchJob": "pytorchjob.json"}

FULL = {
    "name": "gpus",
    "hardware": {"gpu": "H100", "gpus_per_node": 8},
    "job": {
        "python": "/opt/pretrain/bin/python",
        "environment": {"NCCL_DEBUG": "WARN"},
        "scratch": "/scratch",
        "network_interface": "eth0",
        "grace_seconds": 300,
    },
    "kubernetes": {
        "namespace": "research",
        "image": "registry.example/pretrain:0.1.0",
        "image_pull_secret": "registry",
        "service_account": "trainer",
        "volumes": [
            {"claim": "runs", "path": "/shared"},
            {"claim": "corpus", "path": "/data", "read_only": True},
        ],
        "secrets": {"WANDB_API_KEY": ["wandb", "api-key"]},
        "resources": {"cpu": "96", "memory": "1500Gi", "rdma/ib": "8"},
        "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": "300"}],
        "queue": "team-a",
    },
}
SMALL = {"name": "small", "kubernetes": {"image": "pretrain", "volumes": [{"claim": "runs", "path": "/shared"}]}}


def make_plan(cluster: dict[str, Any], kind: str = "job", **changes: Any) -> LaunchPlan:
    cluster = cluster | {"kubernetes": cluster["kubernetes"] | {"kind": kind}}
    plan = LaunchPlan(
        kind="kubernetes",
        launch_id="20261123-101500-ab12",
        run_name="Llama_1B.v2",
        run_folder="/shared/runs/Llama_1B.v2",
        folder="/home/somebody/launches/20261123-101500-ab12",
        nodes=4,
        processes_per_node=8,
        cluster=ClusterConfig.model_validate_json(json.dumps(cluster)),
        code=Code("/home/somebody/pretrain", None, None),
        environment=cluster.get("job", {}).get("environment", {}),
        configuration="run:\n  name: Llama_1B.v2\n  root: /shared/runs\n",
    )
    return replace(plan, **changes)


def manifests_of(plan: LaunchPlan) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(plan)[MANIFESTS]))


def pod_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    spec = manifests[-1]["spec"]
    if "replicatedJobs" in spec:
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return (spec["pytorchReplicaSpecs"]["Master"] if "pytorchReplicaSpecs" in spec else spec)["template"]["spec"]


# --- what is rendered --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifests_are_the_golden_ones(kind: str) -> None:
    assert render(make_plan(FULL, kind)) == {MANIFESTS: (HERE / "golden" / f"kubernetes-{kind}.yaml").read_text()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cluster", "nodes"), [(FULL, 4), (SMALL, 1)], ids=["full", "small"])
def test_the_manifests_are_valid(cluster: dict[str, Any], nodes: int, kind: str, version: str) -> None:
    for manifest in manifests_of(make_plan(cluster, kind, nodes=nodes)):
        validate(manifest, version)


def validate(manifest: dict[str, Any], version: str) -> None:
    """Against the schemas of Kubernetes and, for what is not its own, of the custom resource; what that holds of Kubernetes too."""
    if manifest["kind"] in SCHEMAS:
        jsonschema.validate(manifest, json.loads((HERE / "schemas" / SCHEMAS[manifest["kind"]]).read_text()))
    for builtin in [manifest] if manifest["kind"] not in SCHEMAS else builtins_in(manifest):
        assert kubernetes_validate.validate(builtin, version, strict=True) == version


def builtins_in(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    metadata, spec = {"name": "inner"}, manifest["spec"]
    jobs = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata} | job["template"] for job in spec.get("replicatedJobs", ())]
    roles = spec.get("pytorchReplicaSpecs", {}).values()
    return jobs + [{"apiVersion": "v1", "kind": "Pod"} | role["template"] for role in roles]


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_does_not_exist_would_be_found(kind: str) -> None:
    for place in ("top", "pod"):
        *_, manifest = manifests_of(make_plan(FULL, kind))
        (manifest["spec"] if place == "top" else pod_of([manifest]))["terminationGraceSeconds"] = 30
        with pytest.raises(jsonschema.ValidationError, match="terminationGraceSeconds"):
            validate(manifest, "1.34")


@pytest.mark.parametrize(
    ("kind", "node", "host"),
    [
        ("job", "$(JOB_COMPLETION_INDEX)", "NAME-0.NAME"),
        ("jobset", "$(JOB_COMPLETION_INDEX)", "NAME-nodes-0-0.NAME"),
        ("pytorchjob", "$(RANK)", "NAME-master-0"),
    ],
)
def test_each_pod_runs_its_supervisor(kind: str, node: str, host: str) -> None:
    plan = make_plan(FULL, kind)
    command = [expand(word, {}) for word in pod_of(manifests_of(plan))["containers"][0]["command"]]
    before, script, place = command[:-6], command[-4], command[-2:]
    assert command[-6:-4] == ["bash", "-c"]
    assert place == [node, f"{host.replace('NAME', object_name(plan))}:29400"]
    assert script.startswith("set -eo pipefail\ntrap ")
    assert "/opt/pretrain/bin/python -m pretrain.cli doctor --cluster /etc/pretrain/cluster.yaml --run /etc/pretrain/run.yaml" in script
    last = script.splitlines()[-1]
    assert last.startswith("exec /opt/pretrain/bin/python -m pretrain.cli train /etc/pretrain/run.yaml --nodes 4 --node ")
    assert '--node "$1" --rendezvous "$2" --launch 20261123-101500-ab12' in last
    assert before == (["bash", "-c", STOPPED_AS_KILLED, "bash"] if kind == "pytorchjob" else [])


def test_the_script_runs_what_it_says(tmp_path: Path) -> None:
    """The cluster's own lines, the doctor, then the supervisor, each with its place; a doctor that fails is the end."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$ASKED $*" >>{tmp_path}/calls\n[ "$3" = train ] || exit "${{DOCTOR:-0}}"\n')
    python.chmod(0o755)
    cluster = SMALL | {"job": {"python": str(python), "setup": ["export ASKED=$(echo by-a-site)"]}}
    command = pod_of(manifests_of(make_plan(cluster)))["containers"][0]["command"]
    command = [expand(word, {"JOB_COMPLETION_INDEX": "3"}) for word in command]
    for doctor, calls in (("0", ["doctor", "train"]), ("1", ["doctor"])):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(command, env={**os.environ, "DOCTOR": doctor}, timeout=20, check=False)
        assert done.returncode == int(doctor)
        lines = (tmp_path / "calls").read_text().splitlines()
        assert [line.split()[:4] for line in lines] == [["by-a-site", "-m", "pretrain.cli", verb] for verb in calls]
        assert all("--nodes 4 --node 3 --rendezvous llama-1b-v2-39ca1f3a-0.llama-1b-v2-39ca1f3a:29400" in line for line in lines)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("script", ["of a node", "of a PyTorchJob"])
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    of_a_node = expand(pod_of(manifests_of(make_plan(FULL)))["containers"][0]["command"][2], {})
    text = of_a_node if script == "of a node" else STOPPED_AS_KILLED
    done = subprocess.run(["shellcheck", "--shell", "bash", "-"], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""


def test_the_doctor_may_be_left_out() -> None:
    cluster = SMALL | {"job": {"doctor": False}}
    assert "doctor" not in pod_of(manifests_of(make_plan(cluster)))["containers"][0]["command"][2]


def test_the_files_are_those_of_the_launch() -> None:
    plan = make_plan(FULL)
    data = manifests_of(plan)[0]["data"]
    assert data["run.yaml"] == plan.configuration
    assert ClusterConfig.model_validate_json(json.dumps(yaml.safe_load(data["cluster.yaml"]))) == plan.cluster


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_has_no_rights(kind: str) -> None:
    """The standard "restricted" of Kubernetes' Pod Security, and more."""
    pod = pod_of(manifests_of(make_plan(SMALL, kind)))
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == KubernetesSection(image="x").user_id
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert container["resources"] == {"requests": {}, "limits": {}}


def test_what_ends_a_pod_decides_what_follows() -> None:
    spec = manifests_of(make_plan(FULL))[-1]["spec"]
    rules = [(rule["action"], *rule.get("onExitCodes", {}).get("values", ["disrupted"])) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("Ignore", 75), ("FailJob", 2), ("Ignore", "disrupted")]
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"], spec["podReplacementPolicy"]) == (3, 0, "Failed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 330


# --- names and values --------------------------------------------------------------------------------------


def test_every_run_name_has_a_label(seed: int) -> None:
    chance = random.Random(seed)
    names = {"".join(chance.choices(string.ascii_letters + string.digits + "._-", k=chance.randint(1, 64))) for _ in range(500)}
    names |= {"A.b", "a-b", "a_b", "a", "7b", "---", "...", "Ä", "x" * 64, "x" * 64 + "y", "-a-", "$(touch here)", "a\nb", ""}
    labels = {object_name(make_plan(SMALL, run_name=name)) for name in names}
    assert len(labels) == len(names)
    for label in labels:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label)
        assert len(f"{label}-nodes-0-99999-abcde") <= 63
    assert object_name(make_plan(SMALL)) != object_name(make_plan(SMALL, launch_id="20261123-101500-ab13"))


def expand(text: str, variables: dict[str, str]) -> str:
    """What the kubelet makes of it: $$ is $, and $(NAME) is NAME's value, or stays where there is none."""

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


HOSTILE = (
    *("a,b", "it's", 'say "x"', "$HOME", "$(HOSTNAME)", "$$", "$$(HOSTNAME)", "$", "two\nlines\n", "\ttab ", " ", "", "#x", "- x", "a: b"),
    *(
        "yes",
        "NO",
        "null",
        "~",
        "true",
        "1e3",
        "0o17",
        "0x10",
        "1_000",
        "12",
        "1.5",
        "-1",
        "2001-01-01",
        "1:30",
        ".inf",
        "=",
        "<<",
        "!x",
        "&a",
        "*a",
    ),
    *("{{x}}", "%x", "@x", "`id`", "ä\u2028", "end \n ", "back\\slash", "y" * 300),
)


@pytest.mark.parametrize("kind", KINDS)
def test_values_arrive_as_they_are(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    values = [*HOSTILE, *("".join(chance.choices("$()$$A B\n'\",:\\#", k=12)) for _ in range(200))]
    told = {f"V{i}": value for i, value in enumerate(values)}
    manifests = manifests_of(make_plan(SMALL, kind, environment=told, configuration="\n".join(HOSTILE)))
    env = {item["name"]: expand(item["value"], {"HOSTNAME": "wrong", "A": "wrong"}) for item in pod_of(manifests)["containers"][0]["env"]}
    assert env == {"HOME": "/tmp", "USER": "pretrain", "PYTHONUNBUFFERED": "1", "TMPDIR": "/tmp"} | told
    assert manifests[0]["data"]["run.yaml"] == "\n".join(HOSTILE)


def test_what_is_escaped_expands_to_itself(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(2000):
        text = "".join(chance.choices("$$()AB", k=10))
        assert expand(escape(text), {"A": "wrong", "B": "wrong", "AB": "wrong", "": "wrong"}) == text


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kubernetes_own_reader_reads_the_same(tmp_path: Path) -> None:
    """`kubectl kustomize` reads and writes with the libraries that the server has, and needs none."""
    told = {f"V{i}": value for i, value in enumerate(HOSTILE) if value not in ("=", "<<")}  # PyYAML does not read them plain
    plan = make_plan(FULL, environment=told)
    (tmp_path / MANIFESTS).write_text(render(plan)[MANIFESTS])
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{MANIFESTS}]\n")
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

    def ordered(manifests: Any) -> list[Any]:
        return sorted(manifests, key=lambda manifest: manifest["kind"])

    assert ordered(yaml.safe_load_all(done.stdout)) == ordered(manifests_of(plan))


def test_the_code_is_the_image_s() -> None:
    env = pod_of(manifests_of(make_plan(FULL)))["containers"][0]["env"]
    assert "PYTHONPATH" not in {item["name"] for item in env}
    env = pod_of(manifests_of(make_plan(FULL, environment={"PYTHONPATH": "/shared/mine"})))["containers"][0]["env"]
    assert {"name": "PYTHONPATH", "value": "/shared/mine"} in env


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_secret_is_referred_to_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    text = render(make_plan(FULL, passed=("WANDB_API_KEY",)))[MANIFESTS]
    assert "canary" not in text
    assert {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}}} in pod_of(
        list(yaml.safe_load_all(text))
    )["containers"][0]["env"]


def test_a_passed_name_without_a_secret_is_refused() -> None:
    with pytest.raises(UserError, match=r"HF_TOKEN would be passed .*kubernetes.secrets: \{HF_TOKEN: \[SECRET, KEY\]\}"):
        render(make_plan(FULL, passed=("WANDB_API_KEY", "HF_TOKEN")))
    assert render(make_plan(FULL, passed=("HF_HOME",), environment={"HF_HOME": "/shared/hf"}))


@pytest.mark.parametrize("folder", ["/home/me/runs/x", "/data/runs/x", "/shared2/x"])
def test_a_run_folder_outside_the_writable_claims_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match=rf"{folder} lies in no claim that pods may write to \(/shared\)"):
        render(make_plan(FULL, run_folder=folder))


def test_a_cluster_without_kubernetes_is_refused() -> None:
    with pytest.raises(UserError, match="no kubernetes: section"):
        render(replace(make_plan(SMALL), cluster=ClusterConfig(name="bare")))


# --- to the cluster ----------------------------------------------------------------------------------------


def fake_kubectl(folder: Path, monkeypatch: pytest.MonkeyPatch, refusal: str = "") -> Path:
    """A kubectl that writes down what it is given, and refuses where `refusal` says so."""
    calls, program = folder / "calls.jsonl", folder / "kubectl"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(calls)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"print('job.batch/x created')\nsys.exit({refusal!r} or 0)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return calls


@pytest.mark.parametrize(("kind", "builds_data"), [*((kind, False) for kind in KINDS), ("job", True)])
def test_all_is_checked_by_the_server_before_anything_is_made(
    kind: str, builds_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my launches"
    calls, said, plan = fake_kubectl(tmp_path, monkeypatch), list[str](), make_plan(FULL, kind, folder=str(folder), builds_data=builds_data)
    assert submit(plan, said.append) == 0
    file = str(folder / ("rayjob.yaml" if builds_data else "job.yaml"))
    assert [json.loads(line) for line in calls.read_text().splitlines()] == [
        ["apply", "--namespace", "research", step, "-f", file] for step in ("--dry-run=server", "--dry-run=none")
    ]
    commands = dict(line.strip().split(":", 1) for line in said[1:])
    assert said[0] == "job.batch/x created"
    stop = ["kubectl", "delete", "-f", file] if builds_data else ["pretrain", "stop", plan.run_folder]
    assert shlex.split(commands["to stop it, saved"]) == stop
    assert shlex.split(commands["what it prints"])[:4] == ["kubectl", "logs", "--namespace", "research"]
    assert ("to pause it, saved" in commands) == (kind != "pytorchjob" and not builds_data)


def test_what_was_made_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_kubectl(tmp_path, monkeypatch)
    assert delete(tmp_path) is None and not calls.exists(), "of another kind"
    (tmp_path / MANIFESTS).touch()
    assert delete(tmp_path) == "job.batch/x created"
    assert json.loads(calls.read_text()) == ["delete", "--ignore-not-found", "--wait=false", "-f", str(tmp_path / MANIFESTS)]


def test_modules_of_the_user_s_own_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kubectl(tmp_path, monkeypatch)
    said: list[str] = []
    submit(make_plan(FULL, code=Code("/home/somebody/pretrain", None, None, modules=("/home/somebody/my_rules.py",))), said.append)
    assert said[0] == "the image has to hold the modules that the run file names: /home/somebody/my_rules.py"


def test_a_refusal_is_said_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_kubectl(tmp_path, monkeypatch, refusal='Error from server (NotFound): namespaces "research" not found')
    with pytest.raises(UserError, match=r'kubectl refused: .*namespaces "research" not found. Look whether'):
        submit(make_plan(FULL), print)
    assert len(calls.read_text().splitlines()) == 1


def test_without_kubectl_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="found no kubectl"):
        submit(make_plan(FULL), print)


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(kubernetes, "KUBECTL_SECONDS", 0.5)
    with pytest.raises(UserError, match="no answer within"):
        submit(make_plan(FULL), print)


# --- 75 where only signals are retried ---------------------------------------------------------------------


@pytest.mark.parametrize(("status", "becomes"), [(0, 0), (1, 1), (2, 2), (75, 143), (137, 137)])
def test_only_stopped_early_becomes_retryable(status: int, becomes: int) -> None:
    command = ["bash", "-c", STOPPED_AS_KILLED, "bash", "bash", "-c", f"exit {status}"]
    assert subprocess.run(command, timeout=20, check=False).returncode == becomes


def test_a_stop_reaches_the_supervisor_and_its_save_is_waited_for(tmp_path: Path) -> None:
    supervisor = f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    command = ["bash", "-c", STOPPED_AS_KILLED, "bash", "bash", "-c", supervisor]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        process.terminate()
        assert process.wait(20) == 143
        assert (tmp_path / "saved").exists()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


if __name__ == "__main__":
    for each in KINDS:
        (HERE / "golden" / f"kubernetes-{each}.yaml").write_text(render(make_plan(FULL, each))[MANIFESTS])

"""Kubernetes: a launch as manifests, and their way into a cluster.

In: a `LaunchPlan` whose cluster file has a `kubernetes:` section. Out: `job.yaml` (run file and cluster file in a ConfigMap, a headless
Service, and a Job, JobSet or PyTorchJob), or those objects in the cluster. Code and libraries are the image's; run folder and data lie on
the claims that `kubernetes.volumes` names; the root file system is read-only, and `job.scratch` is the pod's own.

What happens when a pod ends. Each index of the Job is one node, and pod 0, which keeps the store, has the same name in every life.
- 0 on all: done. 2, the user's mistake: the whole Job fails at once.
- 75, stopped early (a drained machine, Kueue taking the GPUs back, a signal to any pod): all supervisors save and end with 75 together.
  None of it is counted; each index gets a new pod when its old one is gone, never beside it. They come back one by one: the first ones
  wait `job.join_seconds` for the others, or end with 75 again. Kubernetes' own pause before a new pod doubles from 10 s to 10 min with the
  pods that the index has had; the supervisors bound the attempts without a new checkpoint.
- A machine is lost with its pod: not counted either. The supervisors that still run miss that node and wait for it. A new pod
  is made when Kubernetes has given the old one up: for a machine that only stays silent, when somebody removes it from the cluster.
- Anything else, also a doctor that finds something, is counted, for each index on its own, as all nodes end alike: `kubernetes.retries`
  times, then the Job fails.
JobSet wraps the same Job. A PyTorchJob knows codes below 128 (it fails) and above (that pod is made anew, as often as it takes): 75 becomes
143 there, and `kubernetes.retries` has no meaning.
"""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from configs.cluster import KubernetesSection
from configs.errors import UserError
from configs.loader import dump_config
from launch.kubernetes_pod import Manifest, command_of, escape, labels, template
from launch.plan import CLUSTER_FILE, RUN_FILE, LaunchPlan

MANIFESTS, DATA_MANIFESTS = "job.yaml", "rayjob.yaml"
"""In the launch's folder: of a training; of a build of data, which launch/ray_data.py renders."""
LONGEST_NAME = 40
"""Of a name: what is put behind it (-nodes-0-INDEX-abcde) has to fit into a label of 63."""
KUBECTL_SECONDS = 120
STOPPED_AS_KILLED = """\
set -uo pipefail
trap 'stopped=1; kill -TERM "${child:-}" 2>/dev/null' TERM
"$@" &
child=$!
[ -z "${stopped:-}" ] || kill -TERM "$child"
until wait "$child"; status=$?; ! kill -0 "$child" 2>/dev/null; do :; done
[ "$status" -ne 75 ] || status=143
exit "$status\""""
"""Runs the script behind it, passes SIGTERM on, and turns 75 into what a PyTorchJob calls retryable."""


def render(plan: LaunchPlan) -> dict[str, str]:
    """File name -> text. Pure.

    Raises UserError where the pods would not get what was passed, could not write the run folder, or nothing says how pods are made.
    """
    section = _section(plan)
    check_secrets(plan, section)
    _check_run_folder(plan, section)
    name = object_name(plan)
    manifests = [configuration_map(plan, name), *KINDS[section.kind](plan, section, name)]
    return {MANIFESTS: write_manifests(manifests)}


def write_manifests(manifests: list[Manifest]) -> str:
    """One text of YAML."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def submit(plan: LaunchPlan, say: Callable[[str], None]) -> int:
    """Give the manifests in the launch's folder to the cluster that kubectl is set up for; all of them are checked there before the first
    is made. Returns 0.

    Raises UserError where kubectl is missing, does not answer, or refuses.
    """
    section = _section(plan)
    file = str(PurePosixPath(plan.folder) / (DATA_MANIFESTS if plan.builds_data else MANIFESTS))
    if plan.code.modules:
        say(f"the image has to hold the modules that the run file names: {', '.join(plan.code.modules)}")
    for step in ("--dry-run=server", "--dry-run=none"):
        printed = _kubectl("apply", "--namespace", section.namespace, step, "-f", file)
    say(printed.rstrip())
    for what, command in _next_commands(plan, section, file).items():
        say(f"  {what + ':':19}{command}")
    return 0


def delete(folder: Path) -> str | None:
    """Take a launch's objects out of the cluster: each pod is told to end, saves, and none is made in its place. Returns what kubectl said,
    or None where the launch is of another kind. folder: the launch's. Raises UserError as `submit` does.
    """
    file = folder / MANIFESTS
    return _kubectl("delete", "--ignore-not-found", "--wait=false", "-f", str(file)).strip() if file.is_file() else None


def _next_commands(plan: LaunchPlan, section: KubernetesSection, file: str) -> dict[str, str]:
    name, place = object_name(plan), f"--namespace {section.namespace}"
    pods = f"{place} --selector app.kubernetes.io/instance={name}"
    commands = {
        "how it stands": f"kubectl get pods {pods}",
        "what it prints": f"kubectl logs {pods} --prefix --follow --max-log-requests {plan.nodes}",
    }
    if section.kind != "pytorchjob" and not plan.builds_data:
        suspend = """--type merge --patch '{"spec":{"suspend":true}}'"""
        commands["to pause it, saved"] = f"kubectl patch {place} {section.kind} {name} {suspend}"
    stop = f"kubectl delete -f {shlex.quote(file)}" if plan.builds_data else f"pretrain stop {shlex.quote(plan.run_folder)}"
    return commands | {"to stop it, saved": stop}


def object_name(plan: LaunchPlan) -> str:
    """A DNS label (RFC 1035, at most 40 characters) that no other launch has: what is left of the run's name, and a digest."""
    digest = hashlib.sha256(f"{plan.run_name}\n{plan.launch_id}".encode()).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9]+", "-", plan.run_name.lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    return f"{words[: LONGEST_NAME - 1 - len(digest)].strip('-')}-{digest}"


# --- what is refused ---------------------------------------------------------------------------------------


def _section(plan: LaunchPlan) -> KubernetesSection:
    if plan.cluster.kubernetes is None:
        raise UserError(f"the cluster file of {plan.cluster.name} has no kubernetes: section; add one, with image and volumes at least.")
    return plan.cluster.kubernetes


def check_secrets(plan: LaunchPlan, section: KubernetesSection) -> None:
    """Raises UserError where the pods would not get what was passed."""
    missing = [name for name in plan.passed if name not in section.secrets and name not in plan.environment]
    if missing:
        raise UserError(
            f"{', '.join(missing)} would be passed from this shell, but a manifest holds no such values; name a Secret for it "
            f"(kubernetes.secrets: {{{missing[0]}: [SECRET, KEY]}}), or unset it, or take it out of job.pass_environment."
        )


def _check_run_folder(plan: LaunchPlan, section: KubernetesSection) -> None:
    writable = [volume.path for volume in section.volumes if not volume.read_only]
    if not any(PurePosixPath(plan.run_folder).is_relative_to(path) for path in writable):
        raise UserError(
            f"the run folder {plan.run_folder} lies in no claim that pods may write to ({', '.join(writable) or 'there is none'}); "
            "set run.root to a path below one, or add the claim to kubernetes.volumes."
        )


# --- the objects -------------------------------------------------------------------------------------------


def _metadata(plan: LaunchPlan, section: KubernetesSection, name: str) -> Manifest:
    queue = {"kueue.x-k8s.io/queue-name": section.queue} if section.queue else {}
    told = {"pretrain/run": plan.run_name, "pretrain/run-folder": plan.run_folder, "pretrain/launch": plan.launch_id}
    return {"name": name, "namespace": section.namespace, "labels": labels(name) | queue, "annotations": told}


def configuration_map(plan: LaunchPlan, name: str) -> Manifest:
    metadata = {"name": name, "namespace": _section(plan).namespace, "labels": labels(name)}
    data = {RUN_FILE: plan.configuration, CLUSTER_FILE: dump_config(plan.cluster)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True, "data": data}


def _job(plan: LaunchPlan, section: KubernetesSection, name: str) -> list[Manifest]:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": section.namespace, "labels": labels(name)},
        # Headless: a name for each pod. They have to find each other before any of them could be called ready.
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app.kubernetes.io/instance": name}},
    }
    spec = _job_spec(plan, section, name, f"{name}-0.{name}")
    spec["template"]["spec"]["subdomain"] = name
    return [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(plan, section, name), "spec": spec}]


def _jobset(plan: LaunchPlan, section: KubernetesSection, name: str) -> list[Manifest]:
    """jobset.x-k8s.io: it makes the service itself, and names pods NAME-nodes-0-INDEX."""
    job = {"name": "nodes", "replicas": 1, "template": {"spec": _job_spec(plan, section, name, f"{name}-nodes-0-0.{name}")}}
    network = {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True}
    spec = {"network": network, "replicatedJobs": [job]}
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _metadata(plan, section, name), "spec": spec}]


def _job_spec(plan: LaunchPlan, section: KubernetesSection, name: str, host: str) -> Manifest:
    def on_exit(action: str, status: int) -> Manifest:
        return {"action": action, "onExitCodes": {"containerName": "node", "operator": "In", "values": [status]}}

    command = command_of(plan, "$(JOB_COMPLETION_INDEX)", host)
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "completionMode": "Indexed",
        "completions": plan.nodes,
        "parallelism": plan.nodes,
        "backoffLimitPerIndex": section.retries,
        "maxFailedIndexes": 0,  # one node that failed for good ends all
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [on_exit("Ignore", 75), on_exit("FailJob", 2), disrupted]},
        "template": template(plan, section, name, {"name": "node", "command": command}),
    }


def _pytorchjob(plan: LaunchPlan, section: KubernetesSection, name: str) -> list[Manifest]:
    """kubeflow.org/v1: the operator sets RANK (of the pod), makes a service for each pod, and wants its container to be called pytorch."""
    command = ["bash", "-c", escape(STOPPED_AS_KILLED), "bash", *command_of(plan, "$(RANK)", f"{name}-master-0")]
    pod = template(plan, section, name, {"name": "pytorch", "command": command})
    del pod["spec"]["restartPolicy"]  # the operator's, from the replica's
    replicas = {"Master": 1, "Worker": plan.nodes - 1}
    specs = {role: {"replicas": count, "restartPolicy": "ExitCode", "template": pod} for role, count in replicas.items() if count}
    spec = {"runPolicy": {"cleanPodPolicy": "Running"}, "pytorchReplicaSpecs": specs}
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _metadata(plan, section, name), "spec": spec}]


KINDS: dict[str, Callable[[LaunchPlan, KubernetesSection, str], list[Manifest]]] = {
    "job": _job,
    "jobset": _jobset,
    "pytorchjob": _pytorchjob,
}


# --- to the cluster ----------------------------------------------------------------------------------------


def _kubectl(*arguments: str) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=KUBECTL_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError(
            "found no kubectl; install it, or take the launch's files to a machine that has it: kubectl apply -f FILE."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"kubectl had no answer within {KUBECTL_SECONDS} s; look at `kubectl cluster-info`.") from None
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split())
        raise UserError(
            f"kubectl refused: {words}. Look whether `kubectl config current-context` is the cluster, and mend its cluster file."
        )
    return done.stdout


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; the same object written out twice rather than as an anchor."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Quoted unless it begins as a word does: the readers of Kubernetes take more for numbers than this writer (1e3, 0o17).
    style = "|" if "\n" in text else None if re.match(r"[A-Za-z/]", text) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)

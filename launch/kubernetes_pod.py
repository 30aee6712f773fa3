"""The pod of one node: what runs in it, as whom, what it is told, and what it can write to.

In: a `LaunchPlan`, the words that the cluster puts in for the node's number. Out: the template that Jobs, JobSets and PyTorchJobs share.
The code and its path are the image's; the root file system is read-only; secrets are referred to by name.
"""

from dataclasses import replace
from typing import Any

from configs.cluster import KubernetesSection
from launch.plan import LaunchPlan, doctor_lines, node_environment, train_line

Manifest = dict[str, Any]

CONFIGURATION_FOLDER = "/etc/pretrain"
"""Where the run file and the cluster file are in a pod: not inside a claim, in which a mount point would have to be made by root."""


def labels(name: str) -> dict[str, str]:
    """What all objects of a launch carry, and are selected by."""
    return {"app.kubernetes.io/name": "pretrain", "app.kubernetes.io/instance": name}


def command_of(plan: LaunchPlan, node: str, host: str) -> list[str]:
    """A node's script, as in any launch, and where its supervisor stands. node: $(VARIABLE); host: of node 0."""
    inside = replace(plan, folder=CONFIGURATION_FOLDER)
    doctor = doctor_lines(inside) if plan.cluster.job.doctor else []
    script = "\n".join(["set -eo pipefail", *plan.cluster.job.setup, *doctor, train_line(inside)])
    return ["bash", "-c", escape(script), "bash", node, f"{host}:{plan.cluster.job.rendezvous_port}"]


def escape(text: str) -> str:
    """The kubelet replaces $(NAME) in commands and environments, and takes $$ for $; what is escaped arrives as it is."""
    return text.replace("$", "$$")


def template(plan: LaunchPlan, section: KubernetesSection, name: str, container: Manifest) -> Manifest:
    """A pod's labels and spec. container: its name and command; requests are limits, so that no pod lives on what another one asked for."""
    job, claims = plan.cluster.job, list(enumerate(section.volumes))
    volumes: list[Manifest] = [
        {"name": "configuration", "configMap": {"name": name}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{section.shared_memory_gb:g}G"}},
        *({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": v.claim, "readOnly": v.read_only}} for i, v in claims),
    ]
    mounts: list[Manifest] = [
        {"name": "configuration", "mountPath": CONFIGURATION_FOLDER, "readOnly": True},
        *({"name": "scratch", "mountPath": path} for path in dict.fromkeys((job.scratch, "/tmp"))),
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *({"name": f"claim-{i}", "mountPath": volume.path, "readOnly": volume.read_only} for i, volume in claims),
    ]
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    resources = dict(section.resources)
    if plan.cluster.hardware.gpus_per_node:
        resources[section.gpu_resource] = str(plan.processes_per_node)
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds + 30,
        "shareProcessNamespace": True,  # the supervisor is not process 1, which would not get SIGTERM before Python has begun
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _user(section.user_id),
        "containers": [
            container
            | {"image": section.image, "workingDir": job.scratch, "env": _environment(plan, section)}
            | {"resources": {"requests": resources, "limits": resources}, "securityContext": confined, "volumeMounts": mounts}
        ],
        "volumes": volumes,
    }
    if section.service_account is not None:
        spec["serviceAccountName"] = section.service_account
    if section.image_pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": section.image_pull_secret}]
    if section.node_selector:
        spec["nodeSelector"] = dict(section.node_selector)
    if section.tolerations:
        spec["tolerations"] = [_toleration(toleration) for toleration in section.tolerations]
    return {"metadata": {"labels": labels(name)}, "spec": spec}


def _user(number: int) -> Manifest:
    # OnRootMismatch: without it every start changes the owner of each file in the claims.
    owner = {"runAsUser": number, "runAsGroup": number, "fsGroup": number, "fsGroupChangePolicy": "OnRootMismatch"}
    return {"runAsNonRoot": True, **owner, "seccompProfile": {"type": "RuntimeDefault"}}


def _environment(plan: LaunchPlan, section: KubernetesSection) -> list[Manifest]:
    # Any user number may run here: HOME and USER spare what looks for them a search in /etc/passwd.
    told = {"HOME": plan.cluster.job.scratch, "USER": "pretrain"} | node_environment(plan)
    values = [{"name": name, "value": escape(value)} for name, value in sorted(told.items()) if name not in section.secrets]
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for name, (secret, key) in sorted(section.secrets.items())
    ]
    return values + secrets


def _toleration(toleration: dict[str, str]) -> Manifest:
    return {name: int(value) if name == "tolerationSeconds" else value for name, value in toleration.items()}

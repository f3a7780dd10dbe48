"""The files of examples/kubernetes and examples/skypilot: read, checked, and turned into what a node would run.

What the kubelet and Kubeflow Trainer do to a container is done here by the same rules: fields of the pod become
variables, `$(NAME)` is replaced by what stands earlier in the list, and Trainer appends its PET variables.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import yaml

from tests.support.launching import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
SCHEMAS = REPOSITORY / "tests" / "data" / "cloud_schemas"
Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    """All documents of a file of examples/."""
    return list(yaml.safe_load_all((EXAMPLES / name).read_text(encoding="utf-8")))


def document(name: str, kind: str) -> Document:
    """The document of this kind in a file of examples/."""
    return next(each for each in documents(name) if each["kind"] == kind)


# --- Schemas ---------------------------------------------------------------------------------------------------------


def kubernetes_problems(manifest: Document) -> list[str]:
    """What the published schema of a manifest's kind says against it, with the place of each."""
    schema = json.loads((SCHEMAS / "kubernetes.json").read_text(encoding="utf-8"))
    target = schema["kinds"][manifest["kind"]]
    if target.endswith(("JobTemplateSpec", "PersistentVolumeClaimTemplate")):  # the kind without these two
        manifest = {key: value for key, value in manifest.items() if key not in {"apiVersion", "kind"}}
    return _problems({"$defs": schema["$defs"], "$ref": target}, manifest)


def skypilot_problems(task: Document, kind: str = "task") -> list[str]:
    """What SkyPilot's schema says against a task, or a volume."""
    return _problems(json.loads((SCHEMAS / "skypilot.json").read_text(encoding="utf-8"))[kind], task)


def _problems(schema: Document, value: Document) -> list[str]:
    found = jsonschema_rs.Draft202012Validator(schema).iter_errors(value)
    return [f"{'.'.join(map(str, problem.instance_path))}: {problem.message}" for problem in found]


# --- What a node runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeCommand:
    """The main process of one node: its words and the variables that the file gives it."""

    words: list[str]
    variables: dict[str, str]


def jobset_node(place: int) -> NodeCommand:
    """What examples/kubernetes/jobset.yaml runs on one of its nodes."""
    jobset = document("kubernetes/jobset.yaml", "JobSet")
    return _container_command(_job(jobset["spec"]), jobset["metadata"]["name"], place)


def trainjob_node(place: int) -> NodeCommand:
    """What Kubeflow Trainer makes of examples/kubernetes/trainjob.yaml on one of its nodes."""
    runtime = document("kubernetes/trainjob.yaml", "TrainingRuntime")
    trainjob = document("kubernetes/trainjob.yaml", "TrainJob")
    name, trainer = trainjob["metadata"]["name"], trainjob["spec"]["trainer"]
    assert trainjob["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    job = _job(runtime["spec"]["template"]["spec"])
    container = job["template"]["spec"]["containers"][0]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container["args"] = trainer["args"]
    container["env"] += [
        *trainer["env"],
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    return _container_command(job, name, place)


def skypilot_node(place: int) -> NodeCommand:
    """What examples/skypilot/task.yaml runs on one of its nodes."""
    (task,) = documents("skypilot/task.yaml")
    nodes = task["num_nodes"]
    given = {
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": str(place),
        "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes),
        "SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"].partition(":")[2],
        "SKYPILOT_TASK_ID": "sky-managed-2026-01-01-00-00-00-000000_rm-13b_1-0",
    }
    return NodeCommand(["bash", "-c", task["run"]], {**task["envs"], **given})


def _job(jobset_spec: Document) -> Document:
    (replicated,) = jobset_spec["replicatedJobs"]
    assert (replicated["name"], replicated["replicas"]) == ("node", 1)
    return dict(replicated["template"]["spec"])


def _container_command(job: Document, jobset_name: str, place: int) -> NodeCommand:
    (container,) = job["template"]["spec"]["containers"]
    fields = {
        "metadata.labels['jobset.sigs.k8s.io/jobset-uid']": "5f0c0a3e-0000-4000-8000-000000000001",
        "metadata.labels['jobset.sigs.k8s.io/jobset-name']": jobset_name,
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(place),
    }
    variables: dict[str, str] = {}
    for entry in container["env"]:
        if "value" in entry:
            variables[entry["name"]] = _expand(entry["value"], variables)
        else:
            variables[entry["name"]] = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
    assert container["workingDir"] == "/opt/rm_scale"  # where the image has the repository
    return NodeCommand([_expand(word, variables) for word in container["command"] + container["args"]], variables)


def _expand(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\(([A-Za-z_][\w]*)\)", lambda match: variables.get(match[1], match[0]), text)


def decision(jobset_spec: Document, code: int, evicted: bool = False) -> str:
    """What Kubernetes and JobSet do when a pod's container has ended with `code`: the action of the rule that applies.

    By the rules of the two controllers: the first rule of the Job's podFailurePolicy that fits fails the Job with a
    message of this form; the first rule of JobSet whose pattern is found in it counts. `RestartJobSet` is the default.
    """
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(_job(jobset_spec)["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if code in rule.get("onExitCodes", {}).get("values", []):
            reason = "PodFailurePolicy"
            message = (
                f"Container node for pod ns/rm-x failed with exit code {code} matching FailJob rule at index {index}"
            )
            break
        if evicted and "onPodConditions" in rule:
            reason = "PodFailurePolicy"
            message = f"Pod ns/rm-x has condition DisruptionTarget matching FailJob rule at index {index}"
            break
    for rule in jobset_spec["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"

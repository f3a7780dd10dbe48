"""The files for Kubernetes and SkyPilot: by the published schemas, and what the controllers make of exit codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rm_scale.config_parsing import parse_config
from tests.support.cloud_files import (
    EXAMPLES,
    Document,
    decision,
    documents,
    jobset_node,
    kubernetes_problems,
    skypilot_node,
    skypilot_problems,
    trainjob_node,
)

MANIFESTS: dict[str, Document] = {
    each["kind"]: each
    for path in sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
    for each in documents(f"kubernetes/{path.name}")
}
VERSIONS = {
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "Job": "batch/v1",
    "PersistentVolumeClaim": "v1",
}


@pytest.mark.parametrize("kind", VERSIONS)
def test_manifests_keep_the_published_schemas(kind: str) -> None:
    assert MANIFESTS.keys() == VERSIONS.keys()
    assert MANIFESTS[kind]["apiVersion"] == VERSIONS[kind]
    assert kubernetes_problems(MANIFESTS[kind]) == []


def test_skypilot_files_keep_its_schemas() -> None:
    (task,), (volume,) = documents("skypilot/task.yaml"), documents("skypilot/volume.yaml")
    assert skypilot_problems(task) == [] and skypilot_problems(volume, "volume") == []
    assert list(task["volumes"].values()) == [volume["name"]]


def changed(value: Any, place: str, new: Any) -> Any:
    """A copy with `new` at this dotted place."""
    result = copy.deepcopy(value)
    node, *keys = result, *place.split(".")
    for key in keys[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[keys[-1]] = new
    return result


JOB = "replicatedJobs.0.template.spec"
CONTAINER = f"{JOB}.template.spec.containers.0"


@pytest.mark.parametrize(
    ("kind", "place", "new"),
    [
        ("JobSet", "spec.failurePolicy.maxRestart", 3),
        ("JobSet", "spec.failurePolicy.maxRestarts", "3"),
        ("JobSet", "spec.failurePolicy.rules.0.onExitCodes", [85]),
        ("JobSet", f"spec.{JOB}.podFailurePolicy.rules.0.onExitCodes.values", ["85"]),
        ("JobSet", f"spec.{JOB}.template.spec.terminationGracePeriod", 900),
        ("JobSet", f"spec.{CONTAINER}.command", "examples/ranks.sh"),
        ("JobSet", f"spec.{CONTAINER}.env.0.value", 1),
        ("JobSet", f"spec.{CONTAINER}.env.0.valueFrom", {"fieldPath": "metadata.name"}),
        ("JobSet", f"spec.{CONTAINER}.resources.limit", {"nvidia.com/gpu": 8}),
        ("JobSet", f"spec.{CONTAINER}.resources.limits", {"nvidia.com/gpu": [8]}),
        ("TrainingRuntime", f"spec.template.spec.{CONTAINER}.volumeMount", []),
        ("TrainingRuntime", "spec.mlPolicy.torch", {"nodes": 2}),
        ("TrainJob", "spec.trainer.numProcPerNode", "8"),
        ("TrainJob", "spec.trainer.nodes", 2),
        ("Job", "spec.restartPolicy", "Never"),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany"),
    ],
)
def test_an_unknown_field_or_a_wrong_type_is_refused(kind: str, place: str, new: Any) -> None:
    assert kubernetes_problems(changed(MANIFESTS[kind], place, new)) != []


@pytest.mark.parametrize(
    ("place", "new"),
    [
        ("nodes", 2),
        ("num_nodes", "2"),
        ("resources.accelerator", "H100:8"),
        ("resources.use_spot", "yes"),
        ("resources.job_recovery.recover_on_exit_code", 85),
        ("resources.job_recovery.recover_on_exit_codes", [850]),
        ("envs.OUTPUT_DIR", 1),
    ],
)
def test_a_wrong_skypilot_task_is_refused(place: str, new: Any) -> None:
    (task,) = documents("skypilot/task.yaml")
    assert skypilot_problems(changed(task, place, new)) != []


def jobset_spec(kind: str) -> Document:
    """The JobSet of each file."""
    return dict(
        MANIFESTS["JobSet"]["spec"] if kind == "JobSet" else MANIFESTS["TrainingRuntime"]["spec"]["template"]["spec"]
    )


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
@pytest.mark.parametrize(
    ("code", "evicted", "action"),
    [
        (85, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (85, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (2, False, "FailJobSet"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
        (22, False, "RestartJobSet"),
    ],
)
def test_each_exit_code_has_its_consequence(kind: str, code: int, evicted: bool, action: str) -> None:
    assert decision(jobset_spec(kind), code, evicted) == action


def test_a_failed_pod_is_never_replaced_alone() -> None:
    """Its ranks would wait for others that belong to the attempt before."""
    for kind in ("JobSet", "TrainJob"):
        (replicated,) = jobset_spec(kind)["replicatedJobs"]
        job = replicated["template"]["spec"]
        assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
        assert job["completionMode"] == "Indexed"
        assert jobset_spec(kind)["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    job = jobset_spec("JobSet")["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == int(jobset_node(0).variables["PET_NNODES"])
    (container,) = job["template"]["spec"]["containers"]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == jobset_node(0).variables["PET_NPROC_PER_NODE"]


def test_jobset_and_trainjob_start_the_same() -> None:
    for place in (0, 1):
        ours, trainers = jobset_node(place), trainjob_node(place)
        assert ours.words == trainers.words
        assert {k: v for k, v in ours.variables.items() if k != "JOBSET_NAME"} == trainers.variables
        assert ours.variables["PET_MASTER_ADDR"] == "rm-13b-node-0-0.rm-13b"
        assert ours.variables["PET_NODE_RANK"] == str(place)


def test_their_settings_are_right_and_resume() -> None:
    sky = skypilot_node(0).words[2].partition("ranks.sh ")[2].replace('"$OUTPUT_DIR"', "/data/outputs/rm-13b").split()
    for words in (jobset_node(0).words[1:], sky):
        parsed = parse_config(words)
        assert parsed.problems == ()
        assert parsed.config.resume_from_checkpoint == "auto" and parsed.config.output_dir == "/data/outputs/rm-13b"
        assert parsed.config.save_strategy == "steps"

"""The cluster, and what every job on it is given: a tiny model, a few pairs, and a site.env for processors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.launching import REPOSITORY

# The whole of a site's configuration here. Everything else is as shipped.
SITE = """
: "${RM_SCALE_DEVICE:=cpu}"
: "${RM_SCALE_RANKS_PER_NODE:=1}"
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster that RM_SCALE_SLURM_CLUSTER names; `make test-slurm` makes one for each of its processes."""
    names = os.environ.get("RM_SCALE_SLURM_CLUSTER", "").split()
    if not names:
        pytest.skip("RM_SCALE_SLURM_CLUSTER is not set: make test-slurm makes a cluster and sets it")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    name = names[int(worker) % len(names)]
    # On a real cluster the repository is on the shared disk and /tmp is not.
    base = Path(name) if (Path(name) / "slurm.conf").is_file() else REPOSITORY / "outputs"
    base.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="work.", dir=base))
    (work / "site.env").write_text(SITE)
    made = Cluster(name, work)
    yield made
    made.end_jobs()
    shutil.rmtree(work, ignore_errors=True)


@pytest.fixture(autouse=True)
def jobs_of_this_test_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what a failed test left running: the next one would wait for its nodes."""
    yield
    if "cluster" in request.fixturenames or "own_cluster" in request.fixturenames:
        request.getfixturevalue("cluster").end_jobs()


@pytest.fixture(scope="session")
def own_cluster(cluster: Cluster) -> Cluster:
    """A cluster that may be broken."""
    if not cluster.own:
        pytest.skip("nodes are broken only of a cluster that tests/slurm/cluster.sh made")
    return cluster


@pytest.fixture(scope="session")
def inputs(cluster: Cluster) -> list[str]:
    """Settings that put the tiny model and generated pairs in the place of a template's own."""
    from rm_scale.demo.assets import make_tiny_model
    from rm_scale.demo.synthetic_preferences import generate_pairs

    model = make_tiny_model(cluster.work / "model", vocab_size=400, hidden_size=32)
    pairs = cluster.work / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in generate_pairs(240, seed=3, split="train")))
    words = ["--model_name_or_path", str(model), "--dataset_path", str(pairs), "--dataset_name", "none"]
    words += ["--dataset_test_split", "none", "--eval_strategy", "no", "--report_to", "none", "--max_length", "256"]
    words += ["--bf16", "false", "--global_batch_size", "16", "--logging_steps", "1", "--disable_tqdm"]
    return [
        *words,
        "--sample_scores",
        "0",
        "--learning_rate",
        "1e-3",
        "--dataset_cache_dir",
        str(cluster.work / "cache"),
    ]

"""The shipped job scripts, unchanged but for site.env, on a real cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_scale.tiers import model_tier
from tests.support.cluster import CLI, Cluster, Job, template
from tests.support.launching import REPOSITORY, losses, read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def true_13b(cluster: Cluster) -> list[str]:
    """What stands for the gated hub model of rm_13b.sh: its shape. The data would come from the hub too."""
    folder = cluster.work / "true_13b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model_tier("13b").config))
    return ["--model_name_or_path", str(folder)]


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_templates_train_on_what_they_are_given(cluster: Cluster, inputs: list[str], nodes: int) -> None:
    """All three at once, as far as the cluster has nodes for them."""
    ranks = 2 if nodes == 1 else 1
    outputs = {tier: cluster.work / f"{tier}-{nodes}" for tier in ("1b", "7b", "13b")}
    jobs = {
        tier: cluster.submit(
            *[f"--nodes={nodes}", template(tier), *inputs, "--max_steps", "2", "--output_dir", str(output)],
            env={"RM_SCALE_RANKS_PER_NODE": str(ranks)},
        )
        for tier, output in outputs.items()
    }
    for tier, job in jobs.items():
        assert cluster.wait(job)["JobState"] == "COMPLETED", job.output()[-3000:]
        assert len(losses(outputs[tier])) == 2
        assert read_json(outputs[tier] / "run" / "plan.json")["world_size"] == nodes * ranks
        # One log per rank, named by its node; what rank 0 says is the job's log.
        names = sorted(path.name.split(".", 1)[1] for path in (job.logs / "attempt-0").glob("*.rank*.log"))
        assert names == [f"rank{number}.log" for number in range(nodes * ranks)]
        assert "saved and verified" in job.output()


def test_13b_as_it_is_passes_slurms_own_check(cluster: Cluster) -> None:
    """Header and options: whole nodes, signal, requeue, as the controller reads them."""
    answer = cluster.run("sbatch", "--test-only", template("13b"))
    assert answer.code == 0 and "to start at" in answer.output
    assert cluster.run("sbatch", "--test-only", "--nodes=400", template("13b")).code != 0


def test_13b_dry_run_plans_for_the_allocation(cluster: Cluster, inputs: list[str], true_13b: list[str]) -> None:
    """Its own configuration on two nodes of H100: planned and printed, and nothing written."""
    output = cluster.work / "dry"
    data = [
        "--dataset_path",
        str(cluster.work / "pairs.jsonl"),
        "--dataset_name",
        "none",
        "--dataset_test_split",
        "none",
    ]
    words = [*true_13b, *data, "--eval_strategy", "no", "--output_dir", str(output), "--dry_run"]
    job = cluster.submit(template("13b"), *words, env={"RM_SCALE_RANKS_PER_NODE": "8", "RM_SCALE_FORCE": "plan"})
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), job.output()[-3000:]
    assert "would start 2 x 8 ranks" in job.output()
    assert "full training of 12.85B parameters on 16 x cpu, ZeRO-3" in job.output()
    assert not output.exists()


def test_launch_plans_and_hands_to_slurm(cluster: Cluster, inputs: list[str]) -> None:
    output = cluster.work / "launched"
    words = [*inputs, "--max_steps", "2", "--output_dir", str(output)]
    words += [
        "launch",
        "--slurm",
        "--gpu",
        "cpu",
        "--nodes",
        "2",
        "--gpus",
        "1",
        "--time",
        "60",  # a limit of no more than the template's 10 minutes of warning is signalled at once
        "--job_name",
        "by_launch",
    ]
    words = [*words[words.index("launch") :], *words[: words.index("launch")]]
    printed = cluster.run(*CLI, *words, "--dry_run", cwd=cluster.work)
    assert printed.code == 0 and "sbatch --parsable --nodes=2" in printed.output, printed.output
    assert not output.exists() and not cluster.run("squeue", "--noheader").output.strip()
    sent = cluster.run(*CLI, *words, cwd=cluster.work)
    assert sent.code == 0, sent.output
    number = sent.output.split("rm-scale slurm status ")[1].split()[0]
    shown = cluster.wait(Job(number, cluster.work))
    assert shown["JobState"] == "COMPLETED" and shown["JobName"] == "by_launch"
    status = cluster.run(*CLI, "slurm", "status", number, cwd=cluster.work)
    assert "step 2 of 2" in status.output and "COMPLETED" in status.output, status.output


def test_rendered_script_with_hostile_words_is_submitted(cluster: Cluster, inputs: list[str]) -> None:
    """Spaces, quotes, a command and a line break in settings: they arrive as they are, and nothing runs."""
    name = "it's a $(touch injected) `touch injected`; touch injected #\n#SBATCH --nodes=4"
    output, script = cluster.work / "ren dered", cluster.work / "my run.sh"
    words = ["--run_name", name, "--max_steps", "1", "--output_dir", str(output)]
    done = cluster.run(
        *CLI, "slurm", "render", "--tier", "1b", "--nodes", "1", "--output", str(script), *inputs, *words
    )
    assert done.code == 0, done.output
    sent = cluster.run(*CLI, "slurm", "submit", "--script", str(script))
    assert sent.code == 0, sent.output
    shown = cluster.wait(Job(sent.output.split("rm-scale slurm status ")[1].split()[0], cluster.work))
    assert (shown["JobState"], shown["NumNodes"], shown["JobName"]) == ("COMPLETED", "1", "rm_1b")
    assert name in json.loads(json.dumps(_asked(output)))["run_name"]
    assert not list(Path(cluster.work).rglob("injected"))


def test_arrays_train_seeds_and_dependencies_wait(cluster: Cluster, inputs: list[str]) -> None:
    output = cluster.work / "seeds"
    words = [*inputs, "--max_steps", "2", "--output_dir", str(output)]
    array = cluster.submit("--array=0-1", "--nodes=1", template("1b"), *words)
    after = cluster.submit(
        f"--dependency=afterok:{array.number}", "--nodes=1", template("7b"), *words, "--output_dir", f"{output}/after"
    )
    assert cluster.wait(after)["JobState"] == "COMPLETED", after.output()[-2000:]
    assert [_asked(output / f"task-{task}")["seed"] for task in (0, 1)] == [42, 43]
    assert losses(output / "task-0") != losses(output / "task-1")
    # The two templates differ in their ZeRO stage, so the same run agrees to rounding, not to the bit.
    same = pytest.approx(losses(output / "after"), rel=1e-6)
    assert losses(output / "task-0") == same, "task 0 has the run's own seed"


def _asked(output: Path) -> dict[str, object]:
    import yaml

    return dict(yaml.safe_load((output / "run" / "run_config.yaml").read_text()))


@pytest.mark.parametrize("nodes", [1, 2])
def test_bench_measures_what_it_was_given(cluster: Cluster, nodes: int) -> None:
    """A case per setting on all ranks of the allocation, each with a sealed record; and none is run twice."""
    from rm_scale.reporting.benchmarks.sealed_records import read_records

    results, script = cluster.work / f"bench-{nodes}", str(REPOSITORY / "slurm" / "bench.sh")
    words = ["--tier", "tiny", "--methods", "full,lora", "--stages", "2", "--steps", "2", "--warmup", "1"]
    words += [
        "--global_batch_size",
        "4",
        "--work",
        str(cluster.work / "bench_work"),
        "--results",
        str(results / "tiny"),
    ]
    job = cluster.submit(f"--nodes={nodes}", script, *words, env={"RM_SCALE_RANKS_PER_NODE": "1"})
    assert cluster.wait(job, 900)["JobState"] == "COMPLETED", job.output()[-3000:]
    found = read_records([results])
    assert not found.refused and len(found.records) == 2, job.output()[-3000:]
    for record in found.records:
        assert record.status == "ok" and len(record.steps) == 3
        assert (record.case.num_nodes, record.case.num_ranks) == (nodes, nodes)
        assert record.plan["world_size"] == nodes
        assert record.steps[-1].communication_seconds is not None
    again = cluster.submit(f"--nodes={nodes}", script, *words, env={"RM_SCALE_RANKS_PER_NODE": "1"})
    assert cluster.wait(again, 900)["JobState"] == "COMPLETED"
    assert again.output().count("(have it)") == 2

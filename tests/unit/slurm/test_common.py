"""The functions of `slurm/common.sh`, one at a time, in a real bash; stand-ins where Slurm must be made to fail."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from rm_scale.meeting import EXIT_PORT_TAKEN
from rm_scale.slurm.prepare import EXIT_ASK_SLURM, EXIT_NOTHING_TO_START, EXIT_TRY_AGAIN
from rm_scale.slurm.requeue import EXIT_SETTINGS, MAX_IDLE, NO_RANKS, is_preempted
from rm_scale.training.preemption import EXIT_REQUEUE, NUM_ATTEMPT_SIGNALS, attempt_signal

REPOSITORY = Path(__file__).resolve().parents[3]


def bash(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code after common.sh and site.env, as a job does, with the stand-ins of `folder/bin` first on PATH."""
    env = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "RM_SCALE_TIER": "1b",
    }
    env |= {"RM_SCALE_HOME": str(REPOSITORY), "RM_SCALE_SITE_ENV": "/nowhere", **variables}
    begin = f"set -euo pipefail\nsource '{REPOSITORY}/slurm/common.sh'\nRM_SCALE_ATTEMPT=${{RM_SCALE_ATTEMPT:-0}}\n"
    begin += "RM_SCALE_JOB=$(rm_scale_job)\n"
    begin += "RM_SCALE_STOP='' RM_SCALE_SRUN_PID='' RM_SCALE_REPEATER='' RM_SCALE_REQUEUED='' RM_SCALE_POSTPONED=''\n"
    begin += "RM_SCALE_PORTS_TRIED=0 RM_SCALE_HELPERS=''\nrm_scale_load_site\n"
    begin += f"RM_SCALE_LOGS='{folder}' RM_SCALE_JOB_DIR='{folder}'\n"
    begin += f"RM_SCALE_ATTEMPT_DIR='{folder}'/attempt-$RM_SCALE_ATTEMPT\n"
    return subprocess.run(
        ["bash", "-c", begin + code], cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False
    )


def stand_in(folder: Path, name: str, code: str) -> None:
    """Make a command that writes down its arguments and then runs `code`."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >>"{folder}/called"\n{code}\n')
    path.chmod(0o755)


def called(folder: Path) -> list[str]:
    """What the stand-ins were asked."""
    path = folder / "called"
    return path.read_text().splitlines() if path.exists() else []


WORDS = "rm_scale_python; rm_scale_on_all_nodes --kill-on-bad-exit=1 -m x; printf '%s\\n' \"${RM_SCALE_COMMAND[@]}\""


def test_one_task_a_node_that_ignores_the_signal(tmp_path: Path) -> None:
    done = bash(WORDS, tmp_path, RM_SCALE_VENV=str(REPOSITORY / ".venv"))
    words = done.stdout.splitlines()
    assert words[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"], done.stderr
    assert "--kill-on-bad-exit=1" in words and "--export=ALL" in words
    numbers = [attempt_signal(attempt) for attempt in range(NUM_ATTEMPT_SIGNALS)]
    ignored = f"$(seq {min(numbers)} {max(numbers)})"
    assert words[-6:-3] == ["-c", f'trap "" USR1 {ignored}; exec "$@"', "rm_scale"]
    assert words[-3:] == [f"{REPOSITORY}/.venv/bin/python", "-m", "x"]


@pytest.mark.parametrize("attempt", [0, 1, 19, 20, 107])
def test_the_signal_of_an_attempt_is_the_same_in_bash_and_python(attempt: int, tmp_path: Path) -> None:
    done = bash("rm_scale_attempt_signal", tmp_path, RM_SCALE_ATTEMPT=str(attempt))
    assert int(done.stdout) == attempt_signal(attempt)


def test_a_task_of_an_array_is_addressed_alone(tmp_path: Path) -> None:
    """The task that starts last has the number of the whole array as its SLURM_JOB_ID."""
    assert bash("rm_scale_job", tmp_path).stdout == "7\n"
    done = bash("rm_scale_job", tmp_path, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert done.stdout == "7_2\n"


def test_an_installed_package_finds_its_python(tmp_path: Path) -> None:
    """PREFIX/lib/pythonX/site-packages/rm_scale/shipped/slurm, as pip puts it there."""
    home = tmp_path / "lib" / "python3" / "site-packages" / "rm_scale" / "shipped"
    (home / "slurm").mkdir(parents=True)
    (home / "slurm" / "site.env").write_text((REPOSITORY / "slurm" / "site.env").read_text())
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to("/bin/true")
    words = bash(WORDS, tmp_path, RM_SCALE_HOME=str(home)).stdout.splitlines()
    assert Path(words[-3]).resolve() == Path("/bin/true").resolve()


def test_apptainer_wraps_python(tmp_path: Path) -> None:
    done = bash(WORDS, tmp_path, RM_SCALE_CONTAINER="/my images/a.sif", RM_SCALE_CONTAINER_MOUNTS="/data:/data:ro")
    words = done.stdout.splitlines()
    expected = ["rm_scale", "apptainer", "exec", "--nv", "--bind", "/data:/data:ro", "--bind", str(REPOSITORY)]
    assert words[words.index("rm_scale") :][: len(expected)] == expected
    assert words[-4:] == ["/my images/a.sif", "python3", "-m", "x"]


def test_pyxis_is_handed_to_srun(tmp_path: Path) -> None:
    words = bash(
        WORDS,
        tmp_path,
        RM_SCALE_CONTAINER="/images/a.sqsh",
        RM_SCALE_CONTAINER_ENGINE="pyxis",
        RM_SCALE_CONTAINER_MOUNTS="/data:/data:ro",
    ).stdout.splitlines()
    assert "--container-image=/images/a.sqsh" in words and words[-3:] == ["python3", "-m", "x"]
    mounts = f"--container-mounts=/data:/data:ro,{REPOSITORY}:{REPOSITORY},{tmp_path}:{tmp_path},{tmp_path}:{tmp_path}"
    assert mounts in words


def packed_stand_in(folder: Path, sources: str) -> Path:
    """An archive of nothing but its mark."""
    (folder / "rm_scale_packed.txt").write_text(f"key={'0' * 16}\nfiles=0\nbytes=0\nsources={sources}\n")
    subprocess.run(["tar", "-cf", folder / "env.tar", "-C", folder, "rm_scale_packed.txt"], check=True)
    return folder / "env.tar"


def test_a_packed_environment_starts_python_on_every_node(tmp_path: Path) -> None:
    """The checkout is looked for over the shared disk only when the archive holds another rm_scale."""
    variables = {"RM_SCALE_PACKED_ENV": str(packed_stand_in(tmp_path, "of another day")), "TMPDIR": "/local/"}
    variables["RM_SCALE_VENV"] = "/nowhere"  # not looked at
    done = bash(f"{WORDS}; echo $PYTHONPATH", tmp_path, **variables)
    script = f"{REPOSITORY}/slurm/common/packed_python.sh"
    assert (
        done.stdout.splitlines()[-6:]
        == [
            *["bash", script, f"{tmp_path}/env.tar", f"/local/rm_scale-{os.getuid()}"],
            *["-m", "x", str(REPOSITORY)],
        ][-6:]
    ), done.stderr
    assert "holds another rm_scale than" in done.stderr
    sources = bash("rm_scale_sources", tmp_path).stdout.strip()
    packed_stand_in(tmp_path, sources)
    same = bash("rm_scale_python; echo ${PYTHONPATH-none}", tmp_path, **variables)
    assert (same.stdout, same.stderr) == ("none\n", "")


def test_sources_are_known_by_one_digest(tmp_path: Path) -> None:
    from rm_scale.slurm.packed_environment import digest_of_sources, entries_of_package

    entries = list(entries_of_package(REPOSITORY / "rm_scale", "site/rm_scale"))
    assert bash("rm_scale_sources", tmp_path).stdout.strip() == digest_of_sources(entries, "site/rm_scale")


def test_every_node_unpacks_before_anything_is_timed(tmp_path: Path) -> None:
    stand_in(tmp_path, "srun", "exit 0")
    archive = str(packed_stand_in(tmp_path, ""))
    done = bash("rm_scale_python; rm_scale_unpack; echo on", tmp_path, RM_SCALE_PACKED_ENV=archive)
    assert done.stdout == "on\n" and called(tmp_path)[0].endswith(" -V"), done.stderr
    stand_in(tmp_path, "srun", "exit 2")
    assert bash("rm_scale_python; rm_scale_unpack", tmp_path, RM_SCALE_PACKED_ENV=archive).returncode == 2
    stand_in(tmp_path, "srun", "exec sleep 60")
    slow = {"RM_SCALE_PACKED_ENV": archive, "RM_SCALE_UNPACK_SECONDS": "1"}
    done = bash("rm_scale_python; rm_scale_unpack", tmp_path, **slow)
    assert done.returncode == 2 and "RM_SCALE_UNPACK_SECONDS=1: not every node could unpack" in done.stderr
    assert bash("rm_scale_python; rm_scale_unpack; echo on", tmp_path).stdout == "on\n"


def test_compilers_caches_are_on_the_nodes_own_disk(tmp_path: Path) -> None:
    from rm_scale.launch.extensions import CACHES

    code = f'rm_scale_caches; for name in {" ".join(CACHES)}; do echo "${{!name}}"; done'
    done = bash(code, tmp_path, RM_SCALE_SCRATCH="/fast disk", CUDA_CACHE_PATH="/mine")
    root = f"/fast disk/rm_scale-{os.getuid()}/caches"
    assert done.stdout.splitlines() == [f"{root}/triton", f"{root}/inductor", f"{root}/kernels", "/mine"], done.stderr


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RM_SCALE_PACKED_ENV": "/nowhere"}, "RM_SCALE_PACKED_ENV=/nowhere: no such file"),
        ({"RM_SCALE_PACKED_ENV": "/x", "RM_SCALE_CONTAINER": "y"}, "are both set"),
        ({"RM_SCALE_VENV": "/nowhere"}, "RM_SCALE_VENV=/nowhere: has no bin/python"),
        ({"RM_SCALE_MODULES": "cuda/12"}, "there is no 'module' command here"),
        ({"RM_SCALE_SETUP": "/nowhere"}, "RM_SCALE_SETUP=/nowhere: no such file"),
        ({"RM_SCALE_CONTAINER": "x", "RM_SCALE_CONTAINER_ENGINE": "docker"}, "must be apptainer or pyxis"),
        ({"RM_SCALE_MAX_RESTARTS": "many"}, "RM_SCALE_MAX_RESTARTS=many: must be a whole number"),
    ],
)
def test_a_site_that_can_not_be(variables: dict[str, str], told: str, tmp_path: Path) -> None:
    done = bash("rm_scale_modules; rm_scale_python", tmp_path, **variables)
    assert done.returncode == 2 and told in done.stderr


def test_modules_and_setup_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "setup.sh").write_text("export FROM_SETUP=1\n")
    code = 'module() { echo "module $*"; }; rm_scale_modules; echo $FROM_SETUP'
    done = bash(code, tmp_path, RM_SCALE_MODULES="cuda/12 gcc", RM_SCALE_SETUP=str(tmp_path / "setup.sh"))
    assert done.stdout == "module load cuda/12 gcc\n1\n"


def test_the_environment_keeps_what_was_set(tmp_path: Path) -> None:
    stand_in(tmp_path, "squeue", "echo 2030-01-02T03:04:05")
    code = "rm_scale_environment; echo $NCCL_DEBUG $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME $RM_SCALE_END_TIME"
    done = bash(code, tmp_path, NCCL_DEBUG="INFO", RM_SCALE_INTERFACE="ib0", TZ="UTC")
    assert done.stdout.split() == ["INFO", "=ib0", "ib0", "1893553445"]
    stand_in(tmp_path, "squeue", "echo NONE")
    done = bash("rm_scale_environment; echo ${RM_SCALE_END_TIME-unset}", tmp_path)
    assert done.stdout == "unset\n", done.stderr
    done = bash("rm_scale_environment; echo $RM_SCALE_END_TIME", tmp_path, SLURM_JOB_END_TIME="5")
    assert done.stdout == "5\n"


def test_a_job_submitted_by_a_job_has_its_own_environment(tmp_path: Path) -> None:
    """sbatch hands on all variables: the inner job took the outer's start for its own, and the limit for a long one."""
    stand_in(tmp_path, "squeue", "echo NONE")
    code = "rm_scale_environment; env"
    outer = {"RM_SCALE_START_TIME": "5", "RM_SCALE_JOB_ASKED": "3", "RM_SCALE_JOB_ENDED": "1"}
    outer |= {"RM_SCALE_END_TIME": "9", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/logs/3/attempt-0/nccl_trace_"}
    lines = bash(code, tmp_path, **outer).stdout.splitlines()
    seen = dict(line.split("=", 1) for line in lines if "=" in line)
    assert abs(int(seen["RM_SCALE_START_TIME"]) - time.time()) < 600
    assert not {"RM_SCALE_JOB_ASKED", "RM_SCALE_JOB_ENDED", "RM_SCALE_END_TIME"} & set(seen)
    assert seen["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/attempt-0/nccl_trace_"
    mine = bash(code, tmp_path, TORCH_NCCL_DEBUG_INFO_TEMP_FILE="/mine").stdout
    assert "TORCH_NCCL_DEBUG_INFO_TEMP_FILE=/mine\n" in mine


# --- A limit that is moved -------------------------------------------------------------------------------------------

WATCH = """
    mkdir -p "$RM_SCALE_ATTEMPT_DIR"
    trap rm_scale_end_helpers EXIT
    rm_scale_environment
    rm_scale_watch_limit
    until (($(wc -l <"$RM_SCALE_JOB_DIR/called") >= 6)); do /bin/sleep 0.1; done
    cat "$RM_SCALE_END_TIME_FILE"
"""


def squeue_answers(folder: Path, *answers: str) -> None:
    """Make an squeue that says one after the other; at last the last one again and again."""
    cases = "".join(f"{number}) {answer};; " for number, answer in enumerate(answers, 1))
    stand_in(folder, "squeue", f"case $(wc -l <{folder}/called) in {cases}*) {answers[-1]};; esac")


LATE, EARLY = "echo 2030-01-01T03:00:00", "echo 2030-01-01T01:00:00"


def test_a_moved_limit_outlives_a_controller_that_is_away(tmp_path: Path) -> None:
    """One squeue that failed brought back the limit with which the job was started."""
    squeue_answers(tmp_path, EARLY, LATE, "exit 1")
    early = {"SLURM_JOB_END_TIME": "1893459600", "RM_SCALE_LIMIT_SECONDS": "1", "TZ": "UTC"}
    done = bash(WATCH, tmp_path, **early)
    assert done.stdout.splitlines()[-1] == "1893466800", done.stdout + done.stderr
    assert done.stdout.count("the time limit was moved") == 1


def test_a_limit_that_is_not_known_at_first(tmp_path: Path) -> None:
    squeue_answers(tmp_path, "exit 1", "exit 1", LATE)
    done = bash(WATCH, tmp_path, RM_SCALE_LIMIT_SECONDS="1", TZ="UTC")
    assert done.stdout.splitlines()[-1] == "1893466800", done.stdout + done.stderr
    assert done.stdout.count("the time limit is known now: the job ends at 2030-01-01 03:00:00") == 1


def test_what_runs_beside_the_script_ends_with_it(tmp_path: Path) -> None:
    """Under slurm/bench.sh each case left a loop behind, which held the case's output open and asked Slurm for ever."""
    stand_in(tmp_path, "squeue", LATE)
    code = "trap rm_scale_end_helpers EXIT; rm_scale_environment; rm_scale_watch_limit; echo $RM_SCALE_HELPERS"
    done = bash(f"{code}; exit 3", tmp_path, RM_SCALE_LIMIT_SECONDS="500")
    assert done.returncode == 3
    pid = int(done.stdout)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


# --- Who comes back --------------------------------------------------------------------------------------------------

END = "rm_scale_python; rm_scale_end none"


def slurm_shows(folder: Path, state: str, requeue: str = "exit 0", more: str = "Reason=None Restarts=0") -> None:
    """Make an scontrol that shows the job so, and does this when it is asked to requeue."""
    shown = f'echo "JobId=7 JobState={state} {more} ExcNodeList=(null) "' if state else "exit 1"
    stand_in(folder, "scontrol", f'case $1 in --oneliner) {shown};; requeue) {requeue};; show) echo "$3";; esac')
    stand_in(folder, "sleep", "exit 0")


@pytest.mark.parametrize(
    ("state", "reason", "attempt", "requeued"),
    [
        ("RUNNING", "None", "0", True),
        ("RUNNING", "None", "3", False),  # the third restart was the last allowed
        ("COMPLETING", "None", "0", False),  # scancel, or a preemption that requeues by itself
        ("COMPLETING", "TimeLimit", "0", True),
        ("", "", "0", True),  # the controller does not answer: try
    ],
)
def test_who_is_requeued(state: str, reason: str, attempt: str, requeued: bool, tmp_path: Path) -> None:
    """The facts reach `rm_scale.slurm.requeue`, and what it decides is done, whatever the clock says.

    After an extension or a suspension the end with which the job began had passed, and one that was cancelled then came
    back.
    """
    slurm_shows(tmp_path, state, more=f"Reason={reason} Restarts={attempt}")
    passed = {"RM_SCALE_END_TIME": str(int(time.time()) - 5), "SLURM_JOB_END_TIME": str(int(time.time()) - 5)}
    variables = {**passed, "RM_SCALE_ATTEMPT": attempt, "RM_SCALE_MAX_RESTARTS": "3"}
    done = bash(END, tmp_path, **variables)
    assert done.returncode == 85
    assert ("scontrol requeue 7" in called(tmp_path)) is requeued
    events = (tmp_path / "events.jsonl").read_text()
    assert ('"requeue"' in events) is requeued


@pytest.mark.parametrize(
    "answer",
    [
        "Requested operation is presently disabled",  # JobRequeue=0
        "Only batch jobs are accepted or processed for job 7",  # inside salloc
        "Job not heterogeneous job leader for job 7",
        "Access/permission denied for job 7",
        "Invalid job id specified for job 7",
    ],
)
def test_slurm_that_refuses_to_requeue_is_asked_once(answer: str, tmp_path: Path) -> None:
    """Asked again for 15 minutes, with all nodes held."""
    slurm_shows(tmp_path, "RUNNING", f"echo '{answer}' >&2; exit 1")
    done = bash(END, tmp_path)
    assert done.returncode == 85 and "submit the same command again to go on" in done.stdout
    assert called(tmp_path).count("scontrol requeue 7") == 1, "asking again would not help"


@pytest.mark.parametrize(
    "away",
    [
        "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1",
        "echo 'Socket timed out on send/recv operation for job 7' >&2; exit 1",
        "echo 'Zero Bytes were transmitted or received for job 7' >&2; exit 1",
        "echo 'Slurm backup controller in standby mode for job 7' >&2; exit 1",
        "echo 'Job can not be altered now, try again later for job 7' >&2; exit 1",
        "echo 'Unexpected message received for job 7' >&2; exit 1",  # of a controller that has just been started
        "exit 124",  # what `timeout` says
        "kill -TERM $$",
    ],
)
def test_a_requeue_is_asked_for_again_while_slurm_is_away(away: str, tmp_path: Path) -> None:
    """The controller was restarted at that moment: the chain of attempts ended."""
    slurm_shows(tmp_path, "", f"test $(grep -c requeue {tmp_path}/called) -ge 4 || {{ {away}; }}")
    done = bash(END, tmp_path)
    assert done.returncode == 85 and "requeued; attempt 1 goes on" in done.stdout, done.stdout
    assert called(tmp_path).count("scontrol requeue 7") == 4
    assert [line for line in called(tmp_path) if line.startswith("sleep")] == [
        "sleep 1",
        "sleep 2",
        "sleep 4",
        "sleep 300",
    ]


def test_slurm_stays_away(tmp_path: Path) -> None:
    slurm_shows(tmp_path, "", "echo 'Unable to contact slurm controller' >&2; exit 1")
    done = bash(END, tmp_path, RM_SCALE_REQUEUE_SECONDS="0")
    assert done.returncode == 85 and "did not requeue within 0 s: Unable to contact" in done.stderr


BEGAN, LATER = "2026-11-30T22:00:00", "2026-11-30T23:31:21"
TOLD = [
    ("COMPLETING", "Reason=TimeLimit Restarts=0 PreemptTime=None", True),
    ("COMPLETING", f"Reason=None Restarts=0 PreemptTime={LATER}", True),  # PreemptMode=CANCEL
    ("COMPLETING", f"Reason=None Restarts=0 PreemptTime={LATER} StartTime={BEGAN} SuspendTime=None", True),
    ("COMPLETING", f"Reason=None Restarts=1 PreemptTime={LATER}", False),  # PreemptMode=REQUEUE
    ("COMPLETING", "Reason=None Restarts=0 PreemptTime=None", False),  # scancel
    ("RUNNING", f"Reason=None Restarts=0 PreemptTime={LATER}", False),  # within the grace time
    # Suspended for a more important job (PreemptMode=SUSPEND,GANG), and cancelled by its owner meanwhile or afterwards.
    ("COMPLETING", f"Reason=None Restarts=0 PreemptTime={BEGAN} StartTime={BEGAN} SuspendTime={BEGAN}", False),
    ("COMPLETING", f"Reason=None Restarts=0 PreemptTime={BEGAN} StartTime={BEGAN} SuspendTime={LATER}", False),
    # Suspended by an administrator, and preempted later.
    ("COMPLETING", f"Reason=None Restarts=0 PreemptTime={LATER} StartTime={BEGAN} SuspendTime={BEGAN}", True),
    # Of an earlier attempt.
    ("COMPLETING", f"Reason=None Restarts=0 PreemptTime={BEGAN} StartTime={LATER} SuspendTime=None", False),
]


@pytest.mark.parametrize(("state", "more", "asked"), TOLD)
def test_a_job_that_is_killed_comes_back_whether_or_not_it_saves(
    state: str, more: str, asked: bool, tmp_path: Path
) -> None:
    """A save that was slower than the grace ended in TIMEOUT, and the job did not come back."""
    slurm_shows(tmp_path, state, more=more)
    done = bash("rm_scale_stop TERM; rm_scale_stop TERM; echo $RM_SCALE_REQUEUED", tmp_path)
    assert called(tmp_path).count("scontrol requeue 7") == asked, done.stderr
    assert done.stdout.splitlines()[-1] == ("1" if asked else "")


def test_bash_and_python_call_the_same_a_preemption(tmp_path: Path) -> None:
    code = "".join(f"rm_scale_is_preempted ' {more} ' && echo yes || echo no\n" for _, more, _ in TOLD)
    answers = [is_preempted(dict(word.split("=") for word in more.split())) for _, more, _ in TOLD]
    assert bash(code, tmp_path).stdout.split() == ["yes" if answer else "no" for answer in answers]
    assert True in answers and False in answers


# --- Attempts that end before training has begun ---------------------------------------------------------------------

AT_LIMIT = "Reason=TimeLimit Restarts={} PreemptTime=None"


def attempts_before(folder: Path, *kinds: str) -> str:
    """Leave behind what earlier attempts have that were idle, had begun or were preempted; return the next number."""
    for number, kind in enumerate(kinds):
        (folder / f"attempt-{number}").mkdir()
        if kind == "begun":
            (folder / f"attempt-{number}" / "begun").touch()
        if kind == "idle":
            bash("rm_scale_note idle", folder, RM_SCALE_ATTEMPT=str(number))
    (folder / f"attempt-{len(kinds)}").mkdir()
    return str(len(kinds))


@pytest.mark.parametrize(
    ("earlier", "comes_back"),
    [
        ([], True),
        (["idle"], True),
        (["idle", "idle"], False),
        (["idle", "preempted", "idle"], False),
        (["idle", "begun", "idle"], True),
        (["idle", "idle", "begun"], True),
        (["preempted", "preempted", "preempted"], True),
    ],
)
@pytest.mark.parametrize("how", ["at the limit", "asked to stop", "without Python"])
def test_a_start_that_hangs_does_not_burn_one_limit_after_the_other(
    earlier: list[str], comes_back: bool, how: str, tmp_path: Path
) -> None:
    """Training's own guard counts attempts that it has begun: an import that hung came back a hundred times."""
    attempt = attempts_before(tmp_path, *earlier)
    slurm_shows(tmp_path, "COMPLETING" if how == "at the limit" else "RUNNING", more=AT_LIMIT.format(attempt))
    if how == "at the limit":
        code = "rm_scale_stop TERM; rm_scale_python; RM_SCALE_REQUEUE_SECONDS=0 rm_scale_end none"
    else:
        code = END if how == "asked to stop" else "RM_SCALE_PYTHON=(false) RM_SCALE_SRUN=(); rm_scale_end none"
    done = bash(code, tmp_path, RM_SCALE_ATTEMPT=attempt)
    assert ("scontrol requeue 7" in called(tmp_path)) is comes_back, done.stderr
    assert done.returncode == (85 if comes_back else 2)
    said = "the last 3 attempts were stopped before training began"
    assert (said in done.stderr) is not comes_back
    events = (tmp_path / "events.jsonl").read_text()
    assert '{"event": "idle", "time": ' in events and f'"attempt": {attempt},' in events


def test_an_attempt_that_has_begun_or_was_preempted_is_not_idle(tmp_path: Path) -> None:
    attempt = attempts_before(tmp_path, "idle", "idle")
    preempted = f"Reason=None Restarts=2 PreemptTime={LATER} StartTime={BEGAN}"
    slurm_shows(tmp_path, "COMPLETING", more=preempted)
    assert "requeued" in bash("rm_scale_stop TERM", tmp_path, RM_SCALE_ATTEMPT=attempt).stdout
    slurm_shows(tmp_path, "RUNNING", more=preempted)
    assert bash(END, tmp_path, RM_SCALE_ATTEMPT=attempt).returncode == 85
    (tmp_path / "attempt-2" / "begun").touch()
    slurm_shows(tmp_path, "COMPLETING", more=AT_LIMIT.format(2))
    assert "requeued" in bash("rm_scale_stop TERM", tmp_path, RM_SCALE_ATTEMPT=attempt).stdout


# --- Attempts that can't be started ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("attempt", "tries"), [("0", 1), ("1", 3)])
def test_a_later_attempt_waits_for_a_disk_that_is_full(attempt: str, tries: int, tmp_path: Path) -> None:
    """The first attempt says what is wrong; a chain of days ended there too, with exit code 1 and no message."""
    full = "echo 'mkdir: cannot create directory: No space left on device' >&2; exit 1"
    stand_in(tmp_path, "mkdir", f'test $(wc -l <{tmp_path}/called) -ge 5 && exec /bin/mkdir "$@"; {full}')
    stand_in(tmp_path, "sleep", "exit 0")
    code = 'RM_SCALE_LOGS=logs RM_SCALE_JOB_DIR=logs/7; rm_scale_make_folder; echo "$RM_SCALE_ATTEMPT_DIR"'
    done = bash(code, tmp_path, RM_SCALE_ATTEMPT=attempt)
    assert sum(line.startswith("mkdir") for line in called(tmp_path)) == tries, done.stderr
    if attempt == "0":
        assert done.returncode == 2 and "RM_SCALE_LOGS=logs: can't be written below" in done.stderr
        assert "No space left on device. Fix: " in done.stderr
    else:
        assert done.stdout == f"{tmp_path}/logs/7/attempt-1\n"
        assert done.stderr.count("No space left on device; tried again in") == 2


def test_a_disk_that_stays_full_ends_a_later_attempt_too(tmp_path: Path) -> None:
    stand_in(tmp_path, "mkdir", "exit 1")
    done = bash("rm_scale_make_folder", tmp_path, RM_SCALE_ATTEMPT="1", RM_SCALE_REQUEUE_SECONDS="2")
    assert done.returncode == 2 and "tried again in 1 s" in done.stderr


PREPARE = 'RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=(); mkdir -p "$RM_SCALE_ATTEMPT_DIR"; rm_scale_prepare; echo on'


@pytest.mark.parametrize(
    ("attempt", "code", "tries", "ends_with"),
    [
        ("0", 75, 1, 2),  # said, and somebody may still be looking
        ("1", 75, 3, 0),  # the disk is full for a while
        ("1", 1, 3, 0),  # Python could not read a module
        ("1", 2, 1, 2),  # would be refused again
        ("1", 64, 1, 0),
    ],
)
def test_a_later_attempt_prepares_again(attempt: str, code: int, tries: int, ends_with: int, tmp_path: Path) -> None:
    stand_in(tmp_path, "scontrol", "exit 1")
    stand_in(tmp_path, "srun", "exit 0")
    stand_in(tmp_path, "sleep", "exit 0")
    stand_in(tmp_path, "python3", f"test $(grep -c ^python3 {tmp_path}/called) -ge 3 || exit {code}")
    done = bash(PREPARE, tmp_path, RM_SCALE_ATTEMPT=attempt)
    assert done.returncode == ends_with, done.stderr
    assert sum(line.startswith("python3") for line in called(tmp_path)) == tries
    assert ("on\n" in done.stdout) is (tries == 3)


@pytest.mark.parametrize("what", ["check", "unpack"])
@pytest.mark.parametrize(
    ("attempt", "retries", "state", "retried"),
    [
        ("1", "1", "RUNNING", True),
        ("1", "1", "", True),
        ("0", "1", "RUNNING", False),  # most likely the site's or the user's own fault
        ("1", "0", "RUNNING", False),
        ("1", "1", "COMPLETING", False),  # scancel
    ],
)
def test_a_node_that_fails_the_start_of_a_later_attempt_is_a_retry(
    what: str, attempt: str, retries: str, state: str, retried: bool, tmp_path: Path
) -> None:
    """A slow node in the check, or a full /tmp for the packed environment, ended the chain in spite of the retries."""
    slurm_shows(tmp_path, state, more=f"Reason=None Restarts={attempt}")
    stand_in(tmp_path, "srun", "exit 2")
    stand_in(tmp_path, "python3", "exit 0")
    archive = {"RM_SCALE_PACKED_ENV": str(packed_stand_in(tmp_path, ""))} if what == "unpack" else {}
    code = PREPARE if what == "check" else 'rm_scale_python; mkdir -p "$RM_SCALE_ATTEMPT_DIR"; rm_scale_unpack'
    variables = {"RM_SCALE_ATTEMPT": attempt, "RM_SCALE_RETRIES": retries, **archive}
    done = bash(code, tmp_path, **variables)
    assert ("scontrol requeue 7" in called(tmp_path)) is retried, done.stderr
    assert done.returncode == (85 if retried else 2)
    assert ('"event": "retry"' in (tmp_path / "events.jsonl").read_text()) is retried
    assert bash(code, tmp_path, **variables).returncode == 2, "no retry is left"


def test_a_check_that_slurm_ends_is_no_failure(tmp_path: Path) -> None:
    """At a preemption Slurm's TERM goes to the tasks of the check too."""
    slurm_shows(tmp_path, "RUNNING", more=f"Reason=None Restarts=0 PreemptTime={LATER} StartTime={BEGAN}")
    stand_in(tmp_path, "srun", "exit 143")
    code = 'rm_scale_python; rm_scale_write_start() { :; }; mkdir -p "$RM_SCALE_ATTEMPT_DIR"; rm_scale_prepare'
    done = bash(code, tmp_path)
    assert done.returncode == 85 and "scontrol requeue 7" in called(tmp_path), done.stderr


# --- A signal at the very beginning ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "left", "grace", "postponed"),
    [
        (600, 580, 600, True),  # sbatch --time=10 with the scripts' ten minutes
        (600, 140, 600, False),
        (43200, 43000, 600, False),  # somebody's own signal
        (43200, 590, 600, False),
        (3600, 3590, 0, True),  # a grace on sbatch's own command line, as long as the limit
        (3600, 600, 0, False),
    ],
)
def test_a_signal_at_the_very_beginning_is_postponed(
    limit: int, left: int, grace: int, postponed: bool, tmp_path: Path
) -> None:
    """Such a job was stopped in its first minute, in each attempt anew."""
    file = tmp_path / "end_time"
    stand_in(tmp_path, "sleep", f"date +%s >'{file}'")  # the time has come
    now = int(time.time())
    times = {"RM_SCALE_START_TIME": str(now + left - limit), "RM_SCALE_END_TIME": str(now + left)}
    times["RM_SCALE_END_TIME_FILE"] = str(file)
    code = 'trap "rm_scale_stop USR1" USR1; rm_scale_stop USR1; echo "[$RM_SCALE_STOP]"; wait || :'
    code += '; echo "[$RM_SCALE_STOP]"'
    done = bash(code, tmp_path, SBATCH_SIGNAL=f"B:USR1@{grace}", **times)
    seen = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert seen == (["[]", "[USR1]"] if postponed else ["[USR1]", "[USR1]"]), done.stdout + done.stderr


def test_a_postponed_signal_waits_for_a_limit_that_was_moved(tmp_path: Path) -> None:
    """It stopped the run a quarter of the old limit before the old end."""
    file, now = tmp_path / "end_time", int(time.time())
    # The limit is moved twice while it sleeps, and then the time has come.
    again = "$(($(date +%s) + 50000))"
    stand_in(
        tmp_path,
        "sleep",
        f"if (($(grep -c ^sleep '{tmp_path}/called') < 4)); then echo {again}; else date +%s; fi >'{file}'",
    )
    times = {"RM_SCALE_START_TIME": str(now - 10), "RM_SCALE_END_TIME": str(now + 590)}
    times["RM_SCALE_END_TIME_FILE"] = str(file)
    code = 'trap "rm_scale_stop USR1" USR1; rm_scale_stop USR1; wait || :; echo "[$RM_SCALE_STOP]"'
    done = bash(code, tmp_path, SBATCH_SIGNAL="B:USR1@600", RM_SCALE_LIMIT_SECONDS="120", **times)
    assert done.stdout.splitlines()[-1] == "[USR1]", done.stdout + done.stderr
    assert called(tmp_path) == 4 * ["sleep 120"], "looks at the limit as often as the watcher does"


def test_a_limit_that_was_moved_decides_whether_a_signal_is_early(tmp_path: Path) -> None:
    now = int(time.time())
    (tmp_path / "end_time").write_text(str(now + 40))
    times = {"RM_SCALE_START_TIME": str(now - 560), "RM_SCALE_END_TIME": str(now + 9000)}
    times["RM_SCALE_END_TIME_FILE"] = str(tmp_path / "end_time")
    done = bash('rm_scale_stop USR1; echo "[$RM_SCALE_STOP]"', tmp_path, SBATCH_SIGNAL="B:USR1@9000", **times)
    assert done.stdout.splitlines()[-1] == "[USR1]", done.stdout


LIKE = "|idle|gpu:8|(null)|(null)|64|512000"
OTHERS = ("node2|mix|gpu:8|(null)|(null)|64|512000", f"node3{LIKE}", f"node4{LIKE}")


@pytest.mark.parametrize(
    ("nodes", "more", "excluded"),
    [
        (("node1|alloc" + LIKE.removeprefix("|idle"), *OTHERS), "", True),
        ((*OTHERS, "node1|down*" + LIKE.removeprefix("|idle")), "", True),
        (OTHERS[:2], "", False),
        ((*OTHERS[:2], f"node4{LIKE.replace('idle', 'drain')}", f"node5{LIKE.replace('idle', 'idle*')}"), "", False),
        ((*OTHERS[:2], f"node4{LIKE.replace('idle', 'resv')}", f"node5{LIKE.replace('idle', 'maint')}"), "", False),
        ((*OTHERS[:2], f"node4{LIKE.replace('gpu:8', 'gpu:4')}", f"node5{LIKE.replace('(null)', 'old')}"), "", False),
        ((*OTHERS[:2], f"node1{LIKE}"), "", False),  # left out before
        (OTHERS, "ReqNodeList=node[2-4]", False),
        (OTHERS, "Reservation=ours", False),
    ],
)
def test_a_node_is_left_out_where_others_do_for_the_job(
    nodes: tuple[str, ...], more: str, excluded: bool, tmp_path: Path
) -> None:
    """Drained nodes and nodes without the job's features were counted, and the job could not start any more."""
    facts = f"Reason=None Restarts=0 {more} ReqNodeList=(null)" if "ReqNode" not in more else f"Restarts=0 {more}"
    slurm_shows(tmp_path, "RUNNING", more=facts)
    shown = f'echo "JobId=7 JobState=RUNNING {facts} ExcNodeList=node1 "'
    answers = f"case $1 in --oneliner) {shown};; show) echo $3 | tr , '\\n';; esac"
    stand_in(tmp_path, "scontrol", answers)
    stand_in(tmp_path, "sinfo", f"printf '%s\\n' {' '.join(map(shlex.quote, nodes))}")
    stand_in(tmp_path, "python3", "echo requeue 137 node2")
    code = "RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=(); rm_scale_end 137"
    done = bash(code, tmp_path, SLURM_JOB_PARTITION="main")
    assert done.returncode == 85, done.stderr
    assert ("scontrol update JobId=7 ExcNodeList=node1,node2" in called(tmp_path)) is excluded, done.stderr
    assert ("node2 is left out of the next attempts" in done.stderr) is excluded


@pytest.mark.parametrize(
    ("given", "attempt", "code", "requeued"),
    [("137", 0, 137, False), ("0", 0, 0, False), ("85", 0, 85, True), ("none", 2, 85, True), ("85", 3, 85, False)],
)
def test_without_a_decision_the_code_of_srun_counts(
    given: str, attempt: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    """Python can't be started any more, or says something else: a job that has saved comes back all the same."""
    stand_in(tmp_path, "squeue", "exit 1")
    stand_in(tmp_path, "scontrol", "exit 0")
    stand_in(tmp_path, "python3", "echo 'requeue at once'; exit 1")
    stand_in(tmp_path, "sleep", "exit 0")
    variables = {"RM_SCALE_ATTEMPT": str(attempt), "RM_SCALE_MAX_RESTARTS": "3"}
    done = bash(f"RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=(); rm_scale_end {given}", tmp_path, **variables)
    assert done.returncode == code and "did not answer" in done.stderr
    assert ("scontrol requeue 7" in called(tmp_path)) is requeued
    if not requeued:
        assert f'"code": "{code}"' in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize(
    ("printed", "code"),
    [
        ("echo exit 3; echo Loading cuda 12.8", 3),  # a site's banner, at the end of each Python
        ("echo requeue 85; echo bye 1 2 3", 85),
        ("echo Loading cuda 12.8", 137),  # no decision: srun's code, and no node with the name 12.8
        ("echo exit 3 a b", 137),
        ("echo requeue 85x", 137),
    ],
)
def test_a_decision_is_a_whole_line(printed: str, code: int, tmp_path: Path) -> None:
    slurm_shows(tmp_path, "RUNNING")
    stand_in(tmp_path, "python3", printed)
    stand_in(tmp_path, "sinfo", "echo 9")
    done = bash("RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=(); rm_scale_end 137", tmp_path, SLURM_JOB_PARTITION="main")
    assert done.returncode == code, done.stderr
    assert not [line for line in called(tmp_path) if line.startswith("scontrol update")]


def test_no_node_is_left_out_where_there_was_no_decision(tmp_path: Path) -> None:
    """`Loading cuda 12.8` was read as action, code and node; the job then kept off a node named 12.8."""
    slurm_shows(tmp_path, "RUNNING")
    stand_in(tmp_path, "python3", "echo Loading cuda 12.8")
    stand_in(tmp_path, "sinfo", "echo 9")
    code = "RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=(); rm_scale_end 85"
    done = bash(code, tmp_path, SLURM_JOB_PARTITION="main")
    assert done.returncode == 85 and "scontrol requeue 7" in called(tmp_path)
    assert "left out" not in done.stderr and not [
        line for line in called(tmp_path) if line.startswith("scontrol update")
    ]


def test_the_decision_is_not_ended_by_the_time_limit(tmp_path: Path) -> None:
    """At the limit Slurm sends TERM to every process of the job, the deciding one too."""
    slurm_shows(tmp_path, "RUNNING")
    stand_in(tmp_path, "python3", "kill -TERM $$; kill -USR1 $$; echo exit 3")
    code = """
        trap 'rm_scale_stop USR1' USR1; trap 'rm_scale_stop TERM' TERM
        RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=()
        rm_scale_end 0
    """
    done = bash(code, tmp_path)
    assert done.returncode == 3, done.stderr


def test_codes_that_bash_and_python_share() -> None:
    text = (REPOSITORY / "slurm" / "common.sh").read_text()
    assert f"RM_SCALE_NOTHING_TO_START={EXIT_NOTHING_TO_START} #" in text
    assert f"RM_SCALE_REQUEUE={EXIT_REQUEUE} #" in text
    assert f"RM_SCALE_PORT_TAKEN={EXIT_PORT_TAKEN} #" in text
    assert f"RM_SCALE_ASK_SLURM={EXIT_ASK_SLURM} #" in text
    assert f"RM_SCALE_TRY_AGAIN={EXIT_TRY_AGAIN} #" in text
    assert f"RM_SCALE_REFUSED={EXIT_SETTINGS} #" in text
    assert f"RM_SCALE_MAX_IDLE={MAX_IDLE} #" in text
    assert f"rm_scale_end {NO_RANKS};" in text


def test_a_full_disk_of_the_jobs_log_ends_no_job(tmp_path: Path) -> None:
    """srun would give the file up for good, and a message that fails end the script."""
    stand_in(tmp_path, "srun", "for line in {1..2000}; do echo $line; done; exit 85")
    code = """
        RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=()
        exec >/dev/full
        rm_scale_say "a message"; rm_scale_train; echo "code $RM_SCALE_CODE" >"$RM_SCALE_JOB_DIR/code"
    """
    done = bash(code, tmp_path)
    assert (tmp_path / "code").read_text() == "code 85\n", done.stderr


def test_the_last_lines_of_srun_come_before_what_follows(tmp_path: Path) -> None:
    stand_in(tmp_path, "srun", "for line in {1..2000}; do echo $line; done; echo error >&2; printf 'no line end'")
    done = bash("RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=(); rm_scale_train; echo after", tmp_path)
    assert done.stdout.splitlines() == [*map(str, range(1, 2001)), "error", "no line end", "after"]


def test_a_signal_is_repeated_until_srun_ends(tmp_path: Path) -> None:
    """And the wait goes on, though bash's own returns at each signal."""
    stand_in(tmp_path, "scancel", "exit 0")
    stand_in(tmp_path, "srun", "sleep 2; exit 7")
    code = """
        trap 'rm_scale_stop USR1' USR1; trap 'rm_scale_stop TERM' TERM
        RM_SCALE_PYTHON=(python3) RM_SCALE_SRUN=()
        (/bin/sleep 0.5; kill -USR1 $$; /bin/sleep 0.5; kill -TERM $$) &
        rm_scale_train; echo "code $RM_SCALE_CODE"
    """
    done = bash(code, tmp_path)
    assert done.stdout.splitlines()[-1] == "code 7", done.stderr
    assert done.stdout.count("received at") == 1 and "Terminated" not in done.stderr
    assert "scancel --signal=40 7" in called(tmp_path)

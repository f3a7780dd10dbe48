# shellcheck shell=bash
# What becomes of the job when its ranks have ended: an exit code, or another attempt.

# Ends the script as rm_scale.slurm.requeue decides: with an exit code, or by handing the job back to Slurm.
rm_scale_end() { # SRUN_CODE, or none when no rank was started
    local state answer action code
    state=$(squeue --noheader --jobs "$RM_SCALE_JOB" --format %T 2>/dev/null || :)
    answer=$(
        trap '' USR1 TERM # at the time limit Slurm signals every process, and this one must finish
        rm_scale_here -m rm_scale.slurm.requeue "$RM_SCALE_ATTEMPT_DIR" --srun_code "$1" --state "$state" \
            --restarts "$RM_SCALE_ATTEMPT" --max_restarts "$RM_SCALE_MAX_RESTARTS" \
            --end_time "${RM_SCALE_END_TIME:-}" | tail -n 1
    ) || :
    read -r action code <<<"$answer"
    if [[ ! "$action $code" =~ ^(exit|requeue)\ [0-9]+$ ]]; then
        # A job that has saved must come back also where Python can't be started any more.
        rm_scale_say "rm_scale.slurm.requeue did not answer: srun's exit code decides" >&2
        code=$1 action=requeue
        [[ $code != none ]] || code=$RM_SCALE_REQUEUE
        if ((code != RM_SCALE_REQUEUE || RM_SCALE_ATTEMPT >= RM_SCALE_MAX_RESTARTS)); then rm_scale_exit "$code"; fi
    fi
    if [[ $action == requeue ]]; then
        if scontrol requeue "$RM_SCALE_JOB"; then
            rm_scale_say "saved, stopped and requeued; attempt $((RM_SCALE_ATTEMPT + 1)) goes on from the checkpoint"
            sleep 120 # Slurm ends this script; a normal end would make the job COMPLETED
        fi
        rm_scale_say "scontrol requeue failed. The checkpoint is whole: submit the same command again to go on"
    fi
    exit "$code"
}

rm_scale_exit() { # CODE
    rm_scale_note end code "$1"
    exit "$1"
}

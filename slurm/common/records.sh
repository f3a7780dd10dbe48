# shellcheck shell=bash
# Messages, and the events in the job's folder.

# What Slurm's commands call this job: of an array this task alone. A task's SLURM_JOB_ID won't do, since that of the task
# which started last is the number of the whole array.
rm_scale_job() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# One line of what Slurm knows of this job; empty where Slurm does not answer.
rm_scale_show_job() {
    SLURM_TIME_FORMAT=standard timeout 30 scontrol --oneliner show job "$RM_SCALE_JOB" 2>/dev/null || :
}

# A full disk of the job's log must not end the job, nor make a message the reason for it.
rm_scale_say() { printf 'rm_scale: %s\n' "$*" 2>/dev/null || :; }
rm_scale_fail() {
    printf 'rm_scale: %s\n' "$*" >&2 || :
    exit 2
}

# One line of JSON per event; no value needs escaping. `rm-scale slurm status` reads them.
rm_scale_note() { # EVENT [KEY VALUE]
    local line='{"event": "%s", "time": %s, "attempt": %s, "%s": "%s"}\n'
    # shellcheck disable=SC2059 # the format is the line above
    printf "$line" "$1" "$(date +%s.%3N)" "$RM_SCALE_ATTEMPT" "${2:-script}" "${3:-$RM_SCALE_TIER}" \
        2>/dev/null >>"$RM_SCALE_JOB_DIR/events.jsonl" || : # a full disk must not end a job
}

# Makes the folder of this attempt's records.
rm_scale_make_folder() {
    local answer began=$SECONDS
    until answer=$({
        mkdir -p -- "$RM_SCALE_JOB_DIR/attempt-$RM_SCALE_ATTEMPT" && cd -- "$RM_SCALE_LOGS" && pwd
    } 2>&1); do
        rm_scale_wait_to_retry "$began" "$answer" ||
            rm_scale_fail "RM_SCALE_LOGS=$RM_SCALE_LOGS: can't be written below $PWD: $answer. Fix: make room there, or" \
                "name another folder on the shared disk, in slurm/site.env."
    done
    RM_SCALE_LOGS=$answer
    RM_SCALE_JOB_DIR=$RM_SCALE_LOGS/$SLURM_JOB_ID
    # shellcheck disable=SC2034 # read everywhere else
    RM_SCALE_ATTEMPT_DIR=$RM_SCALE_JOB_DIR/attempt-$RM_SCALE_ATTEMPT
}

# Waits before what has failed is tried again. Fails where it is not to be: for too long already, or in the first
# attempt, whose owner may still be looking. A later one must not give up a run of days for a disk that is full or away.
rm_scale_wait_to_retry() { # SINCE PROBLEM: when it was tried first, by SECONDS
    local passed=$((SECONDS - $1))
    ((RM_SCALE_ATTEMPT > 0 && passed < RM_SCALE_REQUEUE_SECONDS)) || return 1
    passed=$((passed < 1 ? 1 : passed > 30 ? 30 : passed)) # as long again: 1, 2, 4, ... s
    rm_scale_say "$2; tried again in $passed s" >&2
    sleep "$passed" || : # at the time limit Slurm ends it
}

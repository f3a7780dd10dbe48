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
rm_scale_show_job() { timeout 30 scontrol --oneliner show job "$RM_SCALE_JOB" 2>/dev/null || :; }

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
        >>"$RM_SCALE_JOB_DIR/events.jsonl" || : # a full disk must not end a job
}

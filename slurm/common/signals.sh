# shellcheck shell=bash
# The signals that Slurm sends this script, and how the ranks hear of them.

# The trap of USR1, which Slurm sends as --signal=B:USR1@GRACE asks, and of TERM; bash runs it between commands.
rm_scale_stop() { # USR1|TERM
    [[ -z $RM_SCALE_REQUEUED ]] || return 0 # Slurm ends this attempt
    if [[ $1 == TERM ]]; then rm_scale_come_back; fi
    [[ -z $RM_SCALE_STOP ]] || return 0
    if [[ $1 == USR1 ]] && rm_scale_is_too_early; then return 0; fi
    RM_SCALE_STOP=$1
    rm_scale_say "$1 received at $(date '+%F %T'): the run saves and stops"
    rm_scale_note signal signal "$1"
    rm_scale_tell_ranks
}

# At the time limit, and when a partition's PreemptMode is CANCEL, Slurm kills the job in a moment and does not start it
# again: it is asked to now, whether or not the ranks still save in time. What they saved before is enough to go on from,
# and training itself refuses a restart when three made no progress. After a scancel nothing is asked.
rm_scale_come_back() {
    local shown
    ((RM_SCALE_ATTEMPT < RM_SCALE_MAX_RESTARTS)) || return 0
    shown=$(rm_scale_show_job)
    [[ $shown == *" JobState=COMPLETING "* && $shown == *" Restarts=$RM_SCALE_ATTEMPT "* ]] || return 0
    if ! rm_scale_is_preempted "$shown"; then
        [[ $shown == *" Reason=TimeLimit "* ]] || return 0
        if rm_scale_is_stuck "$(rm_scale_idle_attempts)"; then return 0; fi
    fi
    if rm_scale_requeue; then rm_scale_note requeue; fi
}

# Does Slurm take this attempt's nodes for another job? PreemptTime alone does not say so: a job that was only suspended
# meanwhile (PreemptMode=SUSPEND,GANG) has one too, and so may one whose earlier attempt was preempted. As is_preempted
# in rm_scale/slurm/requeue.py has it.
rm_scale_is_preempted() { # SHOWN
    local at
    [[ $1 =~ \ PreemptTime=([0-9][^ ]*) ]] || return 1
    at=${BASH_REMATCH[1]} # such as 2026-11-30T23:31:21, which sorts by time
    if [[ $1 =~ \ StartTime=([0-9][^ ]*) && $at < ${BASH_REMATCH[1]} ]]; then return 1; fi
    # Slurm's SuspendTime is that of the last suspension, or of the resumption after it.
    if [[ $1 =~ \ SuspendTime=([0-9][^ ]*) && ! ${BASH_REMATCH[1]} < $at ]]; then return 1; fi
}

# A grace that is about as long as the limit has Slurm send its signal when the job has hardly begun, in each attempt
# anew. Where the limit is short, the first signal counts from the last quarter of it on; a second one at once.
rm_scale_is_too_early() {
    local limit left grace end
    end=$(rm_scale_known_end)
    if [[ -n $RM_SCALE_POSTPONED || -z $end ]]; then return 1; fi
    limit=$((end - RM_SCALE_START_TIME)) left=$((end - $(date +%s)))
    grace=$(rm_scale_grace)
    ((limit <= 2 * grace || (limit <= 7200 && limit - left < 90))) || return 1
    ((left > limit / 4 + 2)) || return 1
    RM_SCALE_POSTPONED=1
    rm_scale_say "USR1 came $left s before the limit of $limit s: training goes on until $((limit / 4)) s before it." \
        "A second USR1 stops it at once; --signal=B:USR1@$((limit / 4)) would have come then"
    (
        trap '' USR1
        rm_scale_sleep_until_due
        kill -USR1 $$
    ) &
    RM_SCALE_HELPERS+=" $!"
}

# Sleeps until the last quarter of the limit, wherever that is moved to meanwhile.
rm_scale_sleep_until_due() {
    local end left
    while end=$(rm_scale_known_end) && left=$((end - (end - RM_SCALE_START_TIME) / 4 - $(date +%s))) && ((left > 0)); do
        rm_scale_nap "$((left < RM_SCALE_LIMIT_SECONDS ? left : RM_SCALE_LIMIT_SECONDS))"
    done
}

# Seconds before the limit at which Slurm sends USR1, as the script's head has it.
rm_scale_grace() {
    local asked=${SBATCH_SIGNAL:-}
    [[ -n $asked ]] || asked=$(sed -n 's/^#SBATCH --signal=//p' "$0" 2>/dev/null || :)
    if [[ $asked =~ @([0-9]+)$ ]]; then echo "${BASH_REMATCH[1]}"; else echo 0; fi
}

# The signal that asks this attempt's ranks to stop, and no other attempt's: a request that is still on its way when an
# administrator has requeued the job must not stop the next one. As rm_scale.training.preemption.attempt_signal has it.
rm_scale_attempt_signal() { echo $((40 + RM_SCALE_ATTEMPT % 20)); }

# Through Slurm, to the tasks of every node. (kill -TERM on srun would kill the tasks; kill -USR1 on an srun that has
# not started them yet would kill srun.) Repeated, since a step that is just starting is not there to hear it.
rm_scale_tell_ranks() {
    [[ -n $RM_SCALE_SRUN_PID && -z $RM_SCALE_REPEATER ]] || return 0
    while kill -0 "$RM_SCALE_SRUN_PID" 2>/dev/null; do
        scancel --signal="$(rm_scale_attempt_signal)" "$RM_SCALE_JOB" 2>/dev/null || :
        sleep 10
    done &
    RM_SCALE_REPEATER=$!
}

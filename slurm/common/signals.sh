# shellcheck shell=bash
# The signals that Slurm sends this script, and how the ranks hear of them.

# The trap of USR1, which Slurm sends as --signal=B:USR1@GRACE asks, and of TERM; bash runs it between commands.
rm_scale_stop() {
    [[ -z $RM_SCALE_STOP ]] || return 0
    RM_SCALE_STOP=$1
    rm_scale_say "$1 received at $(date '+%F %T'): the run saves and stops"
    rm_scale_note signal signal "$1"
    rm_scale_tell_ranks
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

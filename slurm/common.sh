# shellcheck shell=bash
# What the job scripts share: sourced by slurm/rm_1b.sh and the others, inside a job, on its first node.
#
#   rm_scale_main HOME SETTINGS...    check the allocation, start one task per node, wait, exit or requeue
#   rm_scale_bench HOME OPTIONS...    benchmarks/throughput.py on this node, which starts a rm_scale_main for each case
#
# One attempt of a job: this script starts -> rm_scale.slurm.prepare (settings, plan, port) -> a check that all nodes
# answer -> one rm_scale.slurm.node per node, which starts the ranks -> rm_scale.slurm.requeue, which decides: exit with
# a code, or `scontrol requeue` and another attempt. The run's settings are not expanded by a shell: "$@" goes to prepare,
# which writes them into start.json, and nodes read them there.

RM_SCALE_REQUEUE=85 # exit code of ranks that have saved and stopped
RM_SCALE_NOTHING_TO_START=64 # exit code of rm_scale.slurm.prepare after --dry_run
RM_SCALE_PORT_TAKEN=86 # exit code of ranks and of the check where another program listens at their port
RM_SCALE_ASK_SLURM=65 # exit code of rm_scale.slurm.prepare where it can't ask Slurm, inside a container
RM_SCALE_TRY_AGAIN=75 # exit code of rm_scale.slurm.prepare where the operating system refused a file
RM_SCALE_REFUSED=2 # exit code after a message: it would be the same again
RM_SCALE_MAX_IDLE=3 # attempts in a row that may be stopped before training has begun

RM_SCALE_COMMON=$(dirname -- "${BASH_SOURCE[0]}")/common
# shellcheck source=slurm/common/records.sh
source "$RM_SCALE_COMMON/records.sh"
# shellcheck source=slurm/common/site.sh
source "$RM_SCALE_COMMON/site.sh"
# shellcheck source=slurm/common/software.sh
source "$RM_SCALE_COMMON/software.sh"
# shellcheck source=slurm/common/environment.sh
source "$RM_SCALE_COMMON/environment.sh"
# shellcheck source=slurm/common/signals.sh
source "$RM_SCALE_COMMON/signals.sh"
# shellcheck source=slurm/common/steps.sh
source "$RM_SCALE_COMMON/steps.sh"
# shellcheck source=slurm/common/end.sh
source "$RM_SCALE_COMMON/end.sh"

rm_scale_main() {
    set -euo pipefail
    RM_SCALE_HOME=$(cd -- "$1" && pwd)
    shift
    RM_SCALE_ATTEMPT=${SLURM_RESTART_COUNT:-0}
    RM_SCALE_JOB=$(rm_scale_job)
    RM_SCALE_STOP='' RM_SCALE_SRUN_PID='' RM_SCALE_REPEATER='' RM_SCALE_REQUEUED='' RM_SCALE_POSTPONED=''
    RM_SCALE_PORTS_TRIED=0 RM_SCALE_HELPERS=''
    unset RM_SCALE_END_TIME RM_SCALE_END_TIME_FILE # of a job that has submitted this one
    export RM_SCALE_HOME RM_SCALE_TIER RM_SCALE_CONFIG RM_SCALE_PORTS_TRIED
    rm_scale_load_site
    RM_SCALE_JOB_DIR=$RM_SCALE_LOGS/$SLURM_JOB_ID
    RM_SCALE_ATTEMPT_DIR=$RM_SCALE_JOB_DIR/attempt-$RM_SCALE_ATTEMPT
    trap 'rm_scale_stop USR1' USR1
    trap 'rm_scale_stop TERM' TERM
    trap rm_scale_end_helpers EXIT
    rm_scale_make_folder
    rm_scale_note attempt
    rm_scale_environment
    rm_scale_watch_limit
    rm_scale_modules
    rm_scale_python
    rm_scale_unpack

    while :; do
        rm_scale_prepare "$@"
        rm_scale_note start
        if [[ -n $RM_SCALE_STOP ]]; then rm_scale_end none; fi # the signal came before there was anything to save
        rm_scale_train
        rm_scale_end "$RM_SCALE_CODE" # returns when another port is to be tried
        RM_SCALE_PORTS_TRIED=$((RM_SCALE_PORTS_TRIED + 1))
    done
}

rm_scale_bench() {
    set -euo pipefail
    RM_SCALE_HOME=$(cd -- "$1" && pwd)
    shift
    export RM_SCALE_HOME
    rm_scale_load_site
    [[ -z $RM_SCALE_CONTAINER ]] ||
        rm_scale_fail "RM_SCALE_CONTAINER is set, and srun can't be called inside one. Fix: a venv for benchmarks."
    [[ -f $RM_SCALE_HOME/benchmarks/throughput.py ]] ||
        rm_scale_fail "$RM_SCALE_HOME/benchmarks is not there. Fix: submit from a checkout of the repository."
    rm_scale_modules
    rm_scale_python
    exec "${RM_SCALE_PYTHON[@]}" "$RM_SCALE_HOME/benchmarks/throughput.py" --launcher slurm "$@"
}

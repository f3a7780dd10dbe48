# shellcheck shell=bash
# What becomes of the job when its ranks have ended: an exit code, or another attempt.

# Ends the script as rm_scale.slurm.requeue decides: with an exit code, or by handing the job back to Slurm. Returns when
# the ranks are to be started once more in this attempt.
rm_scale_end() { # SRUN_CODE, or none when no rank was started
    local answer action=requeue code=$1 node='' left_out='' idle
    if [[ -n $RM_SCALE_REQUEUED ]]; then rm_scale_wait_for_slurm; fi
    idle=$(rm_scale_idle_attempts)
    # What a site's own messages add before and after it does not count.
    answer=$(
        trap '' USR1 TERM # at the time limit Slurm signals every process, and this one must finish
        rm_scale_here -m rm_scale.slurm.requeue "$RM_SCALE_ATTEMPT_DIR" --srun_code "$1" --job "$(rm_scale_show_job)" \
            --restarts "$RM_SCALE_ATTEMPT" --max_restarts "$RM_SCALE_MAX_RESTARTS" --retries "$RM_SCALE_RETRIES" \
            --ports_tried "$RM_SCALE_PORTS_TRIED" --idle "$idle" |
            grep -E '^(exit|requeue|again) [0-9]+( [^ ]+)?$' | tail -n 1
    ) || :
    if [[ -n $answer ]]; then
        read -r action code node <<<"$answer"
    else
        # A job that has saved must come back also where Python can't be started any more.
        rm_scale_say "rm_scale.slurm.requeue did not answer: srun's exit code decides" >&2
        # shellcheck disable=SC2153 # a constant of slurm/common.sh
        [[ $code != none ]] || code=$RM_SCALE_REQUEUE
        if ((code != RM_SCALE_REQUEUE || RM_SCALE_ATTEMPT >= RM_SCALE_MAX_RESTARTS)); then rm_scale_exit "$code"; fi
        if rm_scale_is_stuck "$idle"; then rm_scale_exit "$RM_SCALE_REFUSED"; fi
    fi
    if [[ $action == again ]]; then return 0; fi
    if [[ $action == requeue ]]; then
        [[ -z $node ]] || left_out=$(rm_scale_left_out "$node")
        if rm_scale_requeue; then
            # Only a pending job can be told. Slurm ends this script in seconds, and its TERM would end scontrol at once.
            trap '' USR1 TERM
            [[ -z $left_out ]] || scontrol update "JobId=$RM_SCALE_JOB" "ExcNodeList=$left_out" || :
            rm_scale_wait_for_slurm
        fi
        rm_scale_say "the job was not requeued. Its checkpoints are whole: submit the same command again to go on"
    fi
    exit "$code"
}

# Asks Slurm to start the job again, for some minutes where Slurm does not answer; fails where it refuses: asking again
# would only hold the nodes. An answer that is not known counts as none: a controller that is being started has many.
rm_scale_requeue() {
    local answer pause=1 until=$((SECONDS + RM_SCALE_REQUEUE_SECONDS))
    until answer=$(timeout 60 scontrol requeue "$RM_SCALE_JOB" 2>&1); do
        case $answer in
            *"is pending execution"*) # it was asked before, and the answer was lost
                break
                ;;
            *disabled* | *[Pp]ermission* | *denied* | *"ot permitted"* | *"Only batch jobs"* | *heterogeneous* | \
                *"Invalid job id"* | *"Invalid user"*)
                rm_scale_say "Slurm refuses to requeue: $answer" >&2
                return 1
                ;;
        esac
        if ((SECONDS >= until)); then
            rm_scale_say "Slurm did not requeue within $RM_SCALE_REQUEUE_SECONDS s: $answer" >&2
            return 1
        fi
        rm_scale_say "not requeued yet: $answer; asked again in $pause s"
        sleep "$pause" || :
        pause=$((pause < 16 ? 2 * pause : 30))
    done
    RM_SCALE_REQUEUED=1
    rm_scale_say "requeued; attempt $((RM_SCALE_ATTEMPT + 1)) goes on from the last checkpoint"
}

# Prints how many attempts in a row, this one too, were stopped before training began: 0 when it has. Training itself
# refuses a restart when three made no progress, but knows only of those that it has begun. Attempts that were preempted,
# or whose node was lost, count neither way.
rm_scale_idle_attempts() {
    local attempt count=1
    if [[ -e $RM_SCALE_ATTEMPT_DIR/begun ]]; then
        echo 0
        return
    fi
    for ((attempt = RM_SCALE_ATTEMPT - 1; attempt >= 0 && count < RM_SCALE_MAX_IDLE; attempt--)); do
        [[ ! -e $RM_SCALE_JOB_DIR/attempt-$attempt/begun ]] || break
        ! grep -qs "^{\"event\": \"idle\", .*\"attempt\": $attempt," "$RM_SCALE_JOB_DIR/events.jsonl" ||
            count=$((count + 1))
    done
    echo "$count"
}

# Notes an attempt that has not begun; succeeds, and says why, where it is one too many.
rm_scale_is_stuck() { # IDLE_ATTEMPTS
    (($1 > 0)) || return 1
    rm_scale_note idle
    (($1 >= RM_SCALE_MAX_IDLE)) || return 1
    rm_scale_say "the last $1 attempts were stopped before training began, so the job is not requeued. Fix: see in" \
        "$RM_SCALE_ATTEMPT_DIR and above where the start hangs, or ask for more time; then submit the same command again" >&2
}

# Ends the script where the ranks could not be started: with a code, or by another attempt where the site allows retries
# and an earlier attempt could be started.
rm_scale_not_started() { # CODE
    local shown used
    shown=$(rm_scale_show_job)
    # Slurm's signals end what runs on the nodes: that it failed is then no news.
    if [[ -n $RM_SCALE_STOP$RM_SCALE_REQUEUED ]] || rm_scale_is_preempted "$shown"; then rm_scale_end none; fi
    used=$(grep -cs '"event": "retry"' "$RM_SCALE_JOB_DIR/events.jsonl" || :)
    if ((RM_SCALE_ATTEMPT > 0 && RM_SCALE_ATTEMPT < RM_SCALE_MAX_RESTARTS && ${used:-0} < RM_SCALE_RETRIES)) &&
        [[ -z $shown || $shown == *" JobState=RUNNING "* ]]; then
        rm_scale_say "this attempt could not be started: retried ($((RM_SCALE_RETRIES - ${used:-0})) of RM_SCALE_RETRIES" \
            "left)" >&2
        rm_scale_note retry
        if rm_scale_requeue; then
            rm_scale_note requeue
            trap '' USR1 TERM
            rm_scale_wait_for_slurm
        fi
    fi
    rm_scale_exit "$1"
}

# Slurm ends this script; a normal end would make the job COMPLETED.
rm_scale_wait_for_slurm() {
    sleep 300
    exit "$RM_SCALE_REQUEUE"
}

# Prints the nodes that the job's next attempts are to keep off, with one more; nothing where what is left might not do for
# the job. Only nodes like the one that failed are known to have what the job asks for: of the same GPUs, features, cores
# and memory, neither drained nor down, nor kept for others.
rm_scale_left_out() { # NODE
    local shown nodes name state kind like='' left='' among="the nodes like it"
    shown=$(rm_scale_show_job)
    nodes=$(sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' <<<"$shown")
    nodes=${nodes/(null)/}
    nodes=$(scontrol show hostnames "${nodes:+$nodes,}$1" | sort -u | paste -sd,)
    while IFS='|' read -r name state kind; do
        [[ $name != "$1" ]] || like=$kind
        if [[ $state =~ ^(idle|alloc|allocated|mix|comp|plnd)[-+~#%]?$ && ,$nodes, != *",$name,"* ]]; then
            left+="$kind"$'\n'
        fi
    done < <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N|%t|%G|%f|%b|%c|%m' 2>/dev/null | sort -u)
    left=$(grep -cxF -- "$like" <<<"$left" || :)
    if [[ $shown != *" ReqNodeList=(null) "* || $shown == *" Reservation="[!\ \(]* ]]; then
        left=0 among="the nodes or the reservation that the job names"
    fi
    if [[ -z $like ]] || ((left < SLURM_JOB_NUM_NODES)); then
        rm_scale_say "$1 is not left out: of $among no $SLURM_JOB_NUM_NODES others can be had" >&2
    else
        rm_scale_say "$1 is left out of the next attempts" >&2
        echo "$nodes"
    fi
}

rm_scale_exit() { # CODE
    [[ -z $RM_SCALE_REQUEUED ]] || rm_scale_wait_for_slurm
    rm_scale_note end code "$1"
    exit "$1"
}

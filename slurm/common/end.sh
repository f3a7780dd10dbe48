# shellcheck shell=bash
# What becomes of the job when its ranks have ended: an exit code, or another attempt.

# Ends the script as rm_scale.slurm.requeue decides: with an exit code, or by handing the job back to Slurm. Returns when
# the ranks are to be started once more in this attempt.
rm_scale_end() { # SRUN_CODE, or none when no rank was started
    local answer action code node left_out=''
    if [[ -n $RM_SCALE_REQUEUED ]]; then rm_scale_wait_for_slurm; fi
    answer=$(
        trap '' USR1 TERM # at the time limit Slurm signals every process, and this one must finish
        rm_scale_here -m rm_scale.slurm.requeue "$RM_SCALE_ATTEMPT_DIR" --srun_code "$1" --job "$(rm_scale_show_job)" \
            --restarts "$RM_SCALE_ATTEMPT" --max_restarts "$RM_SCALE_MAX_RESTARTS" --retries "$RM_SCALE_RETRIES" \
            --ports_tried "$RM_SCALE_PORTS_TRIED" --end_time "${RM_SCALE_END_TIME:-}" | tail -n 1
    ) || :
    read -r action code node <<<"$answer"
    if [[ ! "$action $code" =~ ^(exit|requeue|again)\ [0-9]+$ ]]; then
        # A job that has saved must come back also where Python can't be started any more.
        rm_scale_say "rm_scale.slurm.requeue did not answer: srun's exit code decides" >&2
        code=$1 action=requeue
        # shellcheck disable=SC2153 # a constant of slurm/common.sh
        [[ $code != none ]] || code=$RM_SCALE_REQUEUE
        if ((code != RM_SCALE_REQUEUE || RM_SCALE_ATTEMPT >= RM_SCALE_MAX_RESTARTS)); then rm_scale_exit "$code"; fi
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

# Asks Slurm to start the job again, for some minutes where Slurm does not answer; fails where it refuses.
rm_scale_requeue() {
    local answer pause=1 until=$((SECONDS + RM_SCALE_REQUEUE_SECONDS))
    until answer=$(timeout 60 scontrol requeue "$RM_SCALE_JOB" 2>&1); do
        case $answer in
            *"is pending execution"*) # it was asked before, and the answer was lost
                break
                ;;
            *disabled* | *permission* | *Permission* | *denied* | *"Invalid job id"*)
                rm_scale_say "Slurm refuses to requeue: $answer" >&2
                return 1
                ;;
        esac
        if ((SECONDS >= until)); then
            rm_scale_say "Slurm did not requeue within $RM_SCALE_REQUEUE_SECONDS s: $answer" >&2
            return 1
        fi
        rm_scale_say "not requeued yet: $answer; asked again in $pause s"
        sleep "$pause"
        pause=$((pause < 16 ? 2 * pause : 30))
    done
    RM_SCALE_REQUEUED=1
    rm_scale_say "requeued; attempt $((RM_SCALE_ATTEMPT + 1)) goes on from the last checkpoint"
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
    rm_scale_note end code "$1"
    exit "$1"
}

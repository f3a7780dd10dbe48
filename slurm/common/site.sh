# shellcheck shell=bash
# What a site says of itself: slurm/site.env and its kin, read and checked.

rm_scale_load_site() {
    local file
    for file in "${RM_SCALE_SITE_ENV:-}" "$RM_SCALE_HOME/slurm/site.local.env" "$RM_SCALE_HOME/slurm/site.env"; do
        if [[ -f $file ]]; then
            # shellcheck source=slurm/site.env
            source "$file"
        fi
    done
    export RM_SCALE_DEVICE RM_SCALE_RANKS_PER_NODE RM_SCALE_GPU RM_SCALE_INTERFACE RM_SCALE_RESUME
    export RM_SCALE_CHECK_SECONDS RM_SCALE_KILL_SECONDS RM_SCALE_SWEEP="${RM_SCALE_SWEEP:-}"
    [[ $RM_SCALE_MAX_RESTARTS =~ ^[0-9]+$ ]] ||
        rm_scale_fail "RM_SCALE_MAX_RESTARTS=$RM_SCALE_MAX_RESTARTS: must be a whole number. Fix: correct site.env."
}

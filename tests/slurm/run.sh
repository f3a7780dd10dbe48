#!/usr/bin/env bash
# Run the Slurm tests:  tests/slurm/run.sh PYTEST_COMMAND...
#
# RM_SCALE_SLURM_CLUSTER names the cluster: the folder of one that cluster.sh made, or any other word for the one
# that sbatch on PATH belongs to. Unset, clusters of 4 nodes are made here and taken down again, whatever happens: two,
# whose tests run side by side, since much of their time is waiting for Slurm to notice something.
set -euo pipefail
side_by_side=()

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${RM_SCALE_SLURM_CLUSTER:-} ]]; then
    if ! "$here/cluster.sh" can; then
        echo "ERROR: no Slurm cluster can be made here (see above), and RM_SCALE_SLURM_CLUSTER is not set." >&2
        echo "  Fix: RM_SCALE_SLURM_CLUSTER=NAME make test-slurm   on a machine where sbatch works" >&2
        exit 2
    fi
    export SLURM_CLUSTER_EXTRA=$here/partitions.conf
    clusters=()
    trap 'for folder in "${clusters[@]}"; do SLURM_CLUSTER_DIR=$folder "$here/cluster.sh" down && rm -rf "$folder"; done' EXIT
    for _ in 1 2; do
        # A path of its own, so that it stands beside any other; short, since Slurm's sockets lie under it.
        folder=$(mktemp -d /tmp/rms.XXXXXX)
        chmod 755 "$folder" # munge has a user of its own
        clusters+=("$folder")
        SLURM_CLUSTER_DIR=$folder "$here/cluster.sh" up 4
    done
    export RM_SCALE_SLURM_CLUSTER="${clusters[*]}"
    side_by_side=(-n "${#clusters[@]}" --dist loadfile)
fi
"$@" "${side_by_side[@]}" -m slurm tests/slurm

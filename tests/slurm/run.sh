#!/usr/bin/env bash
# Run the Slurm tests:  tests/slurm/run.sh PYTEST_COMMAND...
#
# RM_SCALE_SLURM_CLUSTER names the cluster: the folder of one that cluster.sh made, or any other word for the one
# that sbatch on PATH belongs to. Unset, a cluster of 4 nodes is made here and taken down again, whatever happens.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${RM_SCALE_SLURM_CLUSTER:-} ]]; then
    if ! "$here/cluster.sh" can; then
        echo "ERROR: no Slurm cluster can be made here (see above), and RM_SCALE_SLURM_CLUSTER is not set." >&2
        echo "  Fix: RM_SCALE_SLURM_CLUSTER=NAME make test-slurm   on a machine where sbatch works" >&2
        exit 2
    fi
    # A path of its own, so that it stands beside any other; short, since Slurm's sockets lie under it.
    SLURM_CLUSTER_DIR=$(mktemp -d /tmp/rms.XXXXXX)
    chmod 755 "$SLURM_CLUSTER_DIR" # munge has a user of its own
    export SLURM_CLUSTER_DIR SLURM_CLUSTER_EXTRA=$here/partitions.conf
    trap '"$here/cluster.sh" down && rm -rf "$SLURM_CLUSTER_DIR"' EXIT
    "$here/cluster.sh" up 4
    export RM_SCALE_SLURM_CLUSTER=$SLURM_CLUSTER_DIR
fi
"$@" -m slurm tests/slurm

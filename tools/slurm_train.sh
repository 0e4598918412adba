#!/usr/bin/env bash
# Train under Slurm.
#
#   [NNODES=1] [GPUS_PER_NODE=8] [CPUS_PER_GPU=5] [SRUN_ARGS=...] \
#       tools/slurm_train.sh PARTITION JOB CONFIG WORK_DIR [arguments of tools/train.py]
#
# Slurm starts one task per node; there torchrun starts one process per GPU (tools/dist_train.sh), as
# outside of Slurm. GPUS_PER_NODE=0 asks for no GPU and starts CPUS_PER_GPU processes on the CPU.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB CONFIG WORK_DIR [arguments of tools/train.py]" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NNODES=${NNODES:-1}
gpus=${GPUS_PER_NODE:-8}
cpus=${CPUS_PER_GPU:-5}
# one port for all nodes, other jobs on these nodes most likely have another
export PORT=${PORT:-$((29500 + RANDOM % 1000))}

resources=(--cpus-per-task=$((gpus > 0 ? gpus * cpus : cpus)))
processes=$cpus
if [ "$gpus" -gt 0 ]; then
    resources+=(--gres="gpu:$gpus")
    processes=$gpus
fi

# each task finds its number, and the first node, in what Slurm gives it
# shellcheck disable=SC2016,SC2086
srun --partition="$partition" --job-name="$job" --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 \
    --kill-on-bad-exit=1 "${resources[@]}" ${SRUN_ARGS:-} \
    bash -c '
        export NODE_RANK=$SLURM_NODEID
        export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        exec "$@"
    ' node "$here/dist_train.sh" "$config" "$processes" --work-dir "$work_dir" "$@"

#!/usr/bin/env bash
# Train with several processes, one per GPU (on a machine without GPUs: that many CPU processes).
#
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
#
# Several nodes: run the same line on each with NNODES, NODE_RANK and MASTER_ADDR set, and one PORT.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [arguments of tools/train.py]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/launch.sh"
launch "$2" "$here/train.py" "$1" "${@:3}"

#!/usr/bin/env bash
# Evaluate a checkpoint with several processes, one per GPU (without GPUs: that many CPU processes).
#
#   tools/dist_test.sh CONFIG CKPT GPUS [arguments of tools/test.py]
#
# Several nodes: run the same line on each with NNODES, NODE_RANK and MASTER_ADDR set, and one PORT.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CKPT GPUS [arguments of tools/test.py]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/launch.sh"
launch "$3" "$here/test.py" "$1" "$2" "${@:4}"

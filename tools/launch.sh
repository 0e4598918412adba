# Sourced by dist_train.sh and dist_test.sh: start one process per GPU with torchrun.
#
#   launch PROCESSES SCRIPT [arguments of the script]

# PYTHON if set, else the clone's own environment, else whatever python is on the path
find_python() {
    local own="$here/../.venv/bin/python"
    if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; elif [ -x "$own" ]; then echo "$own"; else echo python; fi
}

# a free port, so that two runs on one machine do not meet; several nodes must agree on one
find_port() {
    if [ -n "${PORT:-}" ]; then
        echo "$PORT"
    elif [ "${NNODES:-1}" -gt 1 ]; then
        echo 29500
    else
        "$1" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
    fi
}

launch() {
    local processes=$1 script=$2
    shift 2
    local python port
    python=$(find_python)
    port=$(find_port "$python")
    if [ -z "${OMP_NUM_THREADS:-}" ] && [ "$("$python" -c 'import torch; print(torch.cuda.is_available())')" = False ]; then
        # torchrun would give each process one thread; on a CPU they share evenly the cores that others leave
        local threads
        threads=$("$python" -I "$here/../mmdet_norms/cores.py" "$processes")
        export OMP_NUM_THREADS=$threads MMDET_NORMS_THREADS_MEASURED=1
        export MKL_NUM_THREADS=$OMP_NUM_THREADS
    fi
    exec "$python" "$here/launch.py" \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="$port" \
        --nproc_per_node="$processes" \
        "$script" "$@" --launcher pytorch
}

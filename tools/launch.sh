# What the four start scripts beside this one share; they source it.
# shellcheck shell=bash
set -euo pipefail

# shellcheck disable=SC2034  # the scripts use it
TOOLS=$(dirname "${BASH_SOURCE[0]}")
PYTHON=${PYTHON:-python}

# Prints the comment at the top of the script that was called.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

stop() {
    echo "error: $1" >&2
    exit 1
}

# need COUNT "$@": that many arguments ahead of those that are passed on.
need() {
    local count=$1
    shift
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        usage
        exit 0
    fi
    if (($# < count)); then
        usage >&2
        stop "$(basename "$0") takes at least $count arguments, got $#"
    fi
}

need_file() {
    [[ -f $2 ]] || stop "$1: no such file: $2"
}

need_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || stop "$1 must be a positive number, got '$2'"
}

# with_torchrun GPUS PROGRAM ARGS...: a process for each GPU of this node.
with_torchrun() {
    local gpus=$1 nodes=${NNODES:-1} place
    need_number GPUS "$gpus"
    need_number NNODES "$nodes"
    if ((nodes == 1)); then
        place=(--standalone)  # on a free port
    else
        [[ -n ${MASTER_ADDR:-} ]] || stop "MASTER_ADDR must be the address of node 0, as NNODES=$nodes"
        [[ ${NODE_RANK:-} =~ ^[0-9]+$ && ${NODE_RANK:-} -lt $nodes ]] \
            || stop "NODE_RANK must be a number from 0 to $((nodes - 1)), as NNODES=$nodes, got '${NODE_RANK:-}'"
        need_number PORT "${PORT:-29500}"
        place=(--nnodes="$nodes" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${PORT:-29500}")
    fi
    shift
    exec "$PYTHON" -m torch.distributed.run "${place[@]}" --nproc_per_node="$gpus" "$@"
}

# with_srun PARTITION JOB_NAME PROGRAM ARGS...: a task for each GPU.
with_srun() {
    local gpus=${GPUS:-8} per_node cpus=${CPUS_PER_TASK:-8} more
    need_number GPUS "$gpus"
    per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    need_number GPUS_PER_NODE "$per_node"
    need_number CPUS_PER_TASK "$cpus"
    read -ra more <<< "${SRUN_ARGS:-}"
    # Jobs that share a node must not share a port; these are below those that the system gives out.
    export MASTER_PORT=${PORT:-$((20000 + RANDOM % 10000))}
    need_number PORT "$MASTER_PORT"
    exec srun --partition="$1" --job-name="$2" --gres="gpu:$per_node" --ntasks="$gpus" \
        --ntasks-per-node="$per_node" --cpus-per-task="$cpus" --kill-on-bad-exit=1 ${more[@]+"${more[@]}"} \
        "$PYTHON" -u "${@:3}"
}

#!/usr/bin/env bash
# usage: dist_train.sh CONFIG GPUS [arguments of train.py]
#
# Train on GPUS GPUs of this machine. On several machines run it on each, with NNODES (how many), NODE_RANK (0, 1, ...)
# and MASTER_ADDR (of number 0) in the environment, and PORT if 29500 is taken there.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"
need 2 "$@"
need_file CONFIG "$1"
with_torchrun "$2" "$TOOLS/train.py" "$1" --launcher pytorch "${@:3}"

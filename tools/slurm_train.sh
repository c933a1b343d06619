#!/usr/bin/env bash
# usage: slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]
#
# Train by Slurm. In the environment: GPUS (all of them, default 8), GPUS_PER_NODE (8, or GPUS if that is less),
# CPUS_PER_TASK (8), SRUN_ARGS (more arguments of srun, split at blanks), PORT (default: one at random).
# A job that was stopped and is started again goes on from its latest checkpoint.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"
need 3 "$@"
need_file CONFIG "$3"
# Without a checkpoint --resume starts anew.
with_srun "$1" "$2" "$TOOLS/train.py" "$3" --launcher slurm --resume "${@:4}"

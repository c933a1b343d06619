#!/usr/bin/env bash
# usage: slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
#
# Evaluate by Slurm; the environment is that of slurm_train.sh.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"
need 4 "$@"
need_file CONFIG "$3"
need_file CHECKPOINT "$4"
with_srun "$1" "$2" "$TOOLS/test.py" "$3" "$4" --launcher slurm "${@:5}"

#!/usr/bin/env bash
# usage: dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
#
# Evaluate on GPUS GPUs of this machine; for several machines see dist_train.sh.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/launch.sh"
need 3 "$@"
need_file CONFIG "$1"
need_file CHECKPOINT "$2"
with_torchrun "$3" "$TOOLS/test.py" "$1" "$2" --launcher pytorch "${@:4}"

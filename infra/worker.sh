#!/bin/sh
# A Prefect process worker in a container, whose trials save their state when it is stopped: `worker.sh control` without a limit, `worker.sh gpu` with one trial per visible GPU.
set -eu
pool=$1
set -- --pool "$pool" --type process --with-healthcheck --install-policy never --base-job-template deployments/pools/process.json
if [ "$pool" = gpu ]; then
    gpus=$(python -c 'from stockpot.devices import gpu_count; print(gpu_count())')
    [ "$gpus" -gt 0 ] || echo "No GPU is visible in this container; trials run on the processor, one at a time." >&2
    [ "$gpus" -gt 0 ] || gpus=1
    set -- "$@" --limit "$gpus"
fi
exec python -m deployments.worker "$@"

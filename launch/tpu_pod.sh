#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or many hosts: creates it, installs diffax on every host, runs the same command on
# all of them, and after a preemption creates the slice anew and goes on. Needs gcloud, logged in, with a project.
#
#   bash launch/tpu_pod.sh                     the two lines below
#   bash launch/tpu_pod.sh --config.base.train.accumulate=8 ...    more flags of diffax.main
#   bash launch/tpu_pod.sh delete              gives the slice back
#
# The workdir is a folder of the bucket, mounted on every host with gcsfuse. Not tried on Cloud TPU yet.
# Try first, without a TPU, whether it fits: python -m diffax.main --mode=compile --topology=v5e:4x4 --config=...
set -euo pipefail

# ---- edit these two lines -------------------------------------------------------------------------------------------
ZONE=us-central1-a ACCELERATOR=v5litepod-16 NAME=diffax-$USER BUCKET=my-bucket
ARGUMENTS=(--config=adm_imagenet_64 --stage=base --config.base.net.dtype=bfloat16 --config.base.net.remat=blocks)
# ---------------------------------------------------------------------------------------------------------------------

VERSION=${VERSION:-}   # the TPU software version; chosen by the accelerator if empty
SPOT=${SPOT-"--spot"}  # SPOT= for a slice that is not preempted
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WORKDIR=/mnt/diffax/runs # the bucket, mounted on every host

if [ -z "$VERSION" ]; then
  case $ACCELERATOR in
    v6e*) VERSION=v2-alpha-tpuv6e ;;
    v5p*) VERSION=v2-alpha-tpuv5 ;;
    v5lite*) VERSION=v2-alpha-tpuv5-lite ;;
    *) VERSION=tpu-ubuntu2204-base ;;
  esac
fi

tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" "--zone=$ZONE" "${@:2}"; }
everywhere() { tpu ssh --worker=all "--command=$1"; }
state() { tpu describe '--format=value(state)' 2>/dev/null || echo ABSENT; }

if [ "${1:-}" = delete ]; then
  tpu delete --quiet
  exit
fi

create() {
  local now
  now=$(state)
  case $now in
    READY) return ;;
    ABSENT) ;;
    *)
      echo "diffax: the slice is $now; it is deleted and created anew"
      tpu delete --quiet || true
      ;;
  esac
  # shellcheck disable=SC2086
  until tpu create "--accelerator-type=$ACCELERATOR" "--version=$VERSION" $SPOT; do
    echo "diffax: no slice to be had; trying again in two minutes"
    sleep 120
  done
}

install() {
  tar -C "$root" --exclude='./.*' --exclude=./runs --exclude=__pycache__ -czf "/tmp/$NAME.tar.gz" .
  gcloud compute tpus tpu-vm scp "/tmp/$NAME.tar.gz" "$NAME:/tmp/diffax.tar.gz" --worker=all "--zone=$ZONE" || return
  everywhere "set -e
    mkdir -p ~/diffax && tar -C ~/diffax -xzf /tmp/diffax.tar.gz
    command -v python3.11 >/dev/null || sudo apt-get -qy install python3.11 python3.11-venv
    command -v gcsfuse >/dev/null || sudo apt-get -qy install gcsfuse
    sudo mkdir -p /mnt/diffax && sudo chown \$USER /mnt/diffax
    mountpoint -q /mnt/diffax || gcsfuse --implicit-dirs $BUCKET /mnt/diffax
    source ~/diffax/launch/setup_env.sh
    setup_env tpu"
}

command=$(printf '%q ' "${ARGUMENTS[@]}" "$@")
while true; do
  code=0
  create
  # On Cloud TPU the processes find each other: --coordinator=auto.
  install && everywhere "cd ~/diffax && .venv/bin/python -m diffax.main --workdir=$WORKDIR/$NAME --coordinator=auto $command" ||
    code=$?
  [ "$code" -ne 0 ] || break
  now=$(state)
  # 75: stopped by a signal, and saved. 255 is ssh's own: the host is gone.
  if [ "$now" = READY ] && [ "$code" -ne 75 ] && [ "$code" -ne 255 ]; then
    echo "diffax: the run failed with $code on a healthy slice; not tried again" >&2
    exit "$code"
  fi
  echo "diffax: stopped with $code, the slice is $now; going on from the last checkpoint"
done
echo "diffax: done, in gs://$BUCKET/runs/$NAME; bash launch/tpu_pod.sh delete gives the slice back"

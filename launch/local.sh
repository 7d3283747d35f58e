#!/usr/bin/env bash
# Runs a config as two processes on this machine: what several hosts do, tried on one.
#
#   bash launch/local.sh --config=quickstart --workdir=runs/two [--config.base.train.num_train_steps=100] ...
#
#   PROCESSES=4   how many; their devices share the cores (each has one CPU device unless XLA_FLAGS says otherwise)
#   PYTHON=...    another Python than the one of the environment that this makes
set -euo pipefail

PROCESSES=${PROCESSES:-2}

if [ -z "${PYTHON:-}" ]; then
  source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
  setup_env demo
  PYTHON=$venv/bin/python
fi
export XLA_FLAGS=${XLA_FLAGS:---xla_force_host_platform_device_count=1}
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')

jobs=()
for ((i = 0; i < PROCESSES; i++)); do
  # -P: a folder named diffax in the current one is not the package.
  "$PYTHON" -P -m diffax.main "$@" --coordinator="localhost:$port" --processes="$PROCESSES" --process="$i" &
  jobs+=($!)
done
# A signal goes on to all of them, so that they save and stop together; one that fails ends the others.
stopping=
trap 'stopping=1; kill -TERM "${jobs[@]}" 2>/dev/null || true' TERM INT
status=0
while true; do
  code=0
  wait -n || code=$?
  [ "$code" -ne 127 ] || break # none is left
  [ -z "$stopping" ] || [ "$code" -lt 128 ] || continue
  if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
    status=$code
    [ "$code" -eq 75 ] || kill "${jobs[@]}" 2>/dev/null || true
  fi
done
exit "$status"

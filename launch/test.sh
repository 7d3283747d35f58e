#!/usr/bin/env bash
# The checks that a change must pass: ruff, then pytest on the CPU. Arguments go to pytest.
#
#   bash launch/test.sh [tests/diffusion/samplers_test.py] [-k ddim] ...
#   bash launch/test.sh -m ""    all tests: by default those marked slow, which repeat on a larger scale or in another mode
#                                what others test, are left out and counted as deselected
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env dev,demo,log

cd "$root"
"$venv/bin/python" -m ruff check
"$venv/bin/python" -m ruff format --check
export JAX_PLATFORMS=cpu
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile -q --color=no -m "not slow" "$@"

#!/usr/bin/env bash
# Trains a small class-conditional diffusion model on handwritten digits and draws some: minutes on
# a CPU. Needs Python 3.11. Runs again from where it stopped.
#
#   bash launch/quickstart.sh [--workdir=FOLDER] [--config.base.train.num_train_steps=500] ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env demo

workdir=$root/runs/quickstart
previous=
for argument in "$@"; do
  case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    *) [ "$previous" != --workdir ] || workdir=$argument ;;
  esac
  previous=$argument
done
case $workdir in /*) ;; *) workdir=$PWD/$workdir ;; esac

# Large pages for the allocator (Linux): a train step on a CPU takes a tenth less.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
# -P: a folder named diffax in the current one is not the package.
main=("$venv/bin/python" -P -m diffax.main "--config=$root/configs/quickstart.py" "$@")
"${main[@]}" "--workdir=$workdir"
"${main[@]}" "--workdir=$workdir" --mode=evaluate

diffax=$(printf %q "$venv/bin/diffax")
cat <<END

The digits are in $workdir/samples.png
Next, try:
  $diffax --config=quickstart --workdir=$(printf %q "$workdir") --mode=sample --config.sample.seed=1
  $diffax --config=ddpm_cifar10:tiny --workdir=runs/ddpm_tiny
  $diffax --config=iddpm_cifar10:vlb,tiny --workdir=runs/iddpm_tiny
  $diffax --help
END

# Sourced by the other scripts: makes the virtual environment and installs diffax into it, once.
#
#   setup_env EXTRAS     e.g. setup_env demo; then $root, $venv and $venv/bin/python are there
#   DIFFAX_VENV=FOLDER   where the environment lives; .venv in the repository by default

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DIFFAX_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

die() {
  echo "diffax: error: $1" >&2
  exit 2
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

make_venv() {
  local candidate python=
  for candidate in python3.13 python3.12 python3.11 python3; do
    if is_recent "$candidate"; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || die "Python 3.11 or newer is needed; looked for python3.13, python3.12, python3.11 and python3; install one of them"
  "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    die "$python has no module venv; install it; on Debian or Ubuntu: apt install $python-venv"
  echo "diffax: making the environment $venv"
  "$python" -m venv "$venv" || die "cannot make the environment $venv; set DIFFAX_VENV to another folder"
}

setup_env() {
  local extras=$1 stamp
  if [ ! -e "$venv" ]; then
    make_venv
  elif [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv is no virtual environment; remove it or set DIFFAX_VENV to another folder"
  elif ! is_recent "$venv/bin/python"; then
    die "$venv has no working Python 3.11 or newer; remove it and run this again"
  fi
  # What is installed follows from these; an editable install also from where the repository is.
  stamp=$(cat "$root/setup.cfg" "$root/pyproject.toml" - <<<"$root $extras" | cksum | tr ' ' -)
  stamp=$venv/.diffax-$extras-$stamp
  if [ ! -e "$stamp" ]; then
    echo "diffax: installing into $venv (a few minutes, once)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "${root}[$extras]" ||
      die "the installation into $venv failed; the reason is above; run this again"
    touch "$stamp"
  fi
}

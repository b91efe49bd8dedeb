#!/usr/bin/env bash
# Makes the virtual environment that the Makefile uses.
#
#   PYTHON=python3 dev/setup_env.sh VENV [LOCK]
#
# If $PYTHON already has a Detectron2 (and so a torch), that one is used: the environment sees the packages of $PYTHON,
# and only what is missing is added, within the ranges of pyproject.toml. Otherwise all versions come from
# requirements.lock and requirements-detectron2.lock. A LOCK (see dev/test_lowest.sh) replaces requirements.lock and
# ignores the Detectron2 of $PYTHON.
set -euo pipefail
venv=${1:?usage: dev/setup_env.sh VENV [LOCK]}
lock=${2:-}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

"$python" - "$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)" <<'PY'
import sys
if sys.version_info < tuple(int(part) for part in sys.argv[1].split(".")):
    version = sys.version.split()[0]
    sys.exit(f"mgd_det needs Python {sys.argv[1]} or newer; {sys.executable} is {version}: make install PYTHON=...")
PY

has_detectron2() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("detectron2") is None)'; }

rm -f "$venv/.ready"
if [[ -z $lock ]] && has_detectron2 "$python"; then
    echo "== Using the Detectron2 of $("$python" -c 'import sys; print(sys.prefix)')"
    "$python" -m venv "$venv"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Not --system-site-packages: where $PYTHON is itself in a virtual environment, that would skip it.
    "$python" -c 'import site, sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' >"$site/parent.pth"
    "$venv/bin/python" -m pip install --quiet --editable '.[dev]'
else
    [[ -n $lock ]] || "$python" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(
        "requirements.lock is for Python 3.11 or newer, and this is " + sys.version.split()[0] + ": make install PYTHON=...")'
    echo "== Making $venv: torch and Detectron2, about 6 GB, a minute or a few"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --requirement "${lock:-requirements.lock}"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$venv/bin/python" -m pip install --quiet --no-deps --only-binary=:all: --require-hashes \
        --python-version 3.10 --implementation cp --upgrade --target "$site" \
        --requirement requirements-detectron2.lock
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
fi
"$venv/bin/python" -c 'import torch, torchvision, detectron2; print("== Ready: torch", torch.__version__, "torchvision", torchvision.__version__, "detectron2", detectron2.__version__)'
touch "$venv/.ready"

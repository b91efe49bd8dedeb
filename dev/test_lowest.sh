#!/usr/bin/env bash
# Runs the tests with the oldest Python and packages that pyproject.toml allows (requirements-lowest.lock).
#
#   PYTHON=python3.10 dev/test_lowest.sh FOLDER          # the fast tests
#   PYTHON=python3.10 dev/test_lowest.sh FOLDER --all    # all tests
#
# FOLDER gets the virtual environment, about 5 GB; it is used again where it exists. Arguments after that go to pytest.
set -euo pipefail
venv=${1:?usage: dev/test_lowest.sh FOLDER [--all] [PYTEST ARGUMENTS]}
shift
venv=$(realpath --canonicalize-missing "$venv")
python=${PYTHON:-python3.10}
cd "$(dirname "$0")/.."
selection=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    selection=()
    shift
fi
oldest=$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [[ $found != "$oldest" ]]; then
    echo "The oldest Python that pyproject.toml allows is $oldest; $python is $found: set PYTHON." >&2
    exit 2
fi
if ! cmp --silent requirements-lowest.lock "$venv/.ready"; then
    PYTHON=$python dev/setup_env.sh "$venv" requirements-lowest.lock
    cp requirements-lowest.lock "$venv/.ready"
else  # it may have been made in another checkout
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest tests --numprocesses auto --dist loadfile "${selection[@]}" "$@"

#!/usr/bin/env bash
# Checks style and types; `dev/linter.sh --fix` fixes what it can. The versions are pinned in requirements.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --fix ]]; then
    ruff format .
    ruff check --fix .
fi
ruff format --check .
ruff check .
mypy

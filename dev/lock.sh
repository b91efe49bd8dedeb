#!/usr/bin/env bash
# Resolves dev/requirements*.in into the lock files (needs uv: `pip install uv`).
set -euo pipefail
cd "$(dirname "$0")/.."
lock() { uv pip compile --no-header --no-emit-index-url --no-annotate --upgrade "$@"; }
lock --universal --python-version 3.11 dev/requirements.in --output-file requirements.lock
lock --universal --python-version 3.11 dev/requirements-docs.in --output-file requirements-docs.lock
lock --python-version 3.10 dev/requirements-lowest.in --output-file requirements-lowest.lock

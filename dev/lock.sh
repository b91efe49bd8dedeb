#!/usr/bin/env bash
# Resolves dev/requirements.in into requirements.lock (needs uv: `pip install uv`).
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile --universal --python-version 3.11 --no-header --no-emit-index-url --no-annotate --upgrade \
    dev/requirements.in --output-file requirements.lock

#!/usr/bin/env bash
# Runs configs/quick_schedules/*_instant_test.yaml: twelve iterations each, some minutes in all on two CPU cores.
#
#   dev/run_instant_tests.sh [PYTHON]
exec "$(dirname "$0")/run_quick_schedules.sh" "${1:-.venv/bin/python}" instant_test

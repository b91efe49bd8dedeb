#!/usr/bin/env bash
# Runs every config of configs/quick_schedules/ end to end on FashionScenes tiny: training, distillation, evaluation,
# and Detectron2's check of TEST.EXPECTED_RESULTS. Teachers first. Some minutes on two CPU cores.
#
#   dev/run_instant_tests.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
"$python" tools/prepare_fashion_scenes.py tiny
for config in configs/quick_schedules/*_R_50_FPN_instant_test.yaml configs/quick_schedules/*_mgd_*_instant_test.yaml; do
    echo "== $config"
    log=output/instant_test/$(basename "$config" .yaml).log
    mkdir -p output/instant_test
    if ! "$python" tools/train_net.py --config-file "$config" >"$log" 2>&1; then
        tail -n 30 "$log"
        echo "== FAILED: $config (log: $log)"
        exit 1
    fi
    grep "copypaste" "$log"
done
echo "== all passed"

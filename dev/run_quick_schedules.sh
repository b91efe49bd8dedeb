#!/usr/bin/env bash
# Runs configs of configs/quick_schedules/ end to end on FashionScenes tiny, teachers first: training, distillation,
# evaluation, and Detectron2's check of TEST.EXPECTED_RESULTS. The *_quick.yaml require an AP above 3, and losses that
# fall; they take about an hour on two CPU cores.
#
#   dev/run_quick_schedules.sh [PYTHON] [quick|instant_test]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
kind=${2:-quick}
case $kind in
    quick) output=output/quick_schedules ;;
    instant_test) output=output/instant_test ;;
    *) echo "usage: $0 [PYTHON] [quick|instant_test]" >&2 && exit 2 ;;
esac
dev/install_photos.sh
"$python" tools/prepare_fashion_scenes.py tiny
mkdir -p "$output"
for config in configs/quick_schedules/*_R_50_FPN_"$kind".yaml configs/quick_schedules/*_mgd_*_"$kind".yaml; do
    echo "== $config"
    name=$(basename "$config" .yaml)
    log=$output/$name.log
    rm -f "$output/$name/metrics.json"
    if ! "$python" tools/train_net.py --config-file "$config" >"$log" 2>&1; then
        tail -n 30 "$log"
        echo "== FAILED: $config (log: $log)"
        exit 1
    fi
    grep "copypaste" "$log"
    [[ $kind == instant_test ]] || "$python" - "$output/$name/metrics.json" <<'PY'
import json
import sys

from mgd_det.distillation import is_distillation_loss

lines = [json.loads(line) for line in open(sys.argv[1])]
lines = [line for line in lines if "total_loss" in line]
few = max(len(lines) // 10, 1)
distilled = [key for key in lines[0] if is_distillation_loss(key)]
for name, keys in (("total_loss", ["total_loss"]), ("sum of the distillation losses", distilled)):
    if not keys:
        continue
    sums = [sum(line[key] for key in keys) for line in lines]
    start, end = sum(sums[:few]) / few, sum(sums[-few:]) / few
    print(f"{name}: {start:.3f} at the start, {end:.3f} at the end")
    if not end < start:
        sys.exit(f"== FAILED: {name} does not fall: {sys.argv[1]}")
PY
done
echo "== all passed"

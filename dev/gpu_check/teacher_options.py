"""Part "teacher": what each option of MODEL.MGD.TEACHER gains, with RetinaNet R50 to R18."""

import gc
import time
from typing import Any, Dict, List

import torch

from gpu_check.measuring import BATCHES, DRY_SIZE, FULL_SIZE, Records, config_of, ratio_of, rounds, spreads
from mgd_det.benchmark import DistillationBenchmark

_CONFIG = "COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml"
# Mixed precision of the student, and the options. What is asked most comes first.
_NCHW, _NHWC = {"CHANNELS_LAST": False}, {"CHANNELS_LAST": True}
_VARIANTS: List[Any] = [
    (False, _NCHW),
    (False, _NHWC),
    (True, _NCHW),
    (True, _NHWC),
    (False, {**_NHWC, "DTYPE": "float16"}),
    (False, {**_NHWC, "DTYPE": "bfloat16"}),
    (False, {**_NHWC, "FOLD_NORM": False}),
]
# Compiling takes so long that these have a part of their own. The first is what the others are compared with.
_COMPILED: List[Any] = [(True, _NHWC), (True, {**_NHWC, "COMPILE": True}), (False, {**_NHWC, "COMPILE": True})]
_SECONDS = 1.5  # of rounds, for a variant
_WIDTHS = (800, 1088, 1216, 1344)  # of the images that change their shape, 800 high


def measure_teacher(records: Records, compiled: bool, dry_run: bool) -> None:
    """Measure each variant; the features of the first are what the others are compared with."""
    expected: Dict[str, torch.Tensor] = {}
    variants = _COMPILED if compiled else _VARIANTS
    for amp, options in [variants[0], variants[len(variants) // 2]] if dry_run else variants:
        records.measure(lambda a=amp, o=options: _measure(a, o, expected, dry_run), amp=amp, options=options)
        gc.collect()


def _measure(amp: bool, options: Dict[str, Any], expected: Dict[str, torch.Tensor], dry_run: bool) -> Dict[str, Any]:
    opts = [part for key, value in options.items() for part in (f"MODEL.MGD.TEACHER.{key}", str(value))]
    cfg = config_of(_CONFIG, [*opts, "SOLVER.AMP.ENABLED", str(amp)], dry_run)
    size, batch = (DRY_SIZE, 1) if dry_run else (FULL_SIZE, BATCHES[0])
    bench = DistillationBenchmark(cfg, size=size, batch=batch)
    features = {name: feature.float() for name, feature in bench.teacher_bottom_up().items()}
    if not expected:
        expected.update(features)
    functions = {
        "teacher_bottom_up": bench.teacher_bottom_up,
        "plain_step": bench.plain_step,
        "distilled_step": bench.distilled_step,
    }
    deviation = max(
        float((f - expected[name]).abs().max() / expected[name].abs().max()) for name, f in features.items()
    )
    del features
    times = rounds(functions, bench.device, 0.0 if dry_run else _SECONDS)
    result = {
        "batch": batch,
        "times_s": spreads(times),
        "ratios": {"distilled / plain": ratio_of(times, "distilled_step", "plain_step")},
        "deviation": deviation,
    }
    widths = [size[1]] if dry_run else _WIDTHS
    images = [bench.images[..., :width].contiguous() for width in widths]
    for name in ("first_pass_of_shapes_s", "second_pass_of_shapes_s"):
        start = time.perf_counter()
        for batch_of_a_shape in images:
            bench.teacher_bottom_up(batch_of_a_shape)
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        result[name] = time.perf_counter() - start
    return result

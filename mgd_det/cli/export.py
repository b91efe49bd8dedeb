"""Writes a trained detector as a model of ONNX Runtime, OpenVINO or torch.export, and verifies it.

The model's metadata has all that is needed to use it: classes, normalisation, anchors, thresholds. Run it by
projects/Deploy/detect.py, which needs numpy, Pillow and onnxruntime only.
"""

import argparse
import io
import json
import logging
import os
import tempfile
from contextlib import redirect_stdout
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from tabulate import tabulate
from torch import nn

from mgd_det.cli.arguments import positive
from mgd_det.cli.data_setup import use_coco_folders
from mgd_det.cli.error_reports import program
from mgd_det.cli.export_data import dataset_inputs, is_there, verification_inputs
from mgd_det.data import register_coco_folder
from mgd_det.engine import Trainer
from mgd_det.engine.evaluation import build_evaluator
from mgd_det.engine.trained_detector import build_trained_detector, read_trained_detector
from mgd_det.errors import UserError
from mgd_det.export import FORMATS, Difference, ExportedDetector, Tolerance, detector_settings, verify, write_model
from mgd_det.export.packages import require
from mgd_det.export.postprocessing import Settings
from mgd_det.export.quantization import quantize_core
from mgd_det.files.atomic_files import write_text_atomically
from mgd_det.files.outputs import writable_file, writing
from mgd_det.files.unsafe_files import add_unsafe_files_flag

logger = logging.getLogger(__name__)

_CALIBRATION_SET = "export_calibration"
_PACKAGES = {
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "openvino": ["onnx", "onnxscript", "openvino"],
    "torch": [],
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="PATH", help="OUTPUT_DIR of a training, or a config")
    parser.add_argument("--output", required=True, metavar="FILE", help="the model to write: .onnx, .xml or .pt2")
    parser.add_argument("--format", choices=list(FORMATS), default="onnx", help="default: %(default)s")
    parser.add_argument(
        "--with-nms",
        action="store_true",
        help="the whole detector with its post-processing, any of Detectron2's (onnx)",
    )
    verification = parser.add_argument_group("verification")
    verification.add_argument(
        "--verify", type=int, default=4, metavar="N", help="images to compare on, 0 for none (default: %(default)s)"
    )
    verification.add_argument(
        "--verify-images",
        action="append",
        default=[],
        metavar="PATH",
        help="a file or a folder; may be repeated (default: DATASETS.TEST)",
    )
    int8 = parser.add_argument_group("int8 (RetinaNet and FCOS, onnx)")
    int8.add_argument("--int8", action="store_true", help="quantize, and compare the AP on DATASETS.TEST")
    int8.add_argument("--calibration-dataset", metavar="NAME", help="a registered data set (default: DATASETS.TRAIN)")
    int8.add_argument("--calibration-json", metavar="FILE", help="or: annotations in COCO's format")
    int8.add_argument("--calibration-folder", metavar="DIR", help="and the folder of their images")
    int8.add_argument(
        "--calibration-images", type=positive, default=100, metavar="N", help="how many (default: %(default)s)"
    )
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs="*", help="overrides of the config: KEY VALUE ..., of a LazyConfig KEY=VALUE ...")
    args = parser.parse_intermixed_args(argv)
    if not args.output.endswith(FORMATS[args.format]):
        parser.error(f"--output {args.output} must end in {FORMATS[args.format]} with --format {args.format}")
    if args.format != "onnx" and (args.int8 or args.with_nms):
        parser.error("--int8 and --with-nms are for --format onnx only")
    if args.int8 and args.with_nms:
        parser.error("--int8 quantizes the core only: leave --with-nms out")
    if bool(args.calibration_json) != bool(args.calibration_folder) or (
        args.calibration_json and args.calibration_dataset
    ):
        parser.error("give --calibration-dataset, or --calibration-json and --calibration-folder")
    if args.verify < 0:
        parser.error(f"--verify {args.verify}: give a number >= 0")
    return args


def run(args: argparse.Namespace) -> None:
    """Export, verify and quantize. The output is there only if all of it succeeded."""
    writable_file(args.output, "--output")
    for package in _PACKAGES[args.format]:
        require(package)
    cfg, categories, network = read_trained_detector(args.model, args.opts, device="cpu")
    _use_coco_folders(cfg)
    detector = build_trained_detector(cfg, network)
    names, ids = ([category[key] for category in categories] for key in ("name", "id"))
    settings = detector_settings(cfg, detector, names, ids, whole=args.with_nms)
    folder = os.path.dirname(os.path.abspath(args.output))
    with tempfile.TemporaryDirectory(prefix=".mgd_export.", dir=folder) as temporary:
        made = os.path.join(temporary, os.path.basename(args.output))
        inputs, source = verification_inputs(cfg, args.verify_images, args.verify or 1)
        with writing(args.output, "--output"):
            write_model(detector, settings, made, args.format, inputs[0]["image"].float())
        if args.verify:
            _verify(detector, made, inputs, source)
        if args.int8:
            made = _quantize(cfg, args, made, settings)
        with writing(args.output, "--output"):
            _move(made, args.output)


def _move(made: str, output: str) -> None:
    """Give a model its final name, together with OpenVINO's weights, and print both."""
    for suffix in (".bin", os.path.splitext(output)[1]):  # the weights first: the model refers to them
        source, target = (os.path.splitext(path)[0] + suffix for path in (made, output))
        if os.path.exists(source):
            os.replace(source, target)
            print(f"{target}: {os.path.getsize(target) / 2**20:.1f} MiB")


def _use_coco_folders(cfg: CfgNode) -> None:
    """Register the data of the training if they are still there; an export works without."""
    try:
        use_coco_folders(cfg)
    except UserError as e:
        logger.warning(f"The data of the config are not used: {e}")
        cfg.DATASETS.TEST = ()


def _verify(detector: nn.Module, path: str, inputs: List[Dict[str, Any]], source: str) -> None:
    """Compare the exported detector with the original and print a table.

    Raises:
        UserError: they differ by more than rounding.
    """
    tolerance = Tolerance()
    difference = verify(detector, ExportedDetector(path), inputs, least=tolerance.scores)
    print(f"\nPyTorch and {os.path.basename(path)} on {len(inputs)} images of {source}:")
    print(verification_table(difference, tolerance))
    print("sizes of the network's input: " + ", ".join(f"{h} x {w}" for h, w in difference.sizes) + "\n")
    if difference.beyond(tolerance):
        raise UserError(
            f"the exported model differs from the one in PyTorch in {', '.join(difference.beyond(tolerance))}, so "
            "--output is not written. Try another --format, or report this with the table above."
        )
    if difference.detections == 0:
        logger.warning("Nothing is detected in these images, so no box was compared: give others by --verify-images")


def verification_table(difference: Difference, tolerance: Tolerance) -> str:
    """Format the differences, their units and tolerances."""
    units = {
        "outputs": "raw outputs, largest difference / largest value",
        "boxes": "boxes, largest difference in pixels",
        "scores": "scores, largest difference",
        "masks": "masks, share of pixels that differ",
        "keypoints": "keypoints, share more than a pixel apart",
        "unmatched": f"objects that only one finds, share of {difference.detections}",
    }
    rows = [
        [
            units[name],
            f"{value:.2g}",
            f"{getattr(tolerance, name):g}",
            "ok" if value <= getattr(tolerance, name) else "NO",
        ]
        for name, value in difference.values.items()
    ]
    return tabulate(rows, headers=["", "found", "tolerance", ""], disable_numparse=True)


def _quantize(cfg: CfgNode, args: argparse.Namespace, path: str, settings: Settings) -> str:
    """Write the int8 model beside ``path``, print and save the AP of both, and return its path."""
    name = args.calibration_dataset
    if args.calibration_json:
        name = _CALIBRATION_SET
        register_coco_folder(name, args.calibration_json, args.calibration_folder)
    name = name or next(iter(cfg.DATASETS.TRAIN), "")
    if not name:
        raise UserError("DATASETS.TRAIN is empty: give --calibration-dataset, or --calibration-json and a folder")
    quantized = os.path.join(os.path.dirname(path), f"int8_{os.path.basename(path)}")
    quantize_core(path, quantized, settings, dataset_inputs(cfg, name, args.calibration_images))
    scores = {title: _scores(cfg, model) for title, model in (("float32", path), ("int8", quantized))}
    if scores["int8"]:
        print(ap_table(scores))
        report = os.path.splitext(args.output)[0] + "_ap.json"
        write_text_atomically(report, json.dumps(_without_nan(scores), indent=1))
        print(report)
    else:
        logger.warning("DATASETS.TEST has no set that is here, so the AP of int8 is not measured")
    return quantized


def _scores(cfg: CfgNode, path: str) -> Dict[str, Dict[str, float]]:
    """Score an exported model by Detectron2's evaluator; return the box scores of the data sets that are here."""
    detector, results = ExportedDetector(path, torch.get_num_threads()), {}
    for name in filter(is_there, cfg.DATASETS.TEST):
        print(f"Evaluating {os.path.basename(path)} on {name}...", flush=True)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # COCO's own table
            evaluator = build_evaluator(cfg, name, folder)
            results[name] = inference_on_dataset(detector, Trainer.build_test_loader(cfg, name), evaluator)["bbox"]
    return results


def _without_nan(scores: Any) -> Any:
    """Return nested dicts with None for scores that are not defined, which json has no number for."""
    if isinstance(scores, dict):
        return {key: _without_nan(value) for key, value in scores.items()}
    return None if scores != scores else scores


def ap_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Format the box AP of several models by data set."""
    keys = ("AP", "AP50", "AP75")
    rows = [
        [title, name, *(f"{values[key]:.2f}" for key in keys)]
        for title, sets in scores.items()
        for name, values in sets.items()
    ]
    return tabulate(rows, headers=["", "data set", *keys], disable_numparse=True)


main = program(parse_args, run)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Detects objects with a model of tools/export.py: numpy, Pillow and onnxruntime are all that it needs.

python projects/Deploy/detect.py model.onnx photo.jpg folder/ --json detections.json

The json is in COCO's results format, boxes in the pixels of each image. Without --annotations, the images have the ids
1, 2, 3... in the order of the command line; a folder's images are sorted by name.

To use it elsewhere, copy mgd_det/export/postprocessing.py beside this file.
"""

import argparse
import json
import os
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import onnxruntime

# A copy beside this file, or the one in the checkout: not as mgd_det.export, which needs torch.
_HERE = Path(__file__).resolve().parent
_FOLDERS = [_HERE, _HERE.parent.parent / "mgd_det" / "export"]
sys.path.insert(0, str(next(folder for folder in _FOLDERS if (folder / "postprocessing.py").is_file())))
import postprocessing  # noqa: E402

del sys.path[0]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


class Detector:
    """A model of tools/export.py."""

    def __init__(self, path: str, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.settings = postprocessing.read_settings(metadata[postprocessing.SETTINGS_KEY])
        except KeyError:
            sys.exit(
                f"error: {path} was not written by tools/export.py: its metadata have no {postprocessing.SETTINGS_KEY}"
            )
        except Exception as e:  # onnxruntime has an error of its own for every kind of broken file
            sys.exit(f"error: {path} cannot be used: {e}")
        self.input_name = self.session.get_inputs()[0].name

    def __call__(self, image: np.ndarray) -> postprocessing.Detections:
        """Find the objects in an image (H, W, 3) uint8 RGB."""
        pixels, size = postprocessing.network_input(image, self.settings)
        outputs = self.session.run(None, {self.input_name: pixels})
        return postprocessing.detections(outputs, self.settings, size, image.shape[:2])


def coco_results(found, image_id: int, category_ids: list, least: float) -> list:
    """Return the objects of an image as COCO's results format has them, those below a score left out."""
    results = []
    for i, ((x1, y1, x2, y2), score, index) in enumerate(zip(found.boxes.tolist(), found.scores, found.classes)):
        if score < least:
            continue
        entry = {"image_id": image_id, "category_id": category_ids[index], "score": float(score)}
        entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        if found.masks is not None:
            entry["segmentation"] = compressed_rle(found.masks[i])
        if found.keypoints is not None:
            entry["keypoints"] = found.keypoints[i].flatten().tolist()
        results.append(entry)
    return results


def compressed_rle(mask: np.ndarray) -> dict:
    """Encode a mask (H, W) as COCO does: lengths of runs by column, as differences from the one before the last."""
    runs = [(bool(value), sum(1 for _ in run)) for value, run in groupby(mask.flatten(order="F").tolist())]
    counts = [0] * bool(runs and runs[0][0]) + [length for _, length in runs]
    text = ""
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        while True:
            bits, rest = rest & 31, rest >> 5
            more = rest != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 * more))
            if not more:
                break
    return {"size": list(mask.shape), "counts": text}


def images_of(paths: list) -> list:
    """Return the paths of images and of those in folders."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            sys.exit(f"error: {path} does not exist")
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files += [file for file in inside if file.suffix.lower() in SUFFIXES] or [path] * path.is_file()
    if not files:
        sys.exit(f"error: {', '.join(paths)} has no images ({', '.join(SUFFIXES)})")
    return files


def ids_of(files: list, annotations: str) -> tuple:
    """Return the ids of the images, and those of the classes by name, in a json in COCO's format."""
    ids = {}
    try:
        known = json.loads(Path(annotations).read_text(encoding="utf-8"))
        for entry in known["images"]:
            ids.setdefault(os.path.basename(entry["file_name"]), []).append(entry["id"])
        classes = {entry["name"]: entry["id"] for entry in known["categories"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(f"error: --annotations {annotations} is not a json in COCO's format: {type(e).__name__}: {e}")
    for file in files:
        if len(ids.get(file.name, [])) != 1:
            found = f"{len(ids[file.name])} images with the name" if file.name in ids else "no"
            sys.exit(f"error: --annotations {annotations} has {found} {file.name}")
    return [ids[file.name][0] for file in files], classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an .onnx file of tools/export.py")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--json", required=True, metavar="FILE", help="the detections")
    parser.add_argument("--annotations", metavar="FILE", help="a COCO json with the ids of images and classes, by name")
    parser.add_argument("--min-score", type=float, default=0.0, metavar="S", help="leave out what scores less")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per core")
    args = parser.parse_args()
    for path in filter(None, (args.model, args.annotations)):
        if not os.path.isfile(path):
            sys.exit(f"error: there is no file {path}")
    partial = Path(f"{args.json}.partial")
    try:  # before the work
        if os.path.isdir(args.json):
            raise IsADirectoryError("it is a folder")
        partial.touch()
    except OSError as e:
        sys.exit(f"error: --json {args.json} cannot be written: {e}")
    try:
        run(args, partial)
    finally:
        partial.unlink(missing_ok=True)


def run(args: argparse.Namespace, partial: Path) -> None:
    detector = Detector(args.model, args.threads)
    files, category_ids = images_of(args.images), detector.settings["category_ids"]
    image_ids = list(range(1, len(files) + 1))
    if args.annotations:
        image_ids, classes = ids_of(files, args.annotations)
        for name in detector.settings["classes"]:
            if name not in classes:
                sys.exit(f"error: --annotations {args.annotations} has no {name}")
        category_ids = [classes[name] for name in detector.settings["classes"]]
    results, broken = [], 0
    for file, image_id in zip(files, image_ids):
        try:
            image = postprocessing.read_image(file)
        except (OSError, ValueError) as e:
            print(f"error: {file} cannot be read and is left out: {e}", file=sys.stderr)
            broken += 1
            continue
        results += coco_results(detector(image), image_id, category_ids, args.min_score)
    partial.write_text(json.dumps(results), encoding="utf-8")
    partial.replace(args.json)
    print(f"{args.json}: {len(results)} objects in {len(files) - broken} images")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()

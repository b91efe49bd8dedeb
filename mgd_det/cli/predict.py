"""Finds the objects of images with a trained detector: pictures, and a json in COCO's format.

Writes pictures/<name>, as PNG, and predictions.json to the output folder. The json has "images", "categories" and
"annotations" with scores; "annotations" alone is what COCO's evaluation reads as results.

The exit status is 1 if an image could not be read; the others are written all the same.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as mask_util
from tqdm import tqdm

from mgd_det.cli.arguments import positive
from mgd_det.cli.error_reports import program
from mgd_det.cli.image_files import InputImage, find_images
from mgd_det.data.categories import Categories, categories_of_json, unknown_categories
from mgd_det.data.class_names import check_same_classes
from mgd_det.data.coco.image_check import mode_problem
from mgd_det.data.coco.register import read_report
from mgd_det.engine.predictor import ImagePredictor, load_predictor
from mgd_det.errors import UserError, first_line
from mgd_det.files.atomic_files import write_text_atomically
from mgd_det.files.outputs import writable_folder, writing
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.visualization import draw_objects

LEAST_SIZE = 640  # pixels of the longer side of a picture


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images, or folders of images")
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="folder of a training, a config, or a model of tools/export.py",
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="for pictures and predictions.json")
    parser.add_argument(
        "--score-threshold",
        type=_fraction,
        default=0.5,
        metavar="X",
        help="leave out objects of a lower score, in pictures and json (default: %(default)s); 0 to compute AP",
    )
    parser.add_argument("--max-images", type=positive, metavar="N", help="take the first N images only")
    parser.add_argument("--recursive", action="store_true", help="look into the folders of folders too")
    parser.add_argument("--no-pictures", action="store_true", help="write the json only")
    parser.add_argument(
        "--annotations", metavar="FILE", help="json in COCO's format of these images: use its image and category ids"
    )
    add_unsafe_files_flag(parser)
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="overrides of the config: KEY VALUE ..., of a LazyConfig KEY=VALUE ...",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Write pictures and predictions, and return the exit status."""
    advice = "" if args.recursive else "; --recursive looks into the folders below too"
    images = find_images(args.images, "IMAGE", args.recursive, advice)[: args.max_images]
    writable_folder(args.output_dir, "--output-dir")
    predictor = load_predictor(args.model, args.opts)
    ids, categories = list(range(1, len(images) + 1)), predictor.categories
    if args.annotations:
        ids, categories = ids_of(args.annotations, images), _categories_of(args.annotations, predictor)
    content: Dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    unreadable = 0
    for image_id, image in tqdm(list(zip(ids, images)), desc="predicting", unit="image"):
        try:
            pixels = _read(image.path)
        except UserError as e:
            tqdm.write(f"left out: {e}", file=sys.stderr)
            unreadable += 1
            continue
        instances = predictor(pixels)
        instances = instances[instances.scores >= args.score_threshold]
        height, width = pixels.shape[:2]
        content["images"].append({"id": image_id, "file_name": image.name, "height": height, "width": width})
        first = len(content["annotations"]) + 1
        content["annotations"] += coco_annotations(instances, image_id, categories, first)
        if not args.no_pictures:
            name = image.name if image.name.endswith(".png") else f"{image.name}.png"
            _draw(pixels, instances, categories, os.path.join(args.output_dir, "pictures", name))
    path = os.path.join(args.output_dir, "predictions.json")
    with writing(path, "--output-dir"):
        write_text_atomically(path, json.dumps(content))
    objects = len(content["annotations"])
    print(f"{objects} objects of {args.score_threshold:g} or more in {len(content['images'])} images: {path}")
    if unreadable:
        print(f"{unreadable} of {len(images)} images could not be read", file=sys.stderr)
    return int(unreadable > 0)


def ids_of(json_file: str, images: Sequence[InputImage]) -> List[Any]:
    """Return the ids that a json in COCO's format gives to images, by file name or, if there is none, its last part.

    Raises:
        UserError: the json cannot be read, or it does not have an image.
    """
    known = {image.file_name: image.id for image in _report(json_file).images}
    by_base: Dict[str, List[Any]] = {}
    for name, number in known.items():
        by_base.setdefault(os.path.basename(name), []).append(number)
    ids = []
    for image in images:
        name, same_base = Path(image.name).as_posix(), by_base.get(os.path.basename(image.name), [])
        if name not in known and len(same_base) != 1:
            found = f"has {len(same_base)} images of this name" if same_base else "has no such image"
            raise UserError(f"--annotations {json_file} {found}: {image.path}. Give only images of that json")
        ids.append(known.get(name, same_base[0] if same_base else None))
    return ids


def coco_annotations(
    instances: Instances, image_id: Any, categories: Categories, first_id: int = 1
) -> List[Dict[str, Any]]:
    """Return the objects of one image as entries of COCO's "annotations", with a score.

    Args:
        instances: as a detector predicts them.
        image_id: of the entries.
        categories: by class index.
        first_id: id of the first entry.
    """
    entries = instances_to_coco_json(instances, image_id)
    for number, entry in enumerate(entries, start=first_id):
        has_mask = "segmentation" in entry
        area = float(mask_util.area(entry["segmentation"])) if has_mask else entry["bbox"][2] * entry["bbox"][3]
        entry["category_id"] = categories[entry["category_id"]]["id"]
        entry.update(id=number, area=area, iscrowd=0)
    return entries


def _read(path: str) -> np.ndarray:
    """Return the image as (H, W, 3) uint8 RGB, in the orientation that its EXIF data give.

    Raises:
        UserError: it cannot be read, or has more than 8 bits per channel.
    """
    try:
        problem = mode_problem(path)
        pixels = read_image(path, "RGB")
    except Exception as e:  # PIL raises many types for broken files
        raise UserError(f"{path} cannot be read ({type(e).__name__}: {first_line(e)})") from e
    if problem:
        raise UserError(problem.message)
    return pixels


def _categories_of(json_file: str, predictor: ImagePredictor) -> Categories:
    categories, names = categories_of_json(json_file), [category["name"] for category in predictor.categories]
    if len(categories) != len(names):
        raise UserError(
            f"--annotations {json_file} has {len(categories)} categories, but the detector has {len(names)}: give the "
            "json of data with the detector's classes"
        )
    if predictor.categories != unknown_categories(len(names)):
        check_same_classes({}, {"--annotations": [c["name"] for c in categories], "--model": names})
    return categories


def _report(json_file: str) -> Any:
    if not os.path.isfile(json_file):
        raise UserError(f"--annotations {json_file}: there is no such file")
    report = read_report(json_file)
    fatal = [problem for problem in report.problems if problem.is_fatal]
    if fatal:
        raise UserError(f"--annotations: {fatal[0]}")
    return report


def _draw(pixels: np.ndarray, instances: Instances, categories: Categories, path: str) -> None:
    names = [category["name"] for category in categories]
    picture = draw_objects(pixels, instances, names, score_threshold=0.0, least_size=LEAST_SIZE)
    with writing(path, "--output-dir"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(picture).save(path)


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number:g} is not a number from 0 to 1")
    return number


main = program(parse_args, run)

if __name__ == "__main__":
    sys.exit(main())

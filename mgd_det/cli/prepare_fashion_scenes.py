"""Makes FashionScenes, a detection data set that needs no download of COCO.

The sets go where Detectron2 looks for its own, $DETECTRON2_DATASETS (default: datasets). Their names are
fashion_scenes_<size>_train and fashion_scenes_<size>_val.
"""

import argparse
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import cv2
import numpy as np
import pycocotools.mask as mask_util
from tabulate import tabulate
from tqdm import tqdm

from mgd_det.cli.error_reports import program
from mgd_det.data import (
    CLASS_NAMES,
    DATASETS_ROOT,
    SCENE_SPECS,
    SPLITS,
    FashionPhotos,
    find_photo_folder,
    read_photos,
    write_fashion_scenes,
)
from mgd_det.files.outputs import writing

PREVIEW_SCENES, PREVIEW_SIDE = 16, 256  # in a square; pixels of a scene
_FONT = (cv2.FONT_HERSHEY_SIMPLEX, 0.35, 1)  # face, scale, thickness


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", choices=list(SCENE_SPECS), metavar="SIZE", help=" or ".join(SCENE_SPECS))
    parser.add_argument("--root", default=DATASETS_ROOT, help="folder of data sets (default: %(default)s)")
    parser.add_argument("--photos", metavar="DIR", help="folder of the four Fashion-MNIST files")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--train", type=int, metavar="N", help="training scenes, instead of the size's own")
    parser.add_argument("--val", type=int, metavar="N", help="validation scenes, instead of the size's own")
    parser.add_argument("--force", action="store_true", help="replace a set made with other settings")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: depends on the set and the CPU)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write the sets, and print what they hold."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with writing(args.root, "--root"):
        photo_folder = find_photo_folder(args.photos, download_root=args.root)
        photos = [read_photos(photo_folder, split) for split in ("train", "test")]
        for size in args.sizes:
            _prepare(size, args, *photos)


def _draw_annotations(image: Any, annotations: List[Dict[str, Any]]) -> np.ndarray:
    """Return a scene (H, W, 3), enlarged to the preview's size, with masks, boxes and class names."""
    scale = PREVIEW_SIDE / image.shape[0]
    image = cv2.resize(image, (PREVIEW_SIDE, PREVIEW_SIDE), interpolation=cv2.INTER_NEAREST)
    for annotation in annotations:
        mask = mask_util.decode(annotation["segmentation"])
        mask = cv2.resize(mask, image.shape[:2], interpolation=cv2.INTER_NEAREST)
        outline = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(image, outline, -1, (0, 255, 255), 1)
        x, y, width, height = (int(round(value * scale)) for value in annotation["bbox"])
        cv2.rectangle(image, (x, y), (x + width - 1, y + height - 1), (255, 255, 255), 1)
        name, place = CLASS_NAMES[annotation["category_id"] - 1], (x + 2, max(y - 3, 9))
        (text_width, text_height), _ = cv2.getTextSize(name, *_FONT)
        # A dark background keeps the name readable on any scene.
        x0, y0 = place[0] - 1, place[1] - text_height - 1
        image[max(y0, 0) : place[1] + 2, x0 : x0 + text_width + 2] //= 3
        cv2.putText(image, name, place, *_FONT[:2], (255, 255, 255), _FONT[2], cv2.LINE_AA)
    return cv2.copyMakeBorder(image, 1, 1, 1, 1, cv2.BORDER_CONSTANT)


def _write_preview(folder: Path, content: Dict[str, Any]) -> Path:
    """Write preview.png, the first training scenes with their annotations."""
    tiles = []
    for entry in content["images"][:PREVIEW_SCENES]:
        image = cv2.imread(str(folder / "images" / "train" / entry["file_name"]))
        annotations = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        tiles.append(_draw_annotations(image, annotations))
    tiles += [np.zeros_like(tiles[0])] * (PREVIEW_SCENES - len(tiles))
    columns = int(PREVIEW_SCENES**0.5)
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, PREVIEW_SCENES, columns)]
    path = folder / "preview.png"
    path.write_bytes(cv2.imencode(".png", np.vstack(rows))[1].tobytes())
    return path


def _table(contents: Dict[str, Dict[str, Any]]) -> str:
    """Return a table of what each split holds."""
    rows = []
    for split, content in contents.items():
        images, labels = len(content["images"]), [a["category_id"] for a in content["annotations"]]
        per_class = np.bincount(labels, minlength=len(CLASS_NAMES) + 1)[1:]
        rows.append([split, images, len(labels), f"{len(labels) / images:.2f}", *per_class])
    names = ["", "images", "objects", "objects per scene", *CLASS_NAMES]
    return tabulate(zip(names, *rows), headers="firstrow")


def _prepare(size: str, args: argparse.Namespace, train_photos: FashionPhotos, test_photos: FashionPhotos) -> None:
    given = {"train_images": args.train, "val_images": args.val}
    spec = dataclasses.replace(SCENE_SPECS[size], **{k: v for k, v in given.items() if v is not None})
    folder = Path(args.root) / "fashion_scenes" / size
    with tqdm(total=spec.train_images + spec.val_images, desc=size, unit="scene", leave=False) as bar:
        write_fashion_scenes(
            folder,
            spec,
            train_photos,
            test_photos,
            seed=args.seed,
            workers=args.workers,
            force=args.force,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    contents = {
        split: json.loads((folder / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
        for split in SPLITS
    }
    preview = _write_preview(folder, contents["train"])
    print(f"{_table(contents)}\n\n{size}: {folder}\npicture: {preview}")
    if os.path.abspath(args.root) != os.path.abspath(DATASETS_ROOT):
        print(f"To train on it: export DETECTRON2_DATASETS={os.path.abspath(args.root)}")


main = program(parse_args, run)


if __name__ == "__main__":
    main()

"""FashionScenes: scenes of Fashion-MNIST photos with boxes and masks, in COCO's own layout.

Every scene has its own random generator, seeded by (seed, split, index), so that a set is the same, byte for byte, for
any number of processes that write it.

Shape shorthand in this module: H = W = image_size. Images are BGR, as OpenCV writes them.
"""

import colorsys
import contextlib
import json
import logging
import multiprocessing
import multiprocessing.context
import os
import signal
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Generator, List, Optional, Tuple, Union

import cv2
import numpy as np
import pycocotools.mask as mask_util

from mgd_det.data.fashion_scenes.drawing import Placement, compose_scene, draw_background
from mgd_det.data.fashion_scenes.photos import CLASS_NAMES, FashionPhotos
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import atomic_folder

logger = logging.getLogger(__name__)

# Increase it whenever the same seed would give other files.
GENERATOR_VERSION = "1.0"
SPLITS = ("train", "val")
_PARALLEL_FROM = 2500  # scenes
# Contents of a set's folder; tools/prepare_fashion_scenes.py draws preview.png.
_OWN_ENTRIES = {"annotations", "images", "preview.png"}

# Run-length encoding: as small as zlib's best on these textures, in half the time.
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]


@dataclass(frozen=True)
class SceneSpec:
    """What a set of scenes looks like.

    Attributes:
        name: the set's name and the name of its folder.
        train_images, val_images: scenes in each split; > 0.
        image_size: side of the square scenes in pixels; >= 32.
        min_objects, max_objects: objects put into a scene, both included.
        min_scale, max_scale: side of a photo in a scene of 128 pixels, in units of its own 28 pixels; larger scenes
            enlarge it in proportion.
        max_angle: largest rotation either way, in degrees.
        min_visible: an object is annotated if at least this share of its silhouette is visible.
    """

    name: str
    train_images: int
    val_images: int
    image_size: int
    min_objects: int = 1
    max_objects: int = 6
    min_scale: float = 0.7
    max_scale: float = 2.2
    max_angle: float = 40.0
    min_visible: float = 0.4

    def images(self, split: str) -> int:
        return self.train_images if split == "train" else self.val_images


SCENE_SPECS = {
    "tiny": SceneSpec("tiny", 1000, 200, 128),  # tests and demonstrations
    "small": SceneSpec("small", 3000, 400, 128),  # studies on a CPU
    "large": SceneSpec("large", 20000, 2000, 256),  # studies on a GPU
}


def draw_scene(
    rng: np.random.Generator, spec: SceneSpec, photos: FashionPhotos
) -> Tuple[np.ndarray, List[Tuple[int, np.ndarray]]]:
    """Draw one random scene (H, W, 3) uint8, and return what :func:`compose_scene` returns."""
    size = spec.image_size
    background = draw_background(rng, size)
    placements = []
    for _ in range(int(rng.integers(spec.min_objects, spec.max_objects + 1))):
        photo = int(rng.integers(len(photos.labels)))
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 0.85), rng.uniform(0.8, 1.0))
        placements.append(
            Placement(
                photo=photos.images[photo],
                label=int(photos.labels[photo]),
                # Not at the very border, so that it cuts off less than half of most objects.
                center=(rng.uniform(0.08, 0.92) * size, rng.uniform(0.08, 0.92) * size),
                scale=rng.uniform(spec.min_scale, spec.max_scale) * size / 128,
                angle=rng.uniform(-spec.max_angle, spec.max_angle),
                flip=bool(rng.integers(2)),
                tint=(blue, green, red),
            )
        )
    return compose_scene(background, placements, spec.min_visible)


@dataclass(frozen=True)
class _SplitJob:
    """All that a process needs to write any scene of a split."""

    spec: SceneSpec
    split: str
    photos: FashionPhotos
    seed: int
    folder: Path

    def write_scene(self, index: int) -> List[Dict[str, Any]]:
        """Write the scene's image, and return its annotations without "id"."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        image, objects = draw_scene(rng, self.spec, self.photos)
        # Encoded first and written second: OpenCV's own writer would hide a full disk, an OSError.
        data = cv2.imencode(".png", image, _PNG)[1]
        (self.folder / _file_name(index)).write_bytes(data.tobytes())
        return [_annotation(index + 1, label, mask) for label, mask in objects]


def _annotation(image_id: int, label: int, mask: np.ndarray) -> Dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask))
    return {
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [float(v) for v in mask_util.toBbox(rle)],
        "segmentation": {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")},
        "area": float(mask_util.area(rle)),
        "iscrowd": 0,
    }


def _file_name(index: int) -> str:
    return f"{index + 1:012d}.png"


def write_fashion_scenes(
    root: Union[str, os.PathLike],
    spec: SceneSpec,
    train_photos: FashionPhotos,
    test_photos: FashionPhotos,
    seed: int = 0,
    workers: Optional[int] = None,
    force: bool = False,
    progress: Optional[Callable[[int, int], None]] = None,
) -> Path:
    """Write images/{train,val}/*.png and annotations/instances_{train,val}.json under ``root``.

    The set appears under its name only when it is complete: see :func:`mgd_det.files.atomic_files.atomic_folder`.
    A complete set of the same settings is left as it is.

    Args:
        root: the set's own folder, by convention <DETECTRON2_DATASETS>/fashion_scenes/<spec.name>.
        spec: what to draw.
        train_photos: photos for the training scenes.
        test_photos: photos for the validation scenes.
        seed: >= 0.
        workers: number of processes; None for one on each CPU core if the set is large, otherwise 1. The files
            do not depend on it. With more than 1, the calling script needs the usual guard,
            ``if __name__ == "__main__":``.
        force: replace a set that was made with other settings or that is damaged. A folder with anything else in it
            is never replaced.
        progress: called with (scenes written, all scenes) after each scene.

    Returns:
        ``root`` as a Path.

    Raises:
        UserError: ``root`` is another or a damaged set and ``force`` is False, ``root`` is not a set, or a number is
            out of range.
    """
    root = Path(root).absolute()
    if min(spec.train_images, spec.val_images) < 1 or spec.image_size < 32 or seed < 0:
        raise UserError(
            f"A set needs at least 1 image in each split, images of at least 32 pixels and a seed >= 0; got "
            f"{spec.train_images} and {spec.val_images} images of {spec.image_size} pixels, seed {seed}."
        )
    photos = {"train": train_photos, "val": test_photos}
    headers = {split: _header(spec, seed, split, photos[split]) for split in SPLITS}
    if root.exists():
        foreign = set(os.listdir(root)) - _OWN_ENTRIES if root.is_dir() else {root.name}
        if foreign:
            raise UserError(
                f"{str(root)!r} is not a set of scenes: it has {sorted(foreign)[0]!r}. Choose another --root."
            )
        if not force and _is_whole(root, spec, headers):
            logger.info(f"{root} is complete and was made with the same settings: left as it is")
            return root
        if not force and any(root.iterdir()):
            raise UserError(
                f"{str(root)!r} was made with other settings or is damaged. Pass --force to replace it, or choose "
                "another --root."
            )

    total, done = spec.train_images + spec.val_images, 0
    if workers is None:
        # Starting processes takes longer than drawing a small set here.
        workers = os.cpu_count() or 1 if total >= _PARALLEL_FROM else 1
    with atomic_folder(root) as partial:
        (partial / "annotations").mkdir()
        jobs = {s: _SplitJob(spec, s, photos[s], seed, partial / "images" / s) for s in SPLITS}
        for job in jobs.values():
            job.folder.mkdir(parents=True)
        annotations: Dict[str, List[Dict[str, Any]]] = {split: [] for split in SPLITS}
        # Closing it waits for the processes: none may write into a folder that is being removed.
        with contextlib.closing(_write_scenes(jobs, workers)) as scenes:
            for split, of_scene in scenes:
                annotations[split] += of_scene
                done += 1
                if progress is not None:
                    progress(done, total)
        for split in SPLITS:
            numbered = [dict(id=number, **rest) for number, rest in enumerate(annotations[split], start=1)]
            content = json.dumps(dict(headers[split], annotations=numbered))
            _json_file(partial, split).write_text(content, encoding="utf-8")
    return root


def _header(spec: SceneSpec, seed: int, split: str, photos: FashionPhotos) -> Dict[str, Any]:
    # All of a json file except its annotations. "info" holds what the files depend on, and no date, so that equal
    # settings give equal files.
    size = spec.image_size
    checksum = zlib.crc32(photos.labels.tobytes(), zlib.crc32(photos.images.tobytes()))
    return {
        "info": {
            "description": "FashionScenes: scenes of Fashion-MNIST photos, made by mgd_det",
            "version": GENERATOR_VERSION,
            "spec": asdict(spec),
            "seed": seed,
            "split": split,
            "photos_crc32": f"{checksum:08x}",
        },
        "licenses": [{"id": 1, "name": "MIT License", "url": "https://github.com/zalandoresearch/fashion-mnist"}],
        "images": [
            {"id": index + 1, "file_name": _file_name(index), "height": size, "width": size, "license": 1}
            for index in range(spec.images(split))
        ],
        "categories": [
            {"id": number, "name": name, "supercategory": "clothing"}
            for number, name in enumerate(CLASS_NAMES, start=1)
        ],
    }


def _json_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _is_whole(root: Path, spec: SceneSpec, headers: Dict[str, Dict[str, Any]]) -> bool:
    # An interrupted run leaves no set, so this finds other settings and later damage.
    for split in SPLITS:
        try:
            info = json.loads(_json_file(root, split).read_text(encoding="utf-8"))["info"]
            found = set(os.listdir(root / "images" / split))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if info != headers[split]["info"] or not found.issuperset(map(_file_name, range(spec.images(split)))):
            return False
    return True


_worker_jobs: Dict[str, _SplitJob] = {}  # filled in worker processes only


def _start_worker(jobs: Dict[str, _SplitJob]) -> None:
    _worker_jobs.update(jobs)
    cv2.setNumThreads(1)
    # Ctrl-C reaches the whole process group; only the parent ends the run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_in_worker(split: str, index: int) -> List[Dict[str, Any]]:
    return _worker_jobs[split].write_scene(index)


def _write_scenes(jobs: Dict[str, _SplitJob], workers: int) -> Generator[Tuple[str, List[Dict[str, Any]]], None, None]:
    """Write the scenes of every split, and yield split and annotations of each, in order."""
    splits = [split for split, job in jobs.items() for _ in range(job.spec.images(split))]
    indices = [index for split, job in jobs.items() for index in range(job.spec.images(split))]
    if workers <= 1:
        yield from zip(splits, (jobs[split].write_scene(index) for split, index in zip(splits, indices)))
        return
    executor = ProcessPoolExecutor(min(workers, len(splits)), _process_context(), _start_worker, (jobs,))
    try:
        yield from zip(splits, executor.map(_write_in_worker, splits, indices, chunksize=16))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _process_context() -> multiprocessing.context.BaseContext:
    # Not "fork": if OpenCV has started its threads in the parent, a forked child waits for them forever.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that Detectron2 is imported once, not in each worker
    return context

"""FashionScenes: detection data that needs no download of COCO, made of Fashion-MNIST photos."""

from mgd_det.data.fashion_scenes.photos import CLASS_NAMES, FashionPhotos, find_photo_folder, read_photos
from mgd_det.data.fashion_scenes.scenes import SCENE_SPECS, SPLITS, SceneSpec, write_fashion_scenes

__all__ = [
    "CLASS_NAMES",
    "FashionPhotos",
    "SCENE_SPECS",
    "SPLITS",
    "SceneSpec",
    "find_photo_folder",
    "read_photos",
    "write_fashion_scenes",
]

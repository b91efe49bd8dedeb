"""Students by short names: "mobilenetv2", "resnet18", "timm:efficientnet_b0"."""

import re
from dataclasses import dataclass, field
from typing import Any, Dict, Tuple

from mgd_det.errors import UserError, did_you_mean

_IMAGENET_MEAN, _IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Student:
    """A student's network and the ImageNet weights that it starts from.

    Attributes:
        name: its short name.
        network: its part of the names of the builders in BACKBONE_REGISTRY.
        weights: MODEL.WEIGHTS.
        keys: config keys and values that choose the network among those of its builder.
        pixel_mean: RGB mean of the images that the weights were trained on, in 0 to 255.
        pixel_std: their standard deviation.
    """

    name: str
    network: str
    weights: str
    keys: Dict[str, Any] = field(default_factory=dict)
    pixel_mean: Tuple[float, ...] = _IMAGENET_MEAN
    pixel_std: Tuple[float, ...] = _IMAGENET_STD


def _resnet(depth: int) -> Student:
    keys = {"MODEL.RESNETS.DEPTH": depth, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256}
    return Student(f"resnet{depth}", "resnet", f"torchvision://resnet{depth}", keys)


def _shufflenet(width: float) -> Student:
    weights = f"torchvision://shufflenet_v2_x{width:.1f}".replace(".", "_")
    return Student(f"shufflenetv2_x{width}", "shufflenetv2", weights, {"MODEL.SHUFFLENETS.WIDTH_MULT": width})


# By short name; find_student also takes other spellings, and "timm:<model>".
STUDENTS: Dict[str, Student] = {
    student.name: student
    for student in (
        *map(_resnet, (18, 34, 50, 101, 152)),
        Student("mobilenetv1", "mobilenetv1", "timm://mobilenetv1_100", {}, (127.5,) * 3, (127.5,) * 3),
        Student("mobilenetv2", "mobilenetv2", "torchvision://mobilenet_v2"),
        Student("mobilenetv3_large", "mobilenetv3_large", "torchvision://mobilenet_v3_large"),
        Student("mobilenetv3_small", "mobilenetv3_small", "torchvision://mobilenet_v3_small"),
        *map(_shufflenet, (0.5, 1.0, 1.5, 2.0)),
    )
}
# Other names of theirs, without case and punctuation. A builder's name stands for its smallest usual network.
_ALIASES = {
    "resnet": "resnet18",
    "shufflenetv2": "shufflenetv2_x1.0",
    "mobilenetv3": "mobilenetv3_large",
    "mobilenetv3l": "mobilenetv3_large",
    "mobilenetv3s": "mobilenetv3_small",
    **{f"r{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
}
_BUILDER = re.compile(r"(?:build_)?(?:retinanet_|fcos_)?(.+?)(?:(?:_separable)?_fpn)?(?:_backbone)?")
_TIMM = re.compile(r"timm(?:://|[:/])(.+)", re.IGNORECASE)


def find_student(name: str) -> Student:
    """Return a student by its name.

    Args:
        name: a key of :data:`STUDENTS`, "R18" and the like, a builder's name such as
            "build_retinanet_mobilenetv2_fpn_backbone", or "timm:" and a model of timm; case and punctuation do not
            count.

    Raises:
        UserError: there is no such student, or timm is not installed or does not have the model.
    """
    timm_model = _TIMM.fullmatch(name.strip())
    if timm_model:
        return _timm_student(timm_model[1])
    network = _BUILDER.fullmatch(name.strip().lower())
    short = _plain(network[1]) if network else ""
    known = {**{_plain(key): key for key in STUDENTS}, **_ALIASES}
    if short not in known:
        close = did_you_mean(short, list(known))
        raise UserError(
            f"--student {name!r} is not known.{close} Choose from {', '.join(STUDENTS)}, or timm:<model of timm>."
        )
    return STUDENTS[known[short]]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _timm_student(model: str) -> Student:
    try:
        import timm
    except ImportError as e:
        raise UserError(f"--student timm:{model}: timm is not installed: pip install timm") from e
    known = timm.list_models()
    if model.partition(".")[0] not in known:
        raise UserError(
            f"--student timm:{model}: timm {timm.__version__} has no such model.{did_you_mean(model.lower(), known)}"
        )
    trained = timm.models.get_pretrained_cfg(model)
    if trained is None or not trained.has_weights:
        raise UserError(f"--student timm:{model}: timm has no trained weights of it; choose a model that has some")
    mean, std = (tuple(round(255 * value, 3) for value in values) for values in (trained.mean, trained.std))
    # The network is named without the tag of its weights, which MODEL.TIMM.NAME does not need.
    keys = {"MODEL.TIMM.NAME": model.partition(".")[0]}
    return Student(f"timm:{model}", "timm", f"timm://{model}", keys, mean, std)

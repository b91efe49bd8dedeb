"""The list of trainings that a study file describes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import yaml

from mgd_det.errors import UserError, did_you_mean, first_line

_STUDY_KEYS = ("study", "seeds", "overrides", "fashion_scenes", "final", "project", "teacher", "linear", "arms")
_PATH_KEYS = {
    "project": "the folder of a project, such as projects/EmbedMask",
    "teacher": "a LazyConfig, such as projects/Classification/configs/fashion/R50.py",
    "linear": "a LazyConfig, such as projects/Classification/configs/fashion/linear_R18.py",
}
_FINAL_KEYS = ("fashion_scenes", "seed", "images")
_ARM_KEYS = ("name", "config", "like", "overrides", "same_time_as", "eval_only")
EVAL_ONLY_SEED = 0  # of the one row of an arm that is not trained


@dataclass(frozen=True)
class Arm:
    """Trainings that differ in the seed only.

    Attributes:
        name: its name in the study.
        config: a path, or a name in a model zoo.
        overrides: config keys and their values.
        same_time_as: the arm whose training time this one gets; None for an arm with a schedule of its own.
        like: for an arm with ``same_time_as``, the arm that it repeats with a longer schedule.
        eval_only: nothing is trained; MODEL.WEIGHTS are evaluated once, for all seeds.
    """

    name: str
    config: str
    overrides: Mapping[str, Any]
    same_time_as: Optional[str] = None
    like: Optional[str] = None
    eval_only: bool = False


@dataclass(frozen=True)
class FinalSet:
    """FashionScenes of another seed, which score the final models and choose nothing.

    Attributes:
        size: of the scenes, such as "small".
        seed: the set's; >= 1, since 0 is the seed of the registered sets.
        images: number of validation scenes.
    """

    size: str
    seed: int
    images: int

    @property
    def name(self) -> str:
        return f"fashion_scenes_{self.size}_seed{self.seed}_val"

    def root(self, datasets: str) -> str:
        """Return the --root with which tools/prepare_fashion_scenes.py makes it, below the folder of data sets."""
        return os.path.join(datasets, f"seed{self.seed}")

    def files(self, datasets: str) -> Tuple[str, str]:
        """Return the annotations and the folder of the images."""
        folder = os.path.join(self.root(datasets), "fashion_scenes", self.size)
        return os.path.join(folder, "annotations", "instances_val.json"), os.path.join(folder, "images", "val")


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        name: the study's.
        seeds: of each arm.
        arms: in the order of the file.
        fashion_scenes: sizes of FashionScenes that must be there.
        final: the set for the final scores; None for none.
        project: folder of the project whose detectors are trained; "" for detectors of Detectron2 and mgd_det.
        teacher: of a study of classifiers, the config of the teacher that is trained first; "" for the program's.
        linear: of a study of classifiers, the config of the linear evaluation of unsupervised arms; "" for none.
    """

    name: str
    seeds: Tuple[int, ...]
    arms: Tuple[Arm, ...]
    fashion_scenes: Tuple[str, ...] = ()
    final: Optional[FinalSet] = None
    project: str = ""
    teacher: str = ""
    linear: str = ""

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def read_study(path: str) -> Study:
    """Read a study file.

    Raises:
        UserError: the file cannot be read, or a key is wrong.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"study {path} cannot be read: {first_line(e)}") from e
    try:
        return _study(content)
    except UserError as e:
        raise UserError(f"study {path}: {e}") from e


def _study(content: Any) -> Study:
    _check_keys("the study", content, _STUDY_KEYS, required=("study", "seeds", "arms"))
    seeds = _list("seeds", content["seeds"], int)
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds is {seeds}: give different numbers >= 0")
    common = _overrides("overrides", content.get("overrides"))
    arms: Dict[str, Arm] = {}
    for number, entry in enumerate(_list("arms", content["arms"], dict), start=1):
        _check_keys(f"arm {number}", entry, _ARM_KEYS, required=("name",))
        arm = _arm(entry, common, arms)
        if arm.name in arms:
            raise UserError(f"two arms have the name {arm.name!r}: rename one")
        arms[arm.name] = arm
    sizes = _list("fashion_scenes", content["fashion_scenes"], str) if "fashion_scenes" in content else []
    final = None
    if content.get("final") is not None:
        _check_keys("final", content["final"], _FINAL_KEYS, required=_FINAL_KEYS)
        final = FinalSet(content["final"]["fashion_scenes"], content["final"]["seed"], content["final"]["images"])
        if type(final.seed) is not int or final.seed < 1:
            raise UserError(f"final.seed is {final.seed!r}: give a number >= 1 (0 is the seed of the set for choosing)")
    paths = {key: content.get(key, "") for key in _PATH_KEYS}
    for key, path in paths.items():
        if not isinstance(path, str):
            raise UserError(f"{key} is {path!r}: give {_PATH_KEYS[key]}")
    return Study(str(content["study"]), tuple(seeds), tuple(arms.values()), tuple(sizes), final, **paths)


def _arm(entry: Mapping[str, Any], common: Mapping[str, Any], earlier: Mapping[str, Arm]) -> Arm:
    name = str(entry["name"])
    if "/" in name or name in ("", ".", ".."):
        raise UserError(f"an arm has the name {name!r}, which cannot be a folder: rename it")
    if ("config" in entry) == ("like" in entry):
        raise UserError(f"arm {name!r} needs one of config and like")
    for key in ("like", "same_time_as"):
        if key in entry and entry[key] not in earlier:
            known = [str(other) for other in earlier]
            raise UserError(
                f"arm {name!r}: {key} is {entry[key]!r}, which is not an arm above it."
                + did_you_mean(str(entry[key]), known)
            )
        if key in entry and earlier[entry[key]].same_time_as is not None:
            raise UserError(
                f"arm {name!r}: {key} is {entry[key]!r}, which has no schedule of its own; name another arm"
            )
        if key in entry and earlier[entry[key]].eval_only:
            raise UserError(f"arm {name!r}: {key} is {entry[key]!r}, which is not trained; name another arm")
    eval_only = entry.get("eval_only", False)
    if type(eval_only) is not bool or (eval_only and "config" not in entry):
        raise UserError(f"arm {name!r}: eval_only is {eval_only!r}; give true or false, and true with config only")
    overrides = {**common, **_overrides(f"overrides of arm {name!r}", entry.get("overrides"))}
    if "same_time_as" in entry:
        if "like" not in entry or "overrides" in entry:
            raise UserError(f"arm {name!r} has same_time_as: it needs like, the arm that it repeats, and no overrides")
        like = earlier[entry["like"]]
        return Arm(name, like.config, like.overrides, entry["same_time_as"], like.name)
    if "like" in entry:
        like = earlier[entry["like"]]
        return Arm(name, like.config, {**like.overrides, **_overrides("overrides", entry.get("overrides"))})
    return Arm(name, str(entry["config"]), overrides, eval_only=eval_only)


def _overrides(what: str, value: Any) -> Dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{what} is {value!r}: give config keys and their values, KEY: VALUE")
    for key in ("SEED", "OUTPUT_DIR"):
        if key in value:
            raise UserError(f"{what} has {key}, which the runner sets: leave it out")
    return value


def _check_keys(what: str, value: Any, known: Tuple[str, ...], required: Tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{what} is {value!r}: give keys and values")
    for key in value:
        if key not in known:
            raise UserError(
                f"{what} has the unknown key {key!r}; use {', '.join(known)}.{did_you_mean(str(key), known)}"
            )
    for key in required:
        if key not in value:
            raise UserError(f"{what} lacks the key {key!r}")


def _list(what: str, value: Any, kind: type) -> List[Any]:
    if not isinstance(value, list) or not value or not all(type(part) is kind for part in value):
        raise UserError(f"{what} is {value!r}: give a list of {kind.__name__}")
    return value

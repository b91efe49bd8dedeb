"""Every LazyConfig that comes with the project builds, and is the yaml config of the same name."""

from collections.abc import Mapping
from pathlib import Path

import detectron2.model_zoo
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from omegaconf import ListConfig, OmegaConf
from random_teachers import random_teacher
from torch import nn

from mgd_det import model_zoo

NAMES = [name for name in model_zoo.config_names() if name.endswith(".py") and not name.startswith("common/")]
# Modules and their hooks; the teacher, one for both; what only the pictures of Detectron2's VIS_PERIOD need; and the
# weights of the box head's losses, 1 by both, but listed in part by the yaml configs.
NOT_COMPARED = {
    *vars(nn.Module()),
    "_hooks",
    "_hooks_of_measuring",
    "teacher",
    "input_format",
    "vis_period",
    "loss_weight",
}


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    monkeypatch.setattr("mgd_det.modeling.mgd_backbone.build_teacher", random_teacher)
    monkeypatch.setattr("mgd_det.modeling.teachers.build_teacher", random_teacher)


def yaml_config(name):
    cfg = model_zoo.get_config(Path(name).with_suffix(".yaml").as_posix())
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_there_is_one_of_each_detector():
    detectors = {name.split("/")[1].split("_FPN")[0].rsplit("_", 1)[0].replace("_R", "") for name in NAMES}
    assert detectors == {"retinanet", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "fcos"}


def settings(thing, nested=False):
    """What the attributes of a module and the objects in them say: thresholds, strides, losses, groups."""
    if isinstance(thing, (bool, int, float, str)) or thing is None:
        return thing
    if isinstance(thing, torch.Tensor):
        return thing.tolist() if thing.numel() < 100 else tuple(thing.shape)
    if isinstance(thing, (list, tuple, ListConfig)):
        return [settings(x, nested=True) for x in thing]
    if isinstance(thing, Mapping):
        return {key: settings(value, nested=True) for key, value in thing.items()}
    if (nested and isinstance(thing, nn.Module)) or not type(thing).__module__.startswith(("detectron2", "mgd_det")):
        return type(thing).__name__
    return settings({key: value for key, value in vars(thing).items() if key not in NOT_COMPARED})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_that_of_the_yaml_config(name):
    lazy, cfg = instantiate(model_zoo.get_config(name).model), build_model(yaml_config(name))
    assert [(n, p.shape, p.requires_grad) for n, p in lazy.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in cfg.named_parameters()
    ]
    assert list(lazy.state_dict()) == list(cfg.state_dict())
    for (path, ours), (_, theirs) in zip(lazy.named_modules(), cfg.named_modules()):
        assert type(ours) is type(theirs), path
        assert settings(ours) == settings(theirs), path


@pytest.mark.parametrize("name", NAMES)
def test_the_training_is_that_of_the_yaml_config(name):
    lazy, cfg = model_zoo.get_config(name), yaml_config(name)
    solver, matching, train = cfg.SOLVER, cfg.MODEL.MGD.MATCHING, lazy.train
    assert (train.max_iter, train.init_checkpoint) == (solver.MAX_ITER, cfg.MODEL.WEIGHTS)
    assert (train.checkpointer.period, train.output_dir) == (solver.CHECKPOINT_PERIOD, cfg.OUTPUT_DIR)
    assert OmegaConf.to_container(train.matching) == {
        "num_batches": matching.NUM_BATCHES,
        "periods": matching.PERIODS,
        "milestones": matching.MILESTONES,
    }
    teacher = lazy.model.backbone.teacher
    assert teacher.config_file == cfg.MODEL.MGD.TEACHER.CONFIG_FILE

    loader = lazy.dataloader.train
    assert (loader.dataset.names,) == cfg.DATASETS.TRAIN and (lazy.dataloader.test.dataset.names,) == cfg.DATASETS.TEST
    assert loader.total_batch_size == solver.IMS_PER_BATCH
    assert loader.mapper.image_format == lazy.dataloader.test.mapper.image_format == cfg.INPUT.FORMAT
    assert loader.mapper.use_instance_mask == cfg.MODEL.MASK_ON
    assert tuple(loader.mapper.augmentations[0].short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN

    parameter = torch.nn.Linear(1, 1)
    lazy.optimizer.params.model = parameter
    group = instantiate(lazy.optimizer).param_groups[0]
    assert [group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")] == [
        solver.BASE_LR, solver.MOMENTUM, solver.NESTEROV, solver.WEIGHT_DECAY
    ]  # fmt: skip
    multiplier = instantiate(lazy.lr_multiplier)
    expected = build_lr_scheduler(cfg, torch.optim.SGD(parameter.parameters(), lr=1.0))
    for iteration in (0, 500, 2000, 59999, 60000, 79999, 80000, 89999):
        expected.last_epoch = iteration
        assert [multiplier(iteration / train.max_iter)] == pytest.approx(expected.get_lr(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_entry_is_left_over(name):
    assert set(model_zoo.get_config(name)) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}


@pytest.mark.slow
def test_a_saved_config_builds_the_same(tmp_path):
    cfg = model_zoo.get_config(NAMES[0])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert list(instantiate(saved.model).state_dict()) == list(instantiate(cfg.model).state_dict())


def test_detectron2s_own_pieces_are_not_changed():
    before = OmegaConf.to_yaml(detectron2.model_zoo.get_config("common/train.py").train)
    model_zoo.get_config(NAMES[0])
    assert OmegaConf.to_yaml(detectron2.model_zoo.get_config("common/train.py").train) == before

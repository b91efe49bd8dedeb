"""projects/Classification: the recipes are the published ones, and each of them builds and trains."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from classification import recipes
from classification.mapper import ClassificationMapper
from detectron2.config import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from toy_images import cub_folder, dues, picture, write_photos

from mgd_det.engine import lazy_trainer
from mgd_det.engine.lazy_config import read_config

CONFIGS = Path(__file__).parents[2] / "projects" / "Classification" / "configs"
RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.py"))
DISTILLED = [name for name in RECIPES if "_mgd" in name]


def recipe(name: str) -> DictConfig:
    return read_config(str(CONFIGS / name), [])


# ------------------------------------------------------------------ as published
# Images, batch size, base rate, weight decay, nesterov, epochs, first epochs of the drops.
PUBLISHED = {
    "imagenet/MobileNetV1": (1281167, 256, 0.1, 1e-4, True, 130, [41, 71, 91]),
    "imagenet/MobileNetV1_mgd_R50": (1281167, 256, 0.1, 1e-4, True, 130, [41, 71, 91]),
    **{
        f"cub/{name}": (5994, 64, 0.01, 1e-4, True, 120, [31, 61, 81])
        for name in ("R50", "MobileNetV2", "ShuffleNetV2", "MobileNetV2_mgd_R50", "ShuffleNetV2_mgd_kd_R50")
    },
    **{
        f"cifar100/{name}": (50000, 64, 0.05, 5e-4, False, 240, [150, 180, 210])
        for name in ("resnet32x4", "resnet20", "resnet20_mgd_resnet32x4")
    },
    "unsupervised/linear_R18": (1281167, 256, 30.0, 0.0, False, 100, [60, 80]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_schedule(name):
    images, batch_size, rate, decay, nesterov, epochs, drops = PUBLISHED[name]
    cfg = recipe(f"{name}.py")
    per_epoch = -(-images // batch_size)
    assert cfg.train.max_iter == epochs * per_epoch and cfg.dataloader.train.total_batch_size == batch_size
    optimizer = cfg.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.nesterov) == (rate, 0.9, nesterov)
    assert optimizer.weight_decay == optimizer.params.weight_decay_norm == decay
    scheduler = instantiate(cfg.lr_multiplier)
    for number, drop in enumerate(drops, start=1):
        before, after = (scheduler((drop * per_epoch + step) / cfg.train.max_iter) for step in (-1, 0))
        assert (before, after) == (pytest.approx(0.1 ** (number - 1)), pytest.approx(0.1**number))


def test_moco_has_the_published_schedule():
    cfg = recipe("unsupervised/moco_R18_mgd_R50.py")
    per_epoch = 1281167 // 256
    assert cfg.train.max_iter == 200 * per_epoch and cfg.optimizer.lr == 0.03
    model = cfg.model
    assert (model.dim, model.queue_size, model.momentum, model.temperature) == (128, 65536, 0.999, 0.2)
    matching = cfg.train.matching
    updates = dues(list(matching.periods), list(matching.milestones), end=cfg.train.max_iter)
    assert updates == [epoch * per_epoch for epoch in (1, 2, 3, 6, 9, 15, 26, 43, 74, 126)]


@pytest.mark.parametrize(
    "name, epochs, batches",
    [
        ("imagenet/MobileNetV1_mgd_R50.py", 1, 80),
        ("cub/MobileNetV2_mgd_R50.py", 2, 94),
        ("cub/ShuffleNetV2_mgd_R50.py", 2, 94),
        ("unsupervised/moco_R18_mgd_R50.py", 1, 80),
    ],
)
def test_recipe_matches_as_the_authors_do(name, epochs, batches):
    cfg = recipe(name)
    matching, backbone = cfg.train.matching, cfg.model.backbone
    assert matching.source == "measured" and matching.num_batches == batches
    assert matching.periods[0] == epochs * cfg.train.eval_period
    assert (backbone.reducer, backbone.norm) == ("amp", "BN")
    stages = [text.rpartition("=")[2] for text in backbone.positions]
    weights = [{"res2": 1 / 8, "res3": 1 / 4, "res4": 1 / 2, "res5": 1.0}[stage] for stage in stages]
    assert backbone.losses == {"partial_l2_sum": {"weights": weights, "divisor": 1e4}}
    assert stages == (["res3", "res4", "res5"] if "cub" in name else ["res2", "res3", "res4", "res5"])


def test_kd_is_the_authors():
    cfg = recipe("cub/ShuffleNetV2_mgd_kd_R50.py")
    assert cfg.model.backbone.logits == {"weight": 1.0, "temperature": 1.5}


# ------------------------------------------------------------------ they train
def data(root: Path) -> None:
    for split in ("train", "val"):
        for i in range(8):
            picture(root / "imagenet" / split / f"class{i % 2}" / f"{i}.png", 30 * i, size=(48, 40))
    cub_folder(root / "CUB_200_2011")
    write_photos(root / "photos", 10)


def small(cfg: DictConfig, root: Path, output: Path) -> DictConfig:
    """The same recipe with narrow networks, small images, batches of 4 and random weights of the teacher."""
    cfg.train.update({"output_dir": str(output), "device": "cpu", "init_checkpoint": "", "eval_period": 0, "seed": 1})
    cfg.train.checkpointer.period = 2
    for name in ("train", "test", "matching"):
        if name not in cfg.dataloader:
            continue
        loader = cfg.dataloader[name]
        loader["batch_size" if name == "test" else "total_batch_size"], loader.num_workers = 4, 0
        if "fashion" in str(loader.dataset._target_):
            loader.dataset.update({"root": str(root / "photos"), "images": 8})
        if "cifar" in str(loader.dataset._target_):
            loader.dataset = [
                {"image": torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy(), "label": i} for i in range(8)
            ]
    shrink(cfg)
    if "queue_size" in cfg.model:
        cfg.model.queue_size = 8
    if "matching" in cfg.train:
        cfg.train.matching.num_batches = 2
        if "milestones" not in cfg.train.matching or not cfg.train.matching.milestones:
            cfg.train.matching.periods = [2]
        torch.manual_seed(5)
        network = instantiate(cfg.model.backbone.teacher.network)
        prefix = "" if hasattr(network, "backbone") else "backbone."
        path = output.parent / f"{output.name}_teacher.pth"
        torch.save({"model": {prefix + name: tensor for name, tensor in network.state_dict().items()}}, path)
        cfg.model.backbone.teacher.weights = str(path)
    return cfg


def shrink(node) -> None:
    """Make crops small and networks narrow, wherever they are in a config."""
    if isinstance(node, ListConfig):
        for part in node:
            shrink(part)
    if not isinstance(node, DictConfig):
        return
    called = node.get("_target_", "")
    target = called if isinstance(called, str) else f"{called.__module__}.{called.__qualname__}"
    if "torchvision.transforms" in target and "size" in node and node.size != 32:
        node.size = 64
    if target.endswith("networks.resnet"):
        node.width = 8
    if "MobileNet" in target or "mobilenet" in target:
        node.width_mult = 0.25
    if target.endswith("ShuffleNetV2"):
        node.width_mult = 0.5
    for part in list(node.keys()):
        shrink(OmegaConf.select(node, str(part)) if not OmegaConf.is_interpolation(node, part) else None)


def metrics(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name, tmp_path, monkeypatch):
    data(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = small(recipe(name), tmp_path, tmp_path / "run")
    cfg.train.max_iter = 2
    lazy_trainer.train(cfg)
    found = metrics(tmp_path / "run")
    expected = {"loss_contrast" if "moco" in name else "loss_cls"}
    if "_mgd" in name:
        stages = [text.partition("=")[0].replace(".", "_") for text in cfg.model.backbone.positions]
        kind = "mgd" if "partial_l2" in cfg.model.backbone.losses else "partial_l2_sum"
        expected |= {f"loss_{kind}_{stage}" for stage in stages}
    expected |= {"loss_kd_logits"} if "_kd" in name else set()
    assert {key for key in found if key.startswith("loss_")} == (expected if len(expected) > 1 else set())
    assert all(found[key] == found[key] and found[key] > 0 for key in (*found.keys() & expected, "total_loss"))
    if "moco" not in name:
        assert 0 <= found["accuracy/top1"] <= found["accuracy/top5"] <= 100
    weights = torch.load(tmp_path / "run" / "model_final.pth", weights_only=False)["model"]
    assert not [key for key in weights if "mgd" in key]


class CountingMapper(ClassificationMapper):
    """Counts the images that it has mapped."""

    images = 0

    def __call__(self, entry):
        CountingMapper.images += 1
        return super().__call__(entry)


@pytest.mark.slow
@pytest.mark.parametrize("has_own", [True, False])
def test_a_measured_matching_takes_the_batches_of_its_own_loader(tmp_path, has_own):
    data(tmp_path)
    cfg = small(recipe("fashion/ShuffleNetV2_mgd_R50.py"), tmp_path, tmp_path / "run")
    cfg.train.max_iter = 1
    cfg.train.matching.source = "measured"
    dataset = dict(cfg.dataloader.train.dataset)
    cfg.dataloader.matching = recipes.train_loader(dataset, None, batch_size=3, workers=0) if has_own else None
    cfg.dataloader["matching" if has_own else "train"].mapper._target_ = CountingMapper
    before = CountingMapper.images
    lazy_trainer.train(cfg)
    # Two batches of three, and none of the training's; or two batches of four, and that of the training's step.
    assert CountingMapper.images - before == (2 * 3 if has_own else 3 * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unsupervised/moco_R18_mgd_R50.py", "fashion/ShuffleNetV2_mgd_R50.py"])
def test_a_resumed_training_is_the_same(name, tmp_path, monkeypatch):
    data(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = small(recipe(name), tmp_path, tmp_path / "run")
    cfg.train.max_iter = 4
    cfg.model.backbone.logits = None if "moco" in name else {"weight": 1.0, "temperature": 1.5}
    lazy_trainer.train(cfg)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again, ignore=shutil.ignore_patterns("*final*", "*_0000003*"))
    (again / "last_checkpoint").write_text("model_0000001.pth")
    cfg.train.output_dir = str(again)
    lazy_trainer.train(cfg, resume=True)
    one, two = (
        torch.load(folder / "model_final.pth", weights_only=False)["model"] for folder in (tmp_path / "run", again)
    )
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key]))] == []

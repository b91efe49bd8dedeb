"""projects/Classification: data sets, mapper, schedules, and imported weights."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
import torchvision
from classification import datasets
from classification.classifier import Classifier
from classification.mapper import ClassificationMapper
from classification.moco import MoCo
from classification.networks import DepthwiseMobileNetV2, resnet
from classification.schedules import (
    cosine_multipliers,
    epochwise,
    iterations_per_epoch,
    matching_at,
    matching_every,
    step_multipliers,
)
from classification.weights import read_weights, renamed
from detectron2.config import instantiate
from torchvision import transforms
from toy_images import cub_folder, dues, picture, write_photos

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import ShuffleNetV2


# ------------------------------------------------------------------ data sets
@pytest.mark.parametrize("name", ["val", "valid"])
def test_image_folder_numbers_the_classes_by_name(tmp_path, monkeypatch, name):
    for i, kind in enumerate(("ant", "bee")):
        picture(tmp_path / "imagenet" / name / kind / "0.png", i)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    entries = datasets.image_folder("val")
    assert [(entry["file_name"].split("/")[-2], entry["label"]) for entry in entries] == [("ant", 0), ("bee", 1)]


def test_cub_follows_its_tables_and_holds_a_part_out(tmp_path):
    cub_folder(tmp_path / "cub", images=60)
    parts = {split: datasets.cub(split, str(tmp_path / "cub")) for split in ("train", "test", "fit", "held_out")}
    files = {split: {entry["file_name"] for entry in entries} for split, entries in parts.items()}
    assert {int(name.split("/")[-1][:-4]) for name in files["test"]} == set(range(3, 61, 3))
    assert len(files["train"]) == 40 and files["train"].isdisjoint(files["test"])
    assert files["fit"] | files["held_out"] == files["train"] and files["fit"].isdisjoint(files["held_out"])
    assert len(files["held_out"]) == 2 * (20 // datasets.HELD_OUT_EVERY)
    assert all(entry["label"] == int(entry["file_name"].split("/")[-2][:3]) - 1 for entry in parts["train"])


def test_cifar100_in_memory(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (5, 3072), dtype=np.uint8), [3, 1, 99, 0, 7]
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, content in (
        ("test", {"data": pixels, "fine_labels": labels}),
        ("meta", {"fine_label_names": ["x"] * 100}),
    ):
        (folder / name).write_bytes(pickle.dumps(content))
    # The real files have known sums.
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_load_meta", lambda self: None)
    entries = datasets.cifar100("test", str(tmp_path))
    assert [entry["label"] for entry in entries] == labels
    assert np.array_equal(entries[2]["image"][4, 9], pixels[2].reshape(3, 32, 32)[:, 4, 9])


@pytest.mark.parametrize(
    "load, words",
    [
        (lambda root: datasets.image_folder("train", root), "image-net.org.*train"),
        (lambda root: datasets.cub("test", root), "images.txt.*data.caltech.edu"),
        (lambda root: datasets.cifar100("train", root), "cs.toronto.edu.*cifar-100-python"),
        (lambda root: datasets.fashion_mnist("test", root=root), "t10k-images"),
        (lambda root: datasets.image_folder("test", root), "split.*'test'.*train, val"),
        (lambda root: datasets.fashion_mnist("test", -1, root=root), r"dataset\.images.*-1"),
        (lambda root: datasets.fashion_mnist("test", side=0, root=root), r"dataset\.side.*0"),
    ],
)
def test_a_missing_set_is_one_message(tmp_path, load, words):
    with pytest.raises(UserError, match=words):
        load(str(tmp_path / "nothing"))


def test_fashion_mnist_is_scaled_bilinearly(tmp_path):
    pixels = write_photos(tmp_path)
    entries = datasets.fashion_mnist("test", images=4, side=56, root=str(tmp_path))
    assert [entry["label"] for entry in entries] == [0, 1, 2, 3]
    # Twice the size: a pixel lies a quarter of a pixel from its nearest one, which so counts 3/4 in each direction.
    rows = pixels[2].astype(np.float64)
    expected = (9 * rows[4, 7] + 3 * rows[4, 8] + 3 * rows[5, 7] + rows[5, 8]) / 16
    assert abs(float(entries[2]["image"][9, 15]) - expected) <= 0.5
    assert np.array_equal(datasets.fashion_mnist("train", root=str(tmp_path))[5]["image"], pixels[5])


# ------------------------------------------------------------------ the mapper
def test_mapper_gives_rgb_pixels_and_two_different_views(tmp_path):
    gray = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    mapped = ClassificationMapper(transforms.Compose([]))({"image": gray, "label": 4})
    assert mapped["label"] == 4 and "image_key" not in mapped
    assert torch.equal(mapped["image"], torch.from_numpy(np.stack([gray] * 3)))
    assert torch.equal(ClassificationMapper()({"image": gray, "label": 4})["image"], mapped["image"])
    color = np.stack([gray, gray.T, 255 - gray], axis=2)
    for mapper in (ClassificationMapper(), ClassificationMapper(transforms.Compose([]))):
        assert torch.equal(mapper({"image": color, "label": 4})["image"], torch.from_numpy(color).permute(2, 0, 1))
    torch.manual_seed(0)
    both = ClassificationMapper(transforms.RandomCrop(8), two_views=True)({"image": gray, "label": 4})
    assert both["image"].shape == both["image_key"].shape == (3, 8, 8)
    assert not torch.equal(both["image"], both["image_key"])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        ClassificationMapper(transforms.Compose([]))({"file_name": str(broken), "label": 0})


# ------------------------------------------------------------------ schedules
def test_step_multipliers_are_the_authors_warm_up_and_drops():
    rates = step_multipliers(130, drops=[41, 71, 91], warmup=10)
    assert len(rates) == 130
    assert rates[0] == pytest.approx(0.1) and rates[5] == pytest.approx(0.1 * 0.5 + 0.5)
    for epoch, expected in ((10, 1), (40, 1), (41, 0.1), (70, 0.1), (71, 0.01), (91, 0.001), (129, 0.001)):
        assert rates[epoch] == pytest.approx(expected)


def test_cosine_multipliers_count_from_the_first_epoch():
    rates = cosine_multipliers(200, warmup=3)
    assert rates[:2] == pytest.approx([0.001, 0.001 * 2 / 3 + 1 / 3])
    for epoch in (3, 100, 199):
        assert rates[epoch] == pytest.approx(0.5 * (1 + math.cos(math.pi * epoch / 200)))
    assert cosine_multipliers(4)[0] == 1.0


def test_a_rate_holds_for_all_iterations_of_its_epoch():
    per_epoch = iterations_per_epoch(10, 4)
    assert per_epoch == 3
    scheduler = instantiate(epochwise([1.0, 0.5, 0.25], per_epoch))
    assert [scheduler(i / 9) for i in range(9)] == [1.0] * 3 + [0.5] * 3 + [0.25] * 3


def test_matching_updates_are_due_after_the_named_epochs():
    epochs = [1, 2, 3, 6, 9, 15, 26, 43, 74, 126]
    assert dues(**matching_at(epochs, 50), end=200 * 50) == [50 * epoch for epoch in epochs]
    rng = random.Random(0)
    for _ in range(20):
        some = sorted(rng.sample(range(1, 90), 5))
        assert dues(**matching_at(some, 7), end=90 * 7) == [7 * epoch for epoch in some]
    assert dues(**matching_every(2, 5), end=31) == [10, 20, 30]
    with pytest.raises(ArgumentError, match=r"epochs.*\[2, 1\]"):
        matching_at([2, 1], 5)


# ------------------------------------------------------------------ weights
PIXELS = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}


def features_of(network: torch.nn.Module, classifier: torch.nn.Module, images: torch.Tensor):
    with torch.no_grad():
        return network.eval()(images), classifier.logits(classifier.eval().backbone(images))


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v2"])
def test_weights_of_torchvision_give_its_own_outputs(name, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    tensors = renamed(read_weights(str(path)), str(path))
    backbone, last = {
        "resnet18": (lambda: resnet(depth=18), {}),
        "shufflenet_v2_x0_5": (
            lambda: ShuffleNetV2(norm="BN", width_mult=0.5, out_features=["res5"]),
            {"last_channels": 1024},
        ),
        "mobilenet_v2": (DepthwiseMobileNetV2, {"last_channels": 1280, "last_activation": "relu6"}),
    }[name]
    model = Classifier(backbone=backbone(), num_classes=5, **PIXELS, **last)
    # Strict: every tensor has its place.
    model.load_state_dict(tensors)
    if name == "mobilenet_v2":  # torchvision's with the authors' strides
        network.features[7].conv[1][0].stride = (1, 1)
        network.features[11].conv[1][0].stride = (2, 2)
    theirs, ours = features_of(network, model, torch.rand(2, 3, 64, 64))
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_weights_of_moco_lose_their_prefix_key_encoder_and_queue(tmp_path):
    network = torchvision.models.resnet18(num_classes=8)
    network.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8))
    state = {f"module.encoder_q.{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {"module.encoder_k.conv1.weight": torch.zeros(1), "module.queue": torch.zeros(8, 4)}
    path = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, path)
    tensors = renamed(read_weights(str(path)), str(path))
    model = MoCo(backbone=resnet(depth=18), key_backbone=resnet(depth=18), dim=8, queue_size=4, **PIXELS)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and not [name for name in missing if not name.startswith(("key_", "queue"))]
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        theirs = network.eval()(images)
        ours = model.eval()([{"image": image} for image in images])
    assert torch.allclose(theirs / theirs.norm(dim=1, keepdim=True), ours, atol=1e-5)


def test_a_classifier_of_other_classes_starts_with_a_linear_layer_of_its_own(tmp_path):
    trained, model = (Classifier(backbone=resnet(depth=18, width=4), num_classes=n, **PIXELS) for n in (4, 3))
    path = tmp_path / "resnet.pth"
    torch.save({"model": trained.state_dict()}, path)
    checkpointer = WeightsCheckpointer(model)
    checkpointer.load(str(path))
    assert sorted(checkpointer.unset_keys) == ["linear.bias", "linear.weight"]
    assert torch.equal(model.backbone.stem.conv1.weight, trained.backbone.stem.conv1.weight)


@pytest.mark.parametrize("content", [{"model": {"blocks.0.weight": torch.zeros(2)}}, {"epoch": 3}, [1]])
def test_other_weights_are_one_message(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"other\.pth"):
        renamed(read_weights(str(path)), str(path))
    with pytest.raises(UserError, match="nothing"):
        read_weights(str(tmp_path / "nothing.pth"))

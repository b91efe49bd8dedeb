"""Weights by name. All downloads come from a local server."""

import hashlib
import io
import sys
from contextlib import contextmanager
from urllib.error import URLError

import malicious
import pytest
import torch
import torchvision
from checkpoint.networks import R18, Detector, load
from web import serving

from mgd_det.checkpoint import WeightsCheckpointer, fetch_named_weights
from mgd_det.checkpoint.sources import TORCHVISION_DETECTORS, TORCHVISION_NETWORKS
from mgd_det.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@contextmanager
def released(monkeypatch, weights, state_dict, name=None):
    """Within it, ``weights`` of torchvision are these, by a name that begins their hash, or by another name."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    name = name or f"net-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    with serving({f"/{name}": buffer.getvalue()}) as url:
        monkeypatch.setattr(weights.value, "url", f"{url}/{name}")
        yield


def test_torchvision_names_are_fetched_and_converted(monkeypatch, tmp_path):
    resnet = torchvision.models.resnet18(weights=None)
    with released(monkeypatch, torchvision.models.ResNet18_Weights.IMAGENET1K_V1, resnet.state_dict()):
        load(Detector("build_resnet_fpn_backbone", R18), "torchvision://resnet18")
    # Now from torch's cache: the server is closed.
    detector = Detector("build_resnet_fpn_backbone", R18)
    load(detector, "torchvision://resnet18")
    assert torch.equal(detector.bottom_up.stem.conv1.weight, resnet.conv1.weight)
    [cached] = (tmp_path / "hub" / "checkpoints").glob("net-*.pth")
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"the SHA-256 of its download .*Delete {cached}"):
        load(detector, "torchvision://resnet18")


def test_a_download_that_is_not_what_its_name_says(monkeypatch, tmp_path):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    with released(monkeypatch, weights, {}, name="net-01234567.pth"):
        with pytest.raises(UserError, match="weights torchvision://resnet18: the download .* failed: .*hash"):
            WeightsCheckpointer(torch.nn.Linear(1, 1)).load("torchvision://resnet18")
    assert list((tmp_path / "hub" / "checkpoints").glob("*.pth")) == []


def test_code_in_a_torchvision_file_does_not_run(monkeypatch, tmp_path):
    content = malicious.weights(tmp_path / "marker")
    with released(monkeypatch, torchvision.models.ResNet18_Weights.IMAGENET1K_V1, content):
        with pytest.raises(UserError, match=r"weights torchvision://resnet18: it refers to \w+.mkdir"):
            WeightsCheckpointer(torch.nn.Linear(1, 1)).load("torchvision://resnet18")
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_a_detector_by_name(monkeypatch):
    net = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    weights = torchvision.models.detection.RetinaNet_ResNet50_FPN_Weights.DEFAULT
    detector = Detector(
        "build_fcos_resnet_fpn_backbone", ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]], fpn_channels=256
    )
    with released(monkeypatch, weights, net.state_dict()):
        checkpointer = load(detector, "torchvision://retinanet_resnet50_fpn")
    assert checkpointer.unset_keys == []
    assert torch.equal(detector.backbone.fpn_lateral3.weight, net.backbone.fpn.inner_blocks[0][0].weight)


@pytest.mark.parametrize("name", [*TORCHVISION_NETWORKS, *TORCHVISION_DETECTORS])
def test_every_name_has_weights(name):
    assert torchvision.models.get_model_weights(name).DEFAULT.url.startswith("https://download.pytorch.org/models/")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("torchvision://resnet19", "Did you mean resnet18"),
        ("torchvision://MobileNetV2", "Did you mean mobilenet_v2"),
        ("torchvision://retinanet_r50_fpn", "Did you mean retinanet_resnet50_fpn"),
        ("torchvision://vgg16", "Choose from resnet18, "),
        ("torchvision://", "Choose from resnet18, "),
    ],
)
def test_unknown_torchvision_names(name, hint):
    with pytest.raises(UserError) as error:
        WeightsCheckpointer(torch.nn.Linear(1, 1)).load(name)
    assert str(error.value).startswith(f"weights {name}: ") and hint in str(error.value)


def test_a_download_that_fails(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match="resnet18-.* failed: URLError: .*not known.*give the path of the file"):
        WeightsCheckpointer(torch.nn.Linear(1, 1)).load("torchvision://resnet18")


def test_timm_names_are_fetched_and_converted(monkeypatch):
    timm = pytest.importorskip("timm")
    create, created = timm.create_model, []

    def create_model(name, pretrained=False, **kwargs):
        assert pretrained and not kwargs
        assert timm.models._builder._CHECK_HASH
        created.append((name, create(name)))
        return created[-1][1]

    monkeypatch.setattr(timm, "create_model", create_model)
    detector = Detector("build_resnet_fpn_backbone", R18)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load(detector, "timm://resnet18.a1_in1k")
    [(name, net)] = created
    assert name == "resnet18.a1_in1k"
    assert torch.equal(detector.bottom_up.stem.conv1.weight, net.conv1.weight)
    # What is drawn after loading does not depend on where the weights come from.
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("timm://resnet18.a1_in2k", "Did you mean resnet18.a1_in1k"),
        ("timm://efficientnet_bo.ra_in1k", "efficientnet_b0.ra_in1k"),
        ("timm://test", "timm.list_models"),
        ("timm://", "timm.list_models"),
    ],
)
def test_unknown_timm_names(name, hint):
    pytest.importorskip("timm")
    with pytest.raises(UserError) as error:
        fetch_named_weights(name)
    assert repr(name.partition("://")[2]) in str(error.value) and hint in str(error.value)


def test_a_timm_download_that_fails(monkeypatch):
    timm = pytest.importorskip("timm")

    def fail(*args, **kwargs):
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub\nand more")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match="weights timm://resnet18: .*https://huggingface.* failed: .*on the Hub"):
        WeightsCheckpointer(torch.nn.Linear(1, 1)).load("timm://resnet18")


def test_timm_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm is not installed: pip install timm"):
        fetch_named_weights("timm://resnet18")

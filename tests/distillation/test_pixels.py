"""The converter, against what Detectron2's own detectors make of the same images."""

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model

from mgd_det.distillation import PixelFormat
from mgd_det.distillation.pixels import PixelConverter
from mgd_det.errors import ArgumentError

# Detectron1's models, and torchvision's in the scale 0..255
CAFFE = PixelFormat("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
IMAGENET = PixelFormat("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
IMAGENET_BGR = PixelFormat("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
HALF = PixelFormat("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
CAFFE_RGB = PixelFormat("RGB", (123.675, 116.28, 103.53), (1.0, 1.0, 1.0))
SIZES = [(60, 90), (96, 40), (33, 64)]


@pytest.fixture(scope="module")
def detector():
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return build_model(cfg)


def photos():
    """RGB images of 0..255, of different sizes."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def preprocessed(detector, pixels):
    """The batch that a detector of this format makes of the photos."""
    detector.pixel_mean = torch.tensor(pixels.mean).view(-1, 1, 1)
    detector.pixel_std = torch.tensor(pixels.std).view(-1, 1, 1)
    order = ["RGB".index(channel) for channel in pixels.format]
    inputs = [{"image": torch.from_numpy(photo[:, :, order].transpose(2, 0, 1).copy())} for photo in photos()]
    return detector.preprocess_image(inputs)


@pytest.mark.parametrize(
    "student, teacher",
    [
        (IMAGENET, CAFFE),
        (CAFFE, IMAGENET),
        (IMAGENET, IMAGENET_BGR),
        (IMAGENET_BGR, CAFFE),
        (CAFFE_RGB, IMAGENET),
        (HALF, CAFFE),  # where the means differ, the padding is not the affine of 0
        (CAFFE, HALF),
        (HALF, IMAGENET),
    ],
)
def test_the_batch_is_the_one_that_the_teachers_detector_would_make(detector, student, teacher):
    batch = preprocessed(detector, student)
    expected = preprocessed(detector, teacher).tensor
    before = batch.tensor.clone()
    converted = PixelConverter(student, teacher)(batch.tensor, batch.image_sizes)
    assert not torch.allclose(batch.tensor, expected, atol=0.1)
    torch.testing.assert_close(converted, expected, atol=2e-4, rtol=1e-5)
    assert torch.equal(batch.tensor, before)
    for image, (height, width) in zip(converted, SIZES):
        assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()


def test_without_sizes_every_pixel_counts():
    generator = np.random.default_rng(1)
    rgb = generator.integers(0, 256, (2, 3, 5, 7)).astype(np.float64)

    def column(values):
        return np.reshape(values, (1, 3, 1, 1))

    student = torch.from_numpy((rgb - column(IMAGENET.mean)) / column(IMAGENET.std)).float()
    teacher = (rgb[:, ::-1] - column(CAFFE.mean)) / column(CAFFE.std)
    np.testing.assert_allclose(PixelConverter(IMAGENET, CAFFE)(student).numpy(), teacher, atol=2e-4)


def test_there_and_back():
    x = torch.randn(2, 3, 8, 8)
    there = PixelConverter(IMAGENET, CAFFE)(x)
    torch.testing.assert_close(PixelConverter(CAFFE, IMAGENET)(there), x, atol=1e-5, rtol=1e-5)


def test_the_same_format_returns_the_batch_itself():
    x = torch.randn(2, 3, 8, 8)
    same = PixelFormat("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert PixelConverter(IMAGENET, same)(x, [(4, 4), (8, 8)]) is x


def test_a_photo_of_one_channel():
    gray, other = PixelFormat("L", (100.0,), (10.0,)), PixelFormat("L", (50.0,), (5.0,))
    x = torch.full((1, 1, 2, 2), 3.0)  # a pixel of 130
    assert PixelConverter(gray, other)(x).unique().tolist() == pytest.approx([16.0])


@pytest.mark.parametrize(
    "student, teacher, named",
    [
        (IMAGENET, PixelFormat("L", (110.0,), (50.0,)), ["'RGB' with 3 channels", "'L' with 1"]),
        (PixelFormat("YUV-BT.601", (1.0,) * 3, (1.0,) * 3), CAFFE, ["'YUV-BT.601'", "'BGR'"]),
        (PixelFormat("RGB", (1.0,) * 6, (1.0,) * 6), CAFFE, ["6 channels", "with 3"]),
    ],
)
def test_colours_that_cannot_be_brought_together(student, teacher, named):
    with pytest.raises(ArgumentError) as error:
        PixelConverter(student, teacher)
    for part in ["pixels", *named]:
        assert part in str(error.value)


def test_from_a_config():
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = list(IMAGENET.mean)
    cfg.MODEL.PIXEL_STD = list(IMAGENET.std)
    assert PixelFormat.from_config(cfg) == IMAGENET

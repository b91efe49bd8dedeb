"""The parts that the configs of this project share, as LazyConfig nodes."""

from typing import Any, Dict, Optional, Sequence

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.model_zoo import get_config
from omegaconf import DictConfig, OmegaConf
from torchvision import transforms as T

from classification.authors_loss import authors_losses
from classification.classifier import Classifier
from classification.evaluator import AccuracyEvaluator
from classification.mapper import ClassificationMapper
from classification.networks import resnet
from classification.schedules import iterations_per_epoch
from mgd_det.distillation import PixelFormat
from mgd_det.modeling import distilled_backbone, pretrained_teacher

# ImageNet's, of RGB images on the scale 0..255.
PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]
# Images on which the authors measure the costs of a matching, 80 batches of 256.
MATCHING_IMAGES = 20480
WEIGHTS = "output/classification/weights"  # where the README's commands put weights


# ---------------------------------------------------------------------- images
def augmented(size: int = 224) -> Any:
    """Return the usual training transform: a random crop of 8 % to 100 % of the image, mirrored at random."""
    return L(T.Compose)(transforms=[L(T.RandomResizedCrop)(size=size), L(T.RandomHorizontalFlip)()])


def centre_crop(size: int = 224, side: int = 256) -> Any:
    """Return the usual transform of a test: the shorter side scaled to ``side``, and the centre cut out."""
    return L(T.Compose)(transforms=[L(T.Resize)(size=side), L(T.CenterCrop)(size=size)])


def two_view_augmented(size: int = 224) -> Any:
    """Return the transform of MoCo-v2 (arXiv:2003.04297): crop, colours, grey, blur, mirror."""
    jitter = L(T.ColorJitter)(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    blur = L(T.GaussianBlur)(kernel_size=23, sigma=[0.1, 2.0])
    return L(T.Compose)(
        transforms=[
            L(T.RandomResizedCrop)(size=size, scale=[0.2, 1.0]),
            L(T.RandomApply)(transforms=[jitter], p=0.8),
            L(T.RandomGrayscale)(p=0.2),
            L(T.RandomApply)(transforms=[blur], p=0.5),
            L(T.RandomHorizontalFlip)(),
        ]
    )


def cifar_augmented() -> Any:
    """Return the usual transform of CIFAR: 4 pixels of padding, a random crop of 32 x 32, mirrored at random."""
    return L(T.Compose)(transforms=[L(T.RandomCrop)(size=32, padding=4), L(T.RandomHorizontalFlip)()])


def train_loader(
    dataset: Any, transform: Optional[Any], batch_size: int, workers: int = 8, two_views: bool = False
) -> Any:
    """Return a loader of random batches; in a training it can resume at any batch."""
    return L(build_detection_train_loader)(
        dataset=dataset,
        mapper=L(ClassificationMapper)(transform=transform, two_views=two_views),
        total_batch_size=batch_size,
        aspect_ratio_grouping=False,
        num_workers=workers,
    )


def test_loader(dataset: Any, transform: Optional[Any], batch_size: int = 64, workers: int = 8) -> Any:
    """Return a loader that gives every image once."""
    mapper = L(ClassificationMapper)(transform=transform)
    return L(build_detection_test_loader)(dataset=dataset, mapper=mapper, batch_size=batch_size, num_workers=workers)


def loaders(train: Any, test: Any) -> DictConfig:
    """Return the node ``dataloader``. A config adds ``matching`` to it, the batches of a "measured" matching."""
    return OmegaConf.create({"train": train, "test": test, "evaluator": L(AccuracyEvaluator)()}, flags=_OBJECTS)


# ---------------------------------------------------------------------- models
def classifier(backbone: Any, num_classes: int, **options: Any) -> Any:
    """Return a :class:`Classifier` of RGB images with ImageNet's mean and standard deviation."""
    pixels = {"pixel_mean": list(PIXEL_MEAN), "pixel_std": list(PIXEL_STD)}
    return L(Classifier)(backbone=backbone, num_classes=num_classes, **pixels, **options)


def resnet50(**options: Any) -> Any:
    """Return the teacher's backbone: torchvision's ResNet-50 with frozen batch norms."""
    return L(resnet)(**{"depth": 50, "norm": "FrozenBN", **options})


def pixels() -> Any:
    """Return the pixel format of :func:`classifier`."""
    return L(PixelFormat)(format="RGB", mean=list(PIXEL_MEAN), std=list(PIXEL_STD))


def distilled(
    student: Any,
    teacher: Any,
    weights: str,
    positions: Sequence[str],
    losses: Optional[Dict[str, Any]] = None,
    **options: Any,
) -> Any:
    """Return the student's backbone under MGD as the paper's classification experiments have it.

    Absolute max pooling, a batch norm of the loss's own, and the authors' weights; :func:`our_losses` gives ours.

    Args:
        student: node of the student's backbone.
        teacher: node of the teacher: a backbone, or a whole classifier, which the distillation of logits needs.
        weights: of the teacher, from import_weights.py or a training of this project.
        positions: see ``MODEL.MGD.POSITIONS``.
        losses: None for the authors'.
        options: other arguments of ``distilled_backbone``.
    """
    return L(distilled_backbone)(
        student=student,
        teacher=L(pretrained_teacher)(network=teacher, weights=weights, pixels=pixels()),
        pixels=pixels(),
        positions=list(positions),
        **{
            "reducer": "amp",
            "norm": "BN",
            "losses": authors_losses(positions) if losses is None else losses,
            "logits": None,
            **options,
        },
    )


def our_losses(weight: float = 0.5) -> Dict[str, Any]:
    """Return mgd_det's own scale of the loss: the same at every image size, width and teacher."""
    return {"partial_l2": {"weights": [weight], "scale": "target"}}


# ---------------------------------------------------------------------- training
def sgd(lr: float, weight_decay: float = 1e-4, nesterov: bool = True) -> Any:
    """Return SGD with momentum 0.9 whose weight decay counts for every parameter, as in torch's own examples."""
    node = get_config("common/optim.py").SGD
    node.lr, node.weight_decay, node.nesterov = lr, weight_decay, nesterov
    node.params.weight_decay_norm = weight_decay
    return node


def training(output: str, epochs: int, per_epoch: int) -> DictConfig:
    """Return the node ``train``: an evaluation and a checkpoint after each epoch.

    Args:
        output: name of the output folder below output/classification.
        epochs: of the training.
        per_epoch: iterations of an epoch.
    """
    train = get_config("common/train.py").train
    train.output_dir = f"output/classification/{output}"
    train.max_iter, train.eval_period = per_epoch * epochs, per_epoch
    train.checkpointer = {"period": per_epoch, "max_to_keep": 2}
    train.init_checkpoint = ""
    train.report = {"enabled": False}  # mgd_det's report is of detectors
    return train


def measured(images: int, batch_size: int, **periods: Any) -> Dict[str, Any]:
    """Return the arguments of MatchingUpdate with which the authors measure: in eval mode, on at most 20 480 images."""
    batches = iterations_per_epoch(min(images, MATCHING_IMAGES), batch_size)
    return {"source": "measured", "num_batches": batches, **periods}


_OBJECTS = {"allow_objects": True}

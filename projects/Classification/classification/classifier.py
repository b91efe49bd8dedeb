"""A classifier as a Detectron2 model: a backbone, global average pooling, a linear layer.

Shape shorthand in this module: B images, C channels, K classes, maps of H x W.
"""

from typing import Any, Dict, List, Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from torch import nn
from torchvision.ops import Conv2dNormActivation

from classification.logits import ClassifierLogits
from mgd_det.distillation import Teacher
from mgd_det.errors import ArgumentError, UserError, check_choice, named_as
from mgd_det.modeling.head_distillation import HeadOptions

_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6}


def add_classifier_config(cfg: CfgNode) -> None:
    """Add ``MODEL.CLASSIFIER``, which :class:`Classifier` reads."""
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Outputs of the linear layer; > 0.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Feature of the backbone that is classified.
    cfg.MODEL.CLASSIFIER.IN_FEATURE = "res5"
    # Channels of a 1 x 1 convolution (with batch norm) before the pooling, as MobileNetV2 (1280) and ShuffleNetV2
    # (1024) have it; 0 for none.
    cfg.MODEL.CLASSIFIER.LAST_CHANNELS = 0
    # Activation of that convolution: "relu" or "relu6".
    cfg.MODEL.CLASSIFIER.LAST_ACTIVATION = "relu"
    # Share of the target that all classes get equally, in [0, 1).
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Keep weights and maps in channels-last memory format, with which convolutions are faster.
    cfg.MODEL.CLASSIFIER.CHANNELS_LAST = False


@META_ARCH_REGISTRY.register()
class Classifier(nn.Module):
    """Classifies images of equal size.

    An input is a dict with "image", (C, H, W) on the scale 0..255, and in training "label", an int. In training the
    result is {"loss_cls": scalar}; in evaluation it is a list of {"logits": (K,)}, one for each image.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_feature: str = "res5",
        last_channels: int = 0,
        last_activation: str = "relu",
        label_smoothing: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            backbone: returns ``in_feature``.
            pixel_mean: one for each colour channel, on the scale 0..255.
            pixel_std: the same.
            num_classes: see ``MODEL.CLASSIFIER``.
            in_feature: see ``MODEL.CLASSIFIER``.
            last_channels: see ``MODEL.CLASSIFIER``.
            last_activation: see ``MODEL.CLASSIFIER``.
            label_smoothing: see ``MODEL.CLASSIFIER``.
            channels_last: see ``MODEL.CLASSIFIER``.

        Raises:
            UserError: a value is not as described there.
        """
        super().__init__()
        with named_as(lambda argument: f"MODEL.CLASSIFIER.{argument.upper()} (model.{argument})"):
            for argument, value, least in (("num_classes", num_classes, 1), ("last_channels", last_channels, 0)):
                if isinstance(value, bool) or not (isinstance(value, int) and value >= least):
                    raise ArgumentError(argument, f"is {value!r}; give a whole number >= {least}")
            check_choice("in_feature", in_feature, list(backbone.output_shape()))
            check_choice("last_activation", last_activation, _ACTIVATIONS)
            if not 0 <= label_smoothing < 1:
                raise ArgumentError("label_smoothing", f"is {label_smoothing!r}; give a number in [0, 1)")
        self.backbone = backbone
        self.num_classes = num_classes
        self._in_feature, self._label_smoothing = in_feature, label_smoothing
        channels = backbone.output_shape()[in_feature].channels
        self.last_conv: nn.Module = nn.Identity()
        if last_channels:
            self.last_conv = Conv2dNormActivation(
                channels, last_channels, kernel_size=1, activation_layer=_ACTIVATIONS[last_activation]
            )
        self.linear = nn.Linear(last_channels or channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self._memory_format)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        """Return the arguments from ``MODEL.CLASSIFIER`` and Detectron2's keys of the backbone and the pixels."""
        arguments = {key.lower(): value for key, value in cfg.MODEL.CLASSIFIER.items()}
        pixels = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
        return {**arguments, **pixels, "backbone": build_backbone(cfg)}

    def forward(self, inputs: List[Dict[str, Any]]) -> Any:
        """Return losses in training and logits in evaluation; see the class.

        Raises:
            UserError: in training, a label is not one of the classes.
        """
        images = normalised(inputs, self.pixel_mean, self.pixel_std)
        logits = self.logits(self.backbone(images.contiguous(memory_format=self._memory_format)))
        if not self.training:
            return [{"logits": row} for row in logits]
        labels = [x["label"] for x in inputs]
        wrong = [label for label in labels if not 0 <= label < self.num_classes]
        if wrong:  # on a GPU, the loss would end in an assertion without a number
            raise UserError(
                f"an image has the label {wrong[0]}, but MODEL.CLASSIFIER.NUM_CLASSES (model.num_classes) is "
                f"{self.num_classes}: set it to the number of classes of the data, counted from 0"
            )
        target = torch.tensor(labels, device=logits.device)
        return {"loss_cls": F.cross_entropy(logits.float(), target, label_smoothing=self._label_smoothing)}

    def logits(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return (B, K) from the backbone's outputs by name, each (B, C, H, W)."""
        pooled: torch.Tensor = self.linear(self.last_conv(features[self._in_feature]).mean(dim=(2, 3)))
        return pooled

    def head_distillation(self, teacher: Teacher, options: HeadOptions) -> ClassifierLogits:
        """Return what distils this classifier's logits, where it is the teacher."""
        return ClassifierLogits(teacher, options)


def normalised(
    inputs: Sequence[Mapping[str, Any]], mean: torch.Tensor, std: torch.Tensor, key: str = "image"
) -> torch.Tensor:
    """Return the images of a batch, (B, C, H, W), as ``(image - mean) / std`` on the device of ``mean``.

    Args:
        inputs: Detectron2's inputs.
        mean: (C, 1, 1).
        std: (C, 1, 1).
        key: entry of the image.

    Raises:
        ValueError: the images differ in size.
    """
    sizes = {tuple(x[key].shape) for x in inputs}
    if len(sizes) > 1:
        raise ValueError(f"the images of a batch have the sizes {sorted(sizes)}: crop them to one size in the mapper")
    images = torch.stack([x[key].to(mean.device) for x in inputs])
    return (images - mean) / std

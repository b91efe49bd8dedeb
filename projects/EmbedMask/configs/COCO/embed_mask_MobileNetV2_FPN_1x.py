"""embed_mask_MobileNetV2_FPN_1x.yaml as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from embedmask import EmbedMask, EmbedMaskHead, MaskInference, MaskLoss, PixelHead

from mgd_det.modeling.backbone import MobileNetV2

from .....configs.common.coco_1x import dataloader, lr_multiplier, optimizer, pixel_mean, pixel_std, train  # noqa: F401

model = get_config("common/models/fcos.py").model
model._target_ = EmbedMask
model.pixel_mean, model.pixel_std = pixel_mean, pixel_std
model.backbone.bottom_up = L(MobileNetV2)(
    norm="FrozenBN", width_mult=1.0, out_features=["res2", "res3", "res4", "res5"], freeze_at=1
)
model.head._target_ = EmbedMaskHead
model.head.input_shape = [L(ShapeSpec)(channels=256, stride=stride) for stride in (8, 16, 32, 64, 128)]
model.head.dim = 32
model.head.prior_distance = 2.0
model.pixel_head = L(PixelHead)(
    input_shape=L(ShapeSpec)(channels=256, stride=8), dim="${..head.dim}", num_convs=4, norm="GN"
)
model.mask_loss = L(MaskLoss)(box_padding=0.1, mask_weight=0.5, smooth_weight=0.1)
model.mask_inference = L(MaskInference)(threshold=0.53)

dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.instance_mask_format = "bitmask"
optimizer.lr = 0.01
train.init_checkpoint = "torchvision://mobilenet_v2"
train.output_dir = "./output/embed_mask/coco/MobileNetV2_FPN_1x"

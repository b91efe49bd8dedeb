"""EmbedMask, a one-stage instance segmentation. Importing this package registers it for yaml configs."""

from embedmask.config_keys import add_embed_mask_keys
from embedmask.coupling import mask_probability
from embedmask.lovasz import lovasz_hinge
from embedmask.mask_inference import MaskInference
from embedmask.mask_loss import MaskLoss
from embedmask.meta_arch import EmbedMask
from embedmask.pixel_head import PixelHead
from embedmask.proposal_head import EmbedMaskHead
from mgd_det.config import register_detector

register_detector("EmbedMask", kind="FCOS", node="EMBED_MASK", add_keys=add_embed_mask_keys)

__all__ = [
    "EmbedMask",
    "EmbedMaskHead",
    "MaskInference",
    "MaskLoss",
    "PixelHead",
    "add_embed_mask_keys",
    "lovasz_hinge",
    "mask_probability",
]

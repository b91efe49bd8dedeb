"""The keys of MODEL.EMBED_MASK. Detector and towers read MODEL.FCOS, as FCOS does."""

from detectron2.config import CfgNode as CN


def add_embed_mask_keys(cfg: CN) -> None:
    """Add ``MODEL.EMBED_MASK``. It needs MODEL.MASK_ON True, with which the masks are loaded."""
    cfg.MODEL.EMBED_MASK = CN()
    # Dimensions of the embeddings; > 2. The first two also hold where a pixel or a proposal is.
    cfg.MODEL.EMBED_MASK.DIM = 32
    # Convolutions of the mask tower, without the last; >= 0.
    cfg.MODEL.EMBED_MASK.NUM_CONVS = 4
    # Norm layer of the mask tower: "GN", "BN", "SyncBN" or "" for none.
    cfg.MODEL.EMBED_MASK.NORM = "GN"
    # Distance of the embeddings at which a pixel is of the object with a probability of 0.5 when training begins; > 0.
    cfg.MODEL.EMBED_MASK.PRIOR_DISTANCE = 2.0
    # The mask loss counts the pixels in the object's box and around it by this part of its width and height; >= 0.
    cfg.MODEL.EMBED_MASK.BOX_PADDING = 0.1
    # Weights of the two losses; >= 0.
    cfg.MODEL.EMBED_MASK.MASK_WEIGHT = 0.5
    cfg.MODEL.EMBED_MASK.SMOOTH_WEIGHT = 0.1
    # Probability above which a pixel is in the mask, in (0, 1).
    cfg.MODEL.EMBED_MASK.MASK_THRESH_TEST = 0.53

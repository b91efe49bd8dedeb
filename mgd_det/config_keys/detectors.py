"""Keys of the students' backbones and of detectors that have no yaml config in Detectron2."""

from detectron2.config import CfgNode as CN


def add_student_keys(cfg: CN) -> None:
    """Add the keys of the students' backbones."""
    # --------------------------------------------- MobileNet students (V1, V2, V3-Large, V3-Small)
    cfg.MODEL.MOBILENETS = CN()
    # Norm layers: "FrozenBN", "BN", "SyncBN" or "GN".
    cfg.MODEL.MOBILENETS.NORM = "FrozenBN"
    # Multiplier of every layer's channels; > 0.
    cfg.MODEL.MOBILENETS.WIDTH_MULT = 1.0
    # Features that the backbone returns, of "res2".."res5".
    cfg.MODEL.MOBILENETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]

    # ------------------------------------------------------------------- ShuffleNetV2 students
    cfg.MODEL.SHUFFLENETS = CN()
    # As MODEL.MOBILENETS.NORM.
    cfg.MODEL.SHUFFLENETS.NORM = "FrozenBN"
    # 0.5, 1.0, 1.5 or 2.0: the networks of the paper.
    cfg.MODEL.SHUFFLENETS.WIDTH_MULT = 1.0
    # Features that the backbone returns, of "res2".."res5".
    cfg.MODEL.SHUFFLENETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]

    # ------------------------------------------------------- students of timm (`pip install timm`)
    cfg.MODEL.TIMM = CN()
    # A model of timm that has `features_only`, such as "efficientnet_b0".
    cfg.MODEL.TIMM.NAME = ""
    # As MODEL.MOBILENETS.NORM, in place of the model's batch norms. Other norm layers stay.
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # Features that the backbone returns, of "res2".."res5".
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]


def add_fcos_keys(cfg: CN) -> None:
    """Add ``MODEL.FCOS``: Detectron2's FCOS has no yaml config in Detectron2."""
    # Detectron2's FCOS (MODEL.META_ARCHITECTURE: "FCOS"), which has no yaml config in Detectron2.
    cfg.MODEL.FCOS = CN()
    # Classes, without background.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # FPN levels, shallow to deep.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the head's two towers, without the last.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    # Norm layer of the towers: "GN", "BN", "SyncBN" or "" for none.
    cfg.MODEL.FCOS.NORM = "GN"
    # Initial probability of every class, in (0, 1).
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Points within this distance from an object's centre are positive; in strides.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Threshold of sqrt(class probability * centre-ness), in [0, 1].
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Candidates of each level before non-maximum suppression, and its IoU threshold.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

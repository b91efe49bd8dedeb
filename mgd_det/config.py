"""The config keys that this project adds to Detectron2's."""

from contextlib import contextmanager
from typing import Any, Iterator, Sequence

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from mgd_det.distillation.position_losses import DEFAULT_LOSSES
from mgd_det.errors import UserError
from mgd_det.files.safe_yaml import merge_yaml_file
from mgd_det.files.student_files import weights_beside

# MODEL.BACKBONE.NAME of a config with distillation.
MGD_BACKBONE = "build_mgd_backbone"


def add_mgd_config(cfg: CN) -> None:
    """Add the keys of this project to ``cfg``: distillation (MODEL.MGD), students, FCOS, data and training."""
    _add_student_config(cfg)
    _add_fcos_config(cfg)
    _add_data_config(cfg)
    _add_solver_config(cfg)
    _add_test_config(cfg)
    _add_report_config(cfg)
    _add_distillation_config(cfg)
    # Keys of version 0.1 without effect today. Old config.yaml files still load, with a warning.
    for key in ("MODEL.MGD.COMPILE_STUDENT", "MODEL.MGD.TEACHER.OWN_STREAM"):
        cfg.register_deprecated_key(key)


def _add_distillation_config(cfg: CN) -> None:
    # Read if MODEL.BACKBONE.NAME is MGD_BACKBONE (INHERIT and TEACHER: always).
    cfg.MODEL.MGD = CN()
    # Name in BACKBONE_REGISTRY of the student's backbone.
    cfg.MODEL.MGD.STUDENT_BACKBONE = "build_retinanet_resnet_fpn_backbone"
    # Parts of the teacher that the student starts from, by name and shape of their tensors: "fpn" (the backbone without
    # its bottom-up network) and "head" (all outside the backbone). Read without distillation too.
    cfg.MODEL.MGD.INHERIT = []
    # Distil each step whose iteration is a multiple of this; > 0. The teacher does not run in the others.
    cfg.MODEL.MGD.INTERVAL = 1
    # Iteration from which on nothing is distilled and the teacher does not run; > 0, or 0 to distil to the end.
    cfg.MODEL.MGD.STOP_ITER = 0
    # Features to distil: stages of the bottom-up networks ("res2".."res5"), levels of the FPNs ("p3"..), or both. If
    # the two networks name a feature differently: "<student's>=<teacher's>" ("res2.expansion=res2").
    cfg.MODEL.MGD.POSITIONS = ["res2", "res3", "res4", "res5"]
    # How the teacher's channels of a group become one: "amp" (absolute max pooling), "rd" (random drop) or "sm" (sparse
    # matching: one teacher channel for each student channel).
    cfg.MODEL.MGD.REDUCER = "amp"
    # Source of a teacher channel's margin: "norm" (weight and bias of its last norm layer), "measured" (mean of its
    # negative values while the matching is measured), or "auto" ("norm", but "measured" if there is no norm layer or
    # its statistics are folded into the weights).
    cfg.MODEL.MGD.MARGIN = "auto"
    # Norm layer of the student's features in the loss, in training only: "GN", "BN", "SyncBN" or another name of
    # detectron2.layers.get_norm; "" for none.
    cfg.MODEL.MGD.NORM = "GN"
    # Groups of "GN". If they do not divide a position's channels, the greatest common divisor of both.
    cfg.MODEL.MGD.NORM_GROUPS = 32

    cfg.MODEL.MGD.LOSS = CN()
    # Losses at every position: any number of names in POSITION_LOSS_REGISTRY, each with its own node below. WEIGHTS
    # there: one weight >= 0 for each position, in the order of POSITIONS, or one for all. A loss of weight 0 is not
    # computed. DECAY there: how the weight falls to 0 at STOP_ITER or at the end of training: "constant" (not at all),
    # "linear" or "cosine".
    cfg.MODEL.MGD.LOSS.NAMES = list(DEFAULT_LOSSES)

    # Partial L2 behind a marginal ReLU, the loss of MGD (Heo et al., ICCV 2019). Logged as loss_mgd_<position>.
    cfg.MODEL.MGD.LOSS.PARTIAL_L2 = CN()
    cfg.MODEL.MGD.LOSS.PARTIAL_L2.WEIGHTS = [DEFAULT_LOSSES["partial_l2"]["weights"]]
    cfg.MODEL.MGD.LOSS.PARTIAL_L2.DECAY = "constant"
    # "target" (target and margin are divided by the target's root mean square, as measured in the first window of the
    # matching, and the squared error by B*C*H*W), "mean" (the squared error is divided by B*C*H*W) or "authors" (it is
    # divided by the factors of the authors' Detectron2 code on 8 GPUs, for any batch size and number of GPUs).
    cfg.MODEL.MGD.LOSS.PARTIAL_L2.SCALE = "target"

    # Plain L2: every value counts, also where the teacher's is negative. Logged as loss_l2_<position>.
    cfg.MODEL.MGD.LOSS.L2 = CN()
    cfg.MODEL.MGD.LOSS.L2.WEIGHTS = [0.5]
    cfg.MODEL.MGD.LOSS.L2.DECAY = "constant"
    # As PARTIAL_L2.SCALE: "mean" or "target", here by the root mean square of the batch's target.
    cfg.MODEL.MGD.LOSS.L2.SCALE = "target"

    # Channel-wise KL divergence (CWD, Shu et al., ICCV 2021). Logged as loss_cwd_<position>.
    cfg.MODEL.MGD.LOSS.CWD = CN()
    cfg.MODEL.MGD.LOSS.CWD.WEIGHTS = [1.0]
    cfg.MODEL.MGD.LOSS.CWD.DECAY = "constant"
    # Temperature of the softmax over a channel's pixels; > 0.
    cfg.MODEL.MGD.LOSS.CWD.TEMPERATURE = 1.0

    # Pearson correlation (PKD, Cao et al., NeurIPS 2022). Logged as loss_pkd_<position>.
    cfg.MODEL.MGD.LOSS.PKD = CN()
    # The authors' weights are 10 (RetinaNet, FCOS) and 6 (R-CNNs) at each level of the FPN.
    cfg.MODEL.MGD.LOSS.PKD.WEIGHTS = [10.0]
    cfg.MODEL.MGD.LOSS.PKD.DECAY = "constant"

    # Attention transfer (Zagoruyko and Komodakis, ICLR 2017); needs no matching. Logged as loss_at_<position>.
    cfg.MODEL.MGD.LOSS.AT = CN()
    cfg.MODEL.MGD.LOSS.AT.WEIGHTS = [1.0]
    cfg.MODEL.MGD.LOSS.AT.DECAY = "constant"
    # Power of the absolute values that an attention map sums over channels; >= 1.
    cfg.MODEL.MGD.LOSS.AT.POWER = 2.0

    # Knowledge distillation of classification logits (Hinton et al., 2015). Teacher and student must be of one kind
    # (both RetinaNet, both FCOS, both R-CNN) and have the same classes. It runs the teacher's heads too. Logged as
    # loss_kd_logits.
    cfg.MODEL.MGD.LOGITS = CN()
    # Weight; 0 for none.
    cfg.MODEL.MGD.LOGITS.WEIGHT = 0.0
    # As of the other losses.
    cfg.MODEL.MGD.LOGITS.DECAY = "constant"
    # Temperature that the logits of both are divided by; > 0.
    cfg.MODEL.MGD.LOGITS.TEMPERATURE = 1.0
    # Dense detectors only: an anchor's class counts with |teacher's - student's probability|^FOCAL_GAMMA; >= 0.
    cfg.MODEL.MGD.LOGITS.FOCAL_GAMMA = 2.0

    cfg.MODEL.MGD.TEACHER = CN()
    # The teacher's config: a path, or a name in Detectron2's or this project's model zoo.
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE = ""
    # The teacher's weights: path or URL. "": those of the model zoo for CONFIG_FILE, or else its MODEL.WEIGHTS.
    cfg.MODEL.MGD.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: a list KEY, VALUE, KEY, VALUE...
    cfg.MODEL.MGD.TEACHER.OPTS = []
    # Name prefixes of the teacher's tensors that its weights may lack, such as "backbone.fpn_output3". Any other tensor
    # that they lack is an error.
    cfg.MODEL.MGD.TEACHER.ALLOW_UNSET = []
    # Precision of the teacher's backbone and features, independent of the student's: "float32", "bfloat16" or "float16"
    # (on a GPU only). The heads stay in float32. "auto": the precision of SOLVER.AMP.ENABLED if that is on, or else
    # float32. Half precision changes a feature by about 0.01 (bfloat16) or 0.001 (float16) of its largest value. Values
    # beyond 65504, the largest of float16, stop the training.
    cfg.MODEL.MGD.TEACHER.DTYPE = "auto"
    # Keep its weights and maps in channels-last memory format, with which half-precision convolutions are faster.
    cfg.MODEL.MGD.TEACHER.CHANNELS_LAST = False
    # Compile it by torch.compile for images of any size. This takes minutes once a run, and again for some new sizes.
    cfg.MODEL.MGD.TEACHER.COMPILE = False
    # Fuse its batch norms into its convolutions. In float32 a feature changes by about 1e-6 of its largest value.
    cfg.MODEL.MGD.TEACHER.FOLD_NORM = True

    cfg.MODEL.MGD.MATCHING = CN()
    # How the student's channels find the teacher's, for each position, in the order of POSITIONS, or one for all:
    # "assignment" (MGD's matching), "identity" (channel i learns from channel i; for equal widths), "adapter" (a
    # learned 1 x 1 convolution from the student's to the teacher's channels, in training only, as FitNets has it),
    # "random" (a random assignment that stays, to compare with), or "auto" ("identity" at levels of the FPN that are
    # equally wide, because an inherited FPN has the teacher's order of channels; "assignment" elsewhere).
    cfg.MODEL.MGD.MATCHING.KINDS = ["auto"]
    # Source of the features for an update of the matching: "online" (training itself, in the steps before the update,
    # without extra forwards) or "measured" (forwards of both networks in eval mode on batches of its own).
    cfg.MODEL.MGD.MATCHING.SOURCE = "online"
    # Iterations between two updates of the matching; > 0. PERIODS[i] applies from iteration MILESTONES[i - 1] on, so
    # there is one more period than milestones. The first matching is solved in the first step and again after
    # NUM_BATCHES steps ("measured": before training).
    cfg.MODEL.MGD.MATCHING.PERIODS = [5000, 31000]
    cfg.MODEL.MGD.MATCHING.MILESTONES = [20000]
    # Number of steps before an update whose features it uses; > 0. If the training does not have as many, the first
    # window has a tenth of its steps. "measured": number of batches that an update runs.
    cfg.MODEL.MGD.MATCHING.NUM_BATCHES = 1000


def merge_config(path: str, opts: Sequence[Any], name: str = "") -> CN:
    """Merge a yaml file and overrides into the defaults of Detectron2 and this project.

    Args:
        path: the yaml file, read by :mod:`mgd_det.files.safe_yaml`; "" for none.
        opts: KEY, VALUE, KEY, VALUE...
        name: what the user calls the file, for the error.

    Raises:
        UserError: the file or an override does not fit the config.
    """
    cfg = get_cfg()
    add_mgd_config(cfg)
    overrides = f" with {list(opts)}" if opts else ""
    with _user_errors(f"config {name or path or '(defaults)'}{overrides}"):
        if path:
            cfg = merge_yaml_file(cfg, path)
            cfg.MODEL.WEIGHTS = weights_beside(path, cfg.MODEL.WEIGHTS)
        _merge_overrides(cfg, opts)
    return cfg


def override(cfg: CN, opts: Sequence[Any]) -> None:
    """Merge overrides KEY, VALUE, KEY, VALUE... into a config, which must not be frozen.

    Raises:
        UserError: one does not fit the config.
    """
    with _user_errors(f"overrides {list(opts)}"):
        _merge_overrides(cfg, opts)


def _merge_overrides(cfg: CN, opts: Sequence[Any]) -> None:
    if any(not isinstance(key, str) for key in opts[::2]):
        raise UserError("overrides are a list KEY, VALUE, KEY, VALUE...")
    cfg.merge_from_list(list(opts))
    defaults = CN({"MODEL": CN()})
    _add_distillation_config(defaults)
    _check_types(cfg.MODEL.MGD, defaults.MODEL.MGD, "MODEL.MGD")


@contextmanager
def _user_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, TypeError, AssertionError, OSError, yaml.YAMLError, UserError) as e:
        raise UserError(f"{what}: {e}") from e


def _check_types(node: CN, defaults: CN, path: str) -> None:
    """Check values that Detectron2 merges without a check: None, and the parts of lists.

    A list that is empty by default holds strings, except for overrides (OPTS), which hold anything.

    Raises:
        UserError: a value has another type than its default.
    """
    for key, default in defaults.items():
        name, value = f"{path}.{key}", node[key]
        if isinstance(default, CN) and isinstance(value, CN):
            _check_types(value, default, name)
        elif value is None or isinstance(default, CN):
            raise UserError(f"{name} is {value!r}; its default is {default!r}: give a value of that type")
        elif isinstance(default, list) and key != "OPTS":
            kinds = {float: (int, float), int: (int,), str: (str,)}[type(default[0]) if default else str]
            for part in value:
                if type(part) not in kinds:
                    raise UserError(f"{name} is {value!r}; {part!r} is not of type {kinds[-1].__name__}")


def without_distillation(cfg: CN) -> CN:
    """Return a copy of ``cfg`` that builds the plain student."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE:
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.MGD.STUDENT_BACKBONE
    return cfg


def plain_student_config(cfg: CN) -> CN:
    """Return a copy of ``cfg`` that builds the plain student, without this project's keys that the student ignores.

    If the student is one of Detectron2's own detectors, only keys of Detectron2 are left.
    """
    plain = without_distillation(cfg)
    backbone = plain.MODEL.BACKBONE.NAME
    for node, is_read in (
        ("MGD", False),
        ("MOBILENETS", "mobilenet" in backbone),
        ("SHUFFLENETS", "shufflenet" in backbone),
        ("TIMM", "timm" in backbone),
        ("FCOS", plain.MODEL.META_ARCHITECTURE == "FCOS"),
    ):
        if not is_read:
            plain.MODEL.pop(node)
    for key in ("COCO_FOLDER", "BROKEN_INPUT", "KEYPOINT_NAMES", "KEYPOINT_FLIP_PAIRS"):
        plain.DATASETS.pop(key)
    for key in ("CHECKPOINTS_KEPT", "ACCUMULATE", "NON_FINITE"):
        plain.SOLVER.pop(key)
    plain.TEST.pop("FAST_EVAL")
    for key in ("REPORT", "WANDB"):
        plain.pop(key)
    return plain


def class_head(cfg: CN) -> CN:
    """Return the node whose NUM_CLASSES the detector of ``cfg`` reads."""
    nodes = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    return cfg.MODEL[nodes.get(cfg.MODEL.META_ARCHITECTURE, "ROI_HEADS")]


def _add_student_config(cfg: CN) -> None:
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


def _add_fcos_config(cfg: CN) -> None:
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


def _add_data_config(cfg: CN) -> None:
    # A data set in COCO's format instead of DATASETS.TRAIN and TEST: give annotations and image folder, or neither.
    # The flags --train-json, --train-images, --val-json and --val-images of tools/train_net.py set these keys.
    cfg.DATASETS.COCO_FOLDER = CN()
    cfg.DATASETS.COCO_FOLDER.TRAIN_JSON = ""
    cfg.DATASETS.COCO_FOLDER.TRAIN_IMAGES = ""
    cfg.DATASETS.COCO_FOLDER.VAL_JSON = ""
    cfg.DATASETS.COCO_FOLDER.VAL_IMAGES = ""
    # What to do about broken images and annotations (tools/check_dataset.py lists them): "refuse" to train, or "skip"
    # and count them.
    cfg.DATASETS.BROKEN_INPUT = "refuse"
    # Names of the keypoints (MODEL.KEYPOINT_ON) in the order of the annotations, for sets that have none in their
    # metadata (keypoint_names); []: those of the json's categories ("keypoints").
    cfg.DATASETS.KEYPOINT_NAMES = []
    # Pairs of these names that change places in a mirrored image: [["eye_a", "eye_b"]]; []: names that differ in "left"
    # and "right" or "l" and "r" ("left_eye" and "right_eye").
    cfg.DATASETS.KEYPOINT_FLIP_PAIRS = []


def _add_solver_config(cfg: CN) -> None:
    # Number of periodic checkpoints that OUTPUT_DIR keeps: the newest, also from before a resume; >= 0, 0 for all.
    # model_final.pth is always kept.
    cfg.SOLVER.CHECKPOINTS_KEPT = 0
    # Number of batches of SOLVER.IMS_PER_BATCH images whose gradients are averaged in one step; > 0. The learning rate
    # is not scaled.
    cfg.SOLVER.ACCUMULATE = 1
    # What to do about an infinite or NaN loss or gradient, which never reaches the weights.
    cfg.SOLVER.NON_FINITE = CN()
    # "stop" the training with an error that names loss and images, or "skip" the step (its iteration counts).
    cfg.SOLVER.NON_FINITE.POLICY = "stop"
    # Number of skipped steps in a row that stops the training; > 0.
    cfg.SOLVER.NON_FINITE.MAX_IN_A_ROW = 10


def _add_test_config(cfg: CN) -> None:
    # Compute COCO's AP by hotcoco (`pip install hotcoco`) where it is installed: the same scores in a fraction of the
    # time. False: by pycocotools.
    cfg.TEST.FAST_EVAL = True


def _add_report_config(cfg: CN) -> None:
    # report.html and model_card.md in OUTPUT_DIR at the end of a training.
    cfg.REPORT = CN()
    cfg.REPORT.ENABLED = True
    # OUTPUT_DIR of the same student trained without distillation, to compare with; "" for none.
    cfg.REPORT.ALONE = ""
    # The teacher's scores.json, which --eval-teacher writes; "" for that of OUTPUT_DIR/teacher, if there is one.
    cfg.REPORT.TEACHER_SCORES = ""
    # Licence of the teacher's weights, for the model card; "" for "not stated".
    cfg.REPORT.TEACHER_LICENCE = ""
    # Number of images with objects that only the teacher finds; >= 0.
    cfg.REPORT.EXAMPLES = 4

    # Write losses and scores to Weights & Biases too (`pip install wandb`).
    cfg.WANDB = CN()
    cfg.WANDB.ENABLED = False
    cfg.WANDB.PROJECT = "mgd_det"
    # Name of the run; "" for one that Weights & Biases makes up.
    cfg.WANDB.NAME = ""

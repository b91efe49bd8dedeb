"""Keys of data, solver, evaluation and report."""

from detectron2.config import CfgNode as CN


def add_data_keys(cfg: CN) -> None:
    """Add the keys of ``DATASETS``."""
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


def add_solver_keys(cfg: CN) -> None:
    """Add the keys of ``SOLVER``."""
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
    # An exponential moving average of the weights, evaluated beside them (scores "ema/...") and saved as model_ema.pth.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    # Weight of the average in a step, in (0, 1): it is over about 1 / (1 - DECAY) steps; in step n at most
    # (1 + n) / (10 + n).
    cfg.SOLVER.EMA.DECAY = 0.999
    # First iteration to average, in [0, SOLVER.MAX_ITER).
    cfg.SOLVER.EMA.START = 0


def add_test_keys(cfg: CN) -> None:
    """Add the keys of ``TEST``."""
    # Compute COCO's AP by hotcoco (`pip install hotcoco`) where it is installed: the same scores in a fraction of the
    # time. False: by pycocotools.
    cfg.TEST.FAST_EVAL = True
    # Keep the weights of the best evaluation as model_best.pth.
    cfg.TEST.BEST = CN()
    # The score that counts, by its name in metrics.json, such as "bbox/AP" or, with SOLVER.EMA, "ema/bbox/AP"; "" to
    # keep none.
    cfg.TEST.BEST.METRIC = ""


def add_report_keys(cfg: CN) -> None:
    """Add ``REPORT`` and ``WANDB``."""
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

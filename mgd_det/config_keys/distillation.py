"""Keys of distillation: MODEL.MGD."""

from detectron2.config import CfgNode as CN

from mgd_det.distillation.position_losses import DEFAULT_LOSSES


def add_distillation_keys(cfg: CN) -> None:
    """Add ``MODEL.MGD``."""
    # Read if MODEL.BACKBONE.NAME is MGD_BACKBONE (INHERIT, INHERIT_CHANNELS and TEACHER: always).
    cfg.MODEL.MGD = CN()
    # Name in BACKBONE_REGISTRY of the student's backbone.
    cfg.MODEL.MGD.STUDENT_BACKBONE = "build_retinanet_resnet_fpn_backbone"
    # Parts of the teacher that the student starts from, by name and shape of their tensors: "fpn" (the backbone without
    # its bottom-up network) and "head" (all outside the backbone). Read without distillation too.
    cfg.MODEL.MGD.INHERIT = []
    # Read where the student's FPN or heads have fewer channels than the teacher's, or separable convolutions where the
    # teacher has dense ones: which of the teacher's channels it inherits.
    cfg.MODEL.MGD.INHERIT_CHANNELS = CN()
    # "reconstruction" (the channels from which what the next layers compute is rebuilt best), "energy" (the largest
    # mean squares), "weight" (the largest weights in the layers that read them), "energy_weight" (the product of both),
    # "random" (to compare with) or "none" (inherit only tensors of equal shape).
    cfg.MODEL.MGD.INHERIT_CHANNELS.CRITERION = "reconstruction"
    # Batches of the training set, of rank 0, on which the teacher's channels are measured; > 0. "weight" and "random"
    # without COMPENSATE measure nothing.
    cfg.MODEL.MGD.INHERIT_CHANNELS.NUM_BATCHES = 20
    # Fold the channels that are left out into the weights that read them, by least squares, fit weight and bias of
    # group norms to the groups that are left, and fit separable convolutions to the outputs of dense ones.
    cfg.MODEL.MGD.INHERIT_CHANNELS.COMPENSATE = True
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
    # negative values while the matching is measured), or "auto" ("norm" behind a batch norm, "measured" behind none,
    # behind another norm layer, and where the statistics are folded into the weights).
    cfg.MODEL.MGD.MARGIN = "auto"
    # Norm layer of the student's features in the loss, in training only: "GN", "BN", "SyncBN" or another name of
    # detectron2.layers.get_norm; "" for none.
    cfg.MODEL.MGD.NORM = "GN"
    # Groups of "GN". If they do not divide a position's channels, the greatest common divisor of both; half as many
    # where each channel would be a group of its own.
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

    # Activation boundaries (AB, Heo et al., AAAI 2019): the sign of the teacher's values. Logged as loss_ab_<position>.
    cfg.MODEL.MGD.LOSS.AB = CN()
    cfg.MODEL.MGD.LOSS.AB.WEIGHTS = [1.0]
    cfg.MODEL.MGD.LOSS.AB.DECAY = "constant"
    # How far the student's value behind its norm layer must be on the teacher's side of 0; > 0.
    cfg.MODEL.MGD.LOSS.AB.MARGIN = 1.0

    # Flow of solution procedure (FSP, Yim et al., CVPR 2017): products of the channels of a position and the next one
    # in POSITIONS. Logged as loss_fsp_<position>; the last position has none, and its weight is not read.
    cfg.MODEL.MGD.LOSS.FSP = CN()
    cfg.MODEL.MGD.LOSS.FSP.WEIGHTS = [1.0]
    cfg.MODEL.MGD.LOSS.FSP.DECAY = "constant"

    # A mask that weights the pixels of all losses at positions; padding counts 0.
    cfg.MODEL.MGD.LOSS.MASK = CN()
    # "" (none), "boxes" (the ground truth's, weighted by area: FGD, Yang et al., CVPR 2022) or "scores" (the highest
    # class score of the teacher's RetinaNet or FCOS, or objectness of its RPN: FRS, Du et al., NeurIPS 2021; the
    # teacher's FPN and that head run for it).
    cfg.MODEL.MGD.LOSS.MASK.NAME = ""
    # "boxes" only: what each box, and what the pixels outside all boxes of an image, count in sum; >= 0. The ratio of
    # the defaults is that of FGD's authors.
    cfg.MODEL.MGD.LOSS.MASK.FOREGROUND = 1.0
    cfg.MODEL.MGD.LOSS.MASK.BACKGROUND = 0.5

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

    # Boxes, by GIoU, weighted by the teacher's score: of every anchor of a dense detector, or of the proposals of an
    # R-CNN. Teacher and student as for LOGITS. Logged as loss_kd_boxes.
    cfg.MODEL.MGD.BOXES = CN()
    # Weight; 0 for none.
    cfg.MODEL.MGD.BOXES.WEIGHT = 0.0
    # As of the other losses.
    cfg.MODEL.MGD.BOXES.DECAY = "constant"

    # Masks of the foreground proposals of a Mask R-CNN, of their ground-truth class. Teacher and student must both have
    # a mask head and the same classes. Logged as loss_kd_masks.
    cfg.MODEL.MGD.MASKS = CN()
    # Weight; 0 for none.
    cfg.MODEL.MGD.MASKS.WEIGHT = 0.0
    # As of the other losses.
    cfg.MODEL.MGD.MASKS.DECAY = "constant"

    # CrossKD (Wang et al., CVPR 2024): the student's features in the rest of the teacher's head. Both RetinaNet or both
    # FCOS, of the same classes, their heads equally wide. Logged as loss_kd_cross_cls and loss_kd_cross_boxes.
    cfg.MODEL.MGD.CROSS_KD = CN()
    # Weight; 0 for none. The authors' are 1 (RetinaNet) and 0.4 (FCOS).
    cfg.MODEL.MGD.CROSS_KD.WEIGHT = 0.0
    # As of the other losses.
    cfg.MODEL.MGD.CROSS_KD.DECAY = "constant"
    # Weight of the boxes beside the classes' 1; >= 0. The authors' are 1 (RetinaNet) and 1.875 (FCOS).
    cfg.MODEL.MGD.CROSS_KD.BOX_WEIGHT = 1.0
    # Number of convolutions of its own head that a feature of the student passes before it enters the teacher's: 0 for
    # the levels of the FPN, at most what each head has, or -1 for one fewer than the teacher's head has. The authors'
    # are 3 of 4 (RetinaNet) and 2 of 4 (FCOS).
    cfg.MODEL.MGD.CROSS_KD.LAYER = -1

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
    # (on a GPU only). The heads keep weights of float32; like the student's, they compute in half precision where
    # SOLVER.AMP.ENABLED is on. "auto": the precision of SOLVER.AMP.ENABLED if that is on, or else float32. Half
    # precision changes a feature by about 0.01 (bfloat16) or 0.001 (float16) of its largest value. Values beyond 65504,
    # the largest of float16, stop the training.
    cfg.MODEL.MGD.TEACHER.DTYPE = "auto"
    # Keep its weights and maps in channels-last memory format, with which convolutions are faster.
    cfg.MODEL.MGD.TEACHER.CHANNELS_LAST = True
    # Compile it by torch.compile for images of any size. This takes minutes once a run, and again for some new sizes.
    cfg.MODEL.MGD.TEACHER.COMPILE = False
    # Fold its batch norms into its convolutions. In float32 a feature changes by about 1e-6 of its largest value.
    cfg.MODEL.MGD.TEACHER.FOLD_NORM = True

    cfg.MODEL.MGD.MATCHING = CN()
    # How the student's channels find the teacher's, for each position, in the order of POSITIONS, or one for all:
    # "assignment" (MGD's matching), "identity" (channel i learns from channel i; for equal widths), "adapter" (a
    # learned 1 x 1 convolution from the student's to the teacher's channels, in training only, as FitNets has it),
    # "random" (a random assignment that stays, to compare with), "inherited" (channel i learns from the teacher's that
    # it was inherited from; for levels of an inherited FPN), or "auto": "assignment", but at levels of the FPN
    # "identity" if they are equally wide, because an inherited FPN has the teacher's order of channels, and "inherited"
    # if the student inherits a narrower FPN.
    cfg.MODEL.MGD.MATCHING.KINDS = ["auto"]
    # Source of the features for an update of the matching: "online" (training itself, in the steps before the update,
    # without extra forwards) or "measured" (forwards of both networks in eval mode on batches of its own).
    cfg.MODEL.MGD.MATCHING.SOURCE = "online"
    # Iterations between two updates of the matching; > 0. PERIODS[i] applies from iteration MILESTONES[i - 1] on, so
    # there is one more period than milestones. The first matching is solved in the first step and again after
    # NUM_BATCHES steps ("measured": before training).
    cfg.MODEL.MGD.MATCHING.PERIODS = [5000, 31000]
    cfg.MODEL.MGD.MATCHING.MILESTONES = [20000]
    # Number of distilled steps, just before an update, from whose features it is computed; > 0. If the training has
    # fewer, the first window has a tenth of its steps. "measured": number of batches that an update runs.
    cfg.MODEL.MGD.MATCHING.NUM_BATCHES = 1000

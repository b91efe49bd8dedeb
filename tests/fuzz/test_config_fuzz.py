"""Any values of MODEL.MGD: one message of ours that names the key, or a student that learns."""

import types

import pytest
import torch
import toy
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from detectron2.utils.events import EventStorage
from fuzz.budget import examples
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn

from mgd_det.config import MGD_BACKBONE, merge_config
from mgd_det.distillation import PixelFormat, TeacherNetwork
from mgd_det.engine import MatchingUpdate
from mgd_det.errors import UserError, named_as
from mgd_det.modeling import distilled_backbone
from mgd_det.modeling.mgd_backbone import arguments_from_config, config_key
from mgd_det.modeling.teachers import teacher_config, teacher_options

STUDENT = "build_fuzzed_student"
PIXELS = PixelFormat("BGR", (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
TEXTS = [
    "",
    "x",
    "GN",
    "BN",
    "LN",
    "amp",
    "rd",
    "sm",
    "mean",
    "target",
    "authors",
    "auto",
    "norm",
    "measured",
    "online",
]
TEXTS += ["float32", "bfloat16", "float16", "float8", STUDENT, MGD_BACKBONE, "no_such_backbone", "res2=res3", "None"]
NUMBERS = [0, 1, -1, 2, 5, 0.5, -0.5, 1e-30, 1e9, 10**30, float("nan"), float("inf")]
LOSSES = ["partial_l2", "l2", "cwd", "pkd", "at"]
FEATURES = ["res2", "res3", "res4", "res9", "res2=res3", "res3=res3", "=", "", "res2=", "=res2", "res2=res2=res2"]


def any_value():
    plain = st.sampled_from([None, True, False, *NUMBERS, *TEXTS])
    nested = st.sampled_from([[[1]], [["res2"]], [{}], {}, {"res2": 1}, [["partial_l2"]], (), ("res2",), (1, 2)])
    return plain | st.lists(plain, max_size=3) | nested


def value_like(default):
    """Values of the type of a key's default, of which some are right."""
    if isinstance(default, list):
        of_texts = st.lists(st.sampled_from(LOSSES), max_size=3, unique=True) | st.lists(st.sampled_from(FEATURES))
        of_numbers = st.lists(st.sampled_from(NUMBERS), max_size=3) | st.lists(
            st.integers(1, 9), min_size=1, max_size=3
        )
        return of_numbers if default and not isinstance(default[0], str) else of_texts
    by_type = {
        bool: st.booleans(),
        int: st.sampled_from([number for number in NUMBERS if isinstance(number, int)]),
        float: st.sampled_from([number for number in NUMBERS if isinstance(number, float)]),
        str: st.sampled_from(TEXTS),
    }
    return by_type[type(default)]


@st.composite
def changes_of_some_keys(draw):
    changes = {}
    for key in draw(st.lists(st.sampled_from(list(DEFAULTS)), min_size=1, max_size=3, unique=True)):
        if draw(st.integers(0, 4)) == 0:
            changes[key] = draw(any_value())
        elif key.endswith("OPTS"):
            changes[key] = draw(st.sampled_from([["MODEL.FPN.OUT_CHANNELS"], ["MODEL.NO_SUCH", 1], ["SEED", "3"], []]))
        else:
            changes[key] = draw(value_like(DEFAULTS[key]))
    return changes


def leaves(node: CfgNode, path: str = "MODEL.MGD"):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


def nodes_of(key: str) -> list:
    """MODEL.MGD.A, MODEL.MGD.A.B... of a key."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(3, len(parts) + 1)]


# To compile takes minutes.
DEFAULTS = {key: value for key, value in leaves(merge_config("", []).MODEL.MGD) if "COMPILE" not in key}


def resnet(*channels: int) -> ResNet:
    stages = [
        ResNet.make_stage(BasicBlock, 1, stride_per_block=[stride], in_channels=i, out_channels=o, norm="BN")
        for i, o, stride in zip((4, *channels), channels, (1, 2, 2))
    ]
    return ResNet(BasicStem(3, 4, norm="BN"), stages, out_features=["res2", "res3", "res4"])


@pytest.fixture(scope="module", autouse=True)
def student_backbone():
    def build(cfg, input_shape):
        return resnet(4, 6, 8)

    build.__name__ = STUDENT
    BACKBONE_REGISTRY.register(build)
    yield
    del BACKBONE_REGISTRY._obj_map[STUDENT]


class Detector(nn.Module):
    """The least that a backbone can be part of."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch):
        outputs = self.backbone(torch.stack([x["image"] for x in batch]))
        return {"loss_own": sum(x.mean() for x in outputs.values())} if self.training else outputs


def batch():
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.randn(3, 32, 32, generator=generator)} for _ in range(2)]


def train_a_step(cfg: CfgNode) -> dict:
    """As engine/trainer.py puts it together; the teacher is a network without a file."""

    def make_teacher(cfg):
        teacher_config(cfg)
        return TeacherNetwork(resnet(8, 6, 4), PIXELS, options=teacher_options(cfg))

    torch.manual_seed(0)
    with named_as(config_key):
        detector = Detector(distilled_backbone(**arguments_from_config(cfg, ShapeSpec(channels=3), make_teacher)))
    matching = cfg.MODEL.MGD.MATCHING
    with named_as(lambda argument: f"MODEL.MGD.MATCHING.{argument.upper()}"):
        hook = MatchingUpdate(
            detector,
            lambda: [batch()],
            num_batches=matching.NUM_BATCHES,
            periods=matching.PERIODS,
            milestones=matching.MILESTONES,
            source=matching.SOURCE,
        )
    hook.trainer = types.SimpleNamespace(iter=0, start_iter=0, max_iter=5, storage=EventStorage())
    detector.train()
    hook.before_train()
    hook.before_step()
    losses = detector(batch())
    sum(losses.values()).backward()
    hook.after_step()
    return losses


@pytest.mark.slow
@examples(ci=60, nightly=1000)
@given(changes=changes_of_some_keys())
def test_an_error_of_ours_or_a_student_that_learns(changes):
    opts = ["MODEL.BACKBONE.NAME", MGD_BACKBONE, "MODEL.MGD.STUDENT_BACKBONE", STUDENT, "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.MGD.TEACHER.CONFIG_FILE", toy.RETINANET, "MODEL.MGD.POSITIONS", ["res2", "res3", "res4"]]
    opts += [part for change in changes.items() for part in change]
    try:
        cfg = merge_config("", opts)
        losses = train_a_step(cfg)
    except UserError as error:
        message = str(error)
        # Its key, or the node that it is in: where two keys exclude each other, one of them is at fault.
        assert any(node in message for key in changes for node in nodes_of(key)), message
        assert "Traceback" not in message
        event("refused")
        return
    event("trained")
    assert len(losses) > 1  # the detector's own, and one of distillation
    assert all(loss.dim() == 0 and not loss.isnan() for loss in losses.values())

"""FCOS from a yaml config: the same detector as Detectron2's LazyConfig builds."""

import detectron2.model_zoo
import pytest
import torch
import toy
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mgd_det.cli.yaml_setup import read_config
from mgd_det.errors import UserError


def resnet50_fcos():
    cfg = read_config("", ["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.DEVICE", "cpu"])
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    return cfg


@pytest.mark.slow
def test_is_the_detector_of_detectron2s_own_config():
    torch.manual_seed(0)
    ours = build_model(resnet50_fcos())
    theirs = instantiate(detectron2.model_zoo.get_config("common/models/fcos.py").model)
    theirs.load_state_dict(ours.state_dict())  # strict
    for name in ("num_classes", "center_sampling_radius", "focal_loss_alpha", "focal_loss_gamma"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("test_topk_candidates", "test_nms_thresh", "test_score_thresh", "max_detections_per_image"):
        assert getattr(ours, name) == getattr(theirs, name)
    losses, instances = [], []
    for detector in (ours, theirs):
        with EventStorage():
            losses.append(detector.train()(toy.batch()))
        detector.test_score_thresh = 0.0
        with torch.no_grad():
            instances.append(detector.eval()(toy.batch())[0]["instances"])
    assert set(losses[0]) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name])
    assert len(instances[0]) > 0
    torch.testing.assert_close(instances[0].pred_boxes.tensor, instances[1].pred_boxes.tensor)
    torch.testing.assert_close(instances[0].scores, instances[1].scores)


def test_every_key_is_read():
    cfg = toy.plain_config(toy.FCOS)
    keys = {
        "NUM_CLASSES": (7, lambda d: d.head.cls_score.out_channels),
        "CENTER_SAMPLING_RADIUS": (2.5, lambda d: d.center_sampling_radius),
        "FOCAL_LOSS_ALPHA": (0.5, lambda d: d.focal_loss_alpha),
        "FOCAL_LOSS_GAMMA": (1.0, lambda d: d.focal_loss_gamma),
        "SCORE_THRESH_TEST": (0.3, lambda d: d.test_score_thresh),
        "TOPK_CANDIDATES_TEST": (50, lambda d: d.test_topk_candidates),
        "NMS_THRESH_TEST": (0.4, lambda d: d.test_nms_thresh),
        "IN_FEATURES": (["p3", "p4"], lambda d: d.head_in_features),
        "NUM_CONVS": (2, lambda d: sum(isinstance(m, torch.nn.Conv2d) for m in d.head.cls_subnet)),
        "PRIOR_PROB": (0.2, lambda d: round(d.head.cls_score.bias[0].sigmoid().item(), 6)),
    }
    for key, (value, _) in keys.items():
        cfg.MODEL.FCOS[key] = value
    detector = build_model(cfg)
    assert {key: read(detector) for key, (_, read) in keys.items()} == {key: value for key, (value, _) in keys.items()}


def test_a_level_that_the_backbone_lacks():
    cfg = toy.plain_config(toy.FCOS, opts=["MODEL.FCOS.IN_FEATURES", "['p2', 'p3']"])
    with pytest.raises(UserError, match="MODEL.FCOS.IN_FEATURES names p2.* p3, p4, p5, p6, p7"):
        build_model(cfg)


@pytest.mark.slow
def test_trains_under_autocast():
    detector = build_model(toy.plain_config(toy.FCOS)).train()
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        losses = detector(toy.batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())

"""TorchScript of the students, as docs/export.md describes it."""

import exported
import pytest
import torch
from detectron2.export.torchscript import scripting_with_instances
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

FIELDS = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}


@pytest.mark.slow
@pytest.mark.parametrize("student", ["mobilenetv2", "shufflenetv2_x0.5"])
def test_a_traced_network_in_a_scripted_detector(student):
    # Detectron2's own norm layers of a RetinaNet's head cannot be scripted.
    model, _ = exported.build("retinanet", student, ["MODEL.RETINANET.NORM", ""], spread=True)
    with torch.no_grad():
        expected = [model([entry])[0]["instances"] for entry in exported.inputs()]
    model.backbone.bottom_up = torch.jit.trace(model.backbone.bottom_up, torch.zeros(1, 3, 64, 64), strict=False)
    scripted = scripting_with_instances(model, FIELDS)
    for entry, wanted in zip(exported.inputs(), expected):
        with torch.no_grad():
            (output,) = scripted([{"image": entry["image"].float()}])
        found = Instances(tuple(entry["image"].shape[1:]))
        for name in ("scores", "pred_classes"):
            found.set(name, getattr(output, name))
        found.pred_boxes = Boxes(output.pred_boxes.tensor)
        found = detector_postprocess(found, entry["height"], entry["width"])
        assert len(found) == len(wanted) > 0
        torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor, atol=0.01, rtol=0)
        assert found.pred_classes.tolist() == wanted.pred_classes.tolist()

"""A whole detector with its post-processing, NMS included, as one ONNX model, by torch's tracing exporter."""

import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional
from unittest import mock

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import keypoint_head
from torch import Tensor, nn

# The first with RoiAlign as Detectron2 computes it is 16.
OPSET = 17
_TRACED_SIZE = (224, 288)


def export_whole(detector: nn.Module, path: str, pixels: Optional[Tensor] = None) -> List[str]:
    """Write a detector as an ONNX model from (3, height, width) pixels of one image to its objects.

    Args:
        detector: in eval mode.
        path: the file to write.
        pixels: the image to trace, (3, H, W) float32 in the detector's channel order; noise by default. Better is one
            in which the detector finds something.

    Returns:
        The names of the model's outputs.
    """
    if pixels is None:
        pixels = torch.rand(3, *_TRACED_SIZE, generator=torch.Generator().manual_seed(0)) * 255
    with traceable(detector, pixels) as adapter:
        outputs = [*adapter.outputs_schema.keys, "image_size"]
        torch.onnx.export(
            adapter,
            adapter.flattened_inputs,
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=outputs,
            dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in outputs[:-1]}},
        )
    return outputs


@contextmanager
def traceable(detector: nn.Module, pixels: Tensor) -> Iterator[TracingAdapter]:
    """Return a context whose value can be traced: a module from pixels to the tensors of the objects.

    Args:
        detector: in eval mode.
        pixels: an image, (3, H, W) float32, on which it runs once.
    """
    adapter = TracingAdapter(detector, [{"image": pixels}], _objects)
    adapter.eval()
    with warnings.catch_warnings(), torch.no_grad(), _heatmaps_only():
        warnings.simplefilter("ignore")  # the tracer's, one for each branch
        adapter(*adapter.flattened_inputs)
        yield adapter


def _heatmaps_only() -> Any:
    """Return a context in which keypoint heads return heatmaps: the exporter fails on the search for their maxima."""

    def keep(logits: Tensor, instances: List[Any]) -> None:
        instances[0].pred_keypoint_heatmaps = logits

    return mock.patch.object(keypoint_head, "keypoint_rcnn_inference", keep)


def _objects(detector: Any, inputs: List[Dict[str, Any]]) -> Any:
    """Return the objects in the pixels of the network's input, with masks as probabilities in each box."""
    if isinstance(detector, GeneralizedRCNN):
        return detector.inference(inputs, do_postprocess=False)[0]
    return detector(inputs)[0]["instances"]

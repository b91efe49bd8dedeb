"""The examples in the docstrings of the public functions."""

import doctest
import importlib
import inspect

import pytest

from mgd_det import distillation, matching
from mgd_det.distillation import POSITION_LOSS_REGISTRY

# Those that can be shown in a few lines of tensors.
FUNCTIONS = [
    matching.ChannelCost,
    matching.assign_channels,
    matching.matched_cost,
    distillation.MeasuredMargin,
    distillation.Padding.covered,
    distillation.absolute_max_pooling,
    distillation.activation_boundary,
    distillation.attention_transfer,
    distillation.box_mask,
    distillation.channel_wise_kl,
    distillation.flow_of_solution,
    distillation.fsp_matrix,
    distillation.negative_margin,
    distillation.partial_l2,
    distillation.pearson_distance,
    distillation.plain_l2,
    distillation.random_drop,
    distillation.register_position_loss,
    distillation.score_mask,
    distillation.sigmoid_logit_loss,
    distillation.softmax_logit_loss,
    distillation.sparse_matching,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_an_example_is_there_and_true(function, monkeypatch):
    monkeypatch.setattr(POSITION_LOSS_REGISTRY, "_obj_map", dict(POSITION_LOSS_REGISTRY._obj_map))
    namespace = vars(importlib.import_module(function.__module__))
    assert "Example:" in inspect.getdoc(function)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=dict(namespace))
    assert test.examples
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


@pytest.mark.parametrize("name", ["fused", "positions"])
def test_examples_of_modules(name):
    result = doctest.testmod(importlib.import_module(f"mgd_det.distillation.{name}"))
    assert result.attempted > 0 and result.failed == 0

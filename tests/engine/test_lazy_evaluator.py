"""The evaluator of a LazyConfig: Detectron2's own class gets the fast computation of AP."""

import coco_data
import pytest
from detectron2.config import LazyCall
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from omegaconf import OmegaConf

from mgd_det.engine import lazy_trainer
from mgd_det.engine.coco_evaluator import FastCOCOEvaluator

NAME = "test_lazy_evaluator"


@pytest.fixture
def scored_by(tmp_path, monkeypatch):
    """Returns the evaluator that a config's evaluation uses."""
    json_file, images = coco_data.write(tmp_path, coco_data.content())
    register_coco_instances(NAME, {}, str(json_file), str(images))
    monkeypatch.setattr(lazy_trainer, "inference_on_dataset", lambda model, loader, evaluator: {"made": evaluator})
    monkeypatch.setattr(lazy_trainer, "print_csv_format", lambda results: None)

    def run(evaluator):
        loader = LazyCall(list)()
        cfg = OmegaConf.create({"dataloader": {"test": loader, "evaluator": evaluator}}, flags={"allow_objects": True})
        return lazy_trainer._test(cfg, None)["made"]

    yield run
    coco_data.forget(NAME)


@pytest.mark.parametrize("as_in_yaml", [False, True])
def test_cocos_evaluator_is_the_fast_one(scored_by, as_in_yaml):
    evaluator = LazyCall(COCOEvaluator)(dataset_name=NAME, max_dets_per_image=120)
    if as_in_yaml:
        evaluator._target_ = "detectron2.evaluation.COCOEvaluator"
    made = scored_by(evaluator)
    assert type(made) is FastCOCOEvaluator and made._max_dets_per_image == [1, 10, 120]


def test_detectron2s_argument_turns_it_off(scored_by):
    pytest.importorskip("hotcoco")
    assert scored_by(LazyCall(COCOEvaluator)(dataset_name=NAME))._use_hotcoco
    assert not scored_by(LazyCall(COCOEvaluator)(dataset_name=NAME, use_fast_impl=False))._use_hotcoco


def test_another_evaluator_stays(scored_by):
    class Own(COCOEvaluator):
        pass

    assert type(scored_by(LazyCall(Own)(dataset_name=NAME))) is Own

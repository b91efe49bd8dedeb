"""Predicting with a trained detector: what is refused before anything is loaded."""

import pytest
import toy

from mgd_det.engine.predictor import Predictor
from mgd_det.errors import UserError


@pytest.mark.parametrize("order", ["L", "YUV-BT.601"])
def test_other_images_than_rgb_or_bgr_are_refused(order):
    cfg = toy.plain_config(opts=["INPUT.FORMAT", order])
    with pytest.raises(UserError, match=f"INPUT.FORMAT is '{order}'.*RGB and BGR"):
        Predictor(cfg, [])

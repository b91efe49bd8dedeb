#!/usr/bin/env python
"""Trains, distils and evaluates EmbedMask: tools/train_net.py and, for a LazyConfig, tools/lazyconfig_train_net.py.

Run it in the folder of the checkout.

python projects/EmbedMask/train_net.py --config-file projects/EmbedMask/configs/COCO/embed_mask_R_50_FPN_1x.yaml
python projects/EmbedMask/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
python projects/EmbedMask/train_net.py --config-file projects/EmbedMask/configs/COCO/embed_mask_MobileNetV2_FPN_1x.py
"""

import mgd_det  # noqa: F401  (first: it imports Detectron2 without the warnings of its code)

# isort: split
import embedmask  # noqa: F401  (registers EmbedMask)

from mgd_det.cli import lazyconfig_train_net, train_net
from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.model_zoo import is_lazy_config


def main() -> None:
    """Run the program."""
    lazy = is_lazy_config(argument_parser().parse_args().config_file)
    (lazyconfig_train_net if lazy else train_net).main()


if __name__ == "__main__":
    main()

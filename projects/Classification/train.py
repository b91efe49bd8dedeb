#!/usr/bin/env python
"""Trains and evaluates what a LazyConfig of this project describes: tools/lazyconfig_train_net.py.

python projects/Classification/train.py --config-file projects/Classification/configs/cub/MobileNetV2_mgd_R50.py
    [--num-gpus N] [--resume | --eval-only] [KEY=VALUE ...]
"""

from mgd_det.cli.lazyconfig_train_net import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Trains, distils and evaluates what a LazyConfig describes: Detectron2's program of this name with MGD.

Installed as ``mgd-lazyconfig-train``. For data sets in COCO format it has the flags of tools/train_net.py.

python tools/lazyconfig_train_net.py --config-file configs/COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py --num-gpus 8
python tools/lazyconfig_train_net.py --config-file ... --resume train.eval_period=10000
python tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=output/model_final.pth
"""

from mgd_det.cli.lazyconfig_train_net import main

if __name__ == "__main__":
    main()

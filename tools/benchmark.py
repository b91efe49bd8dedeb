#!/usr/bin/env python
"""Measures what distillation adds to a training step, or inference. Installed as ``mgd-benchmark``.

python tools/benchmark.py --config-file FashionScenes/retinanet_MobileNetV2_FPN_mgd_R50.yaml --size 128x128 --batch 8
python tools/benchmark.py --config-file COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml --size 800x1344 --batch 2
python tools/benchmark.py --inference --config-file FashionScenes/retinanet_MobileNetV2_FPN.yaml --size 320x320
python tools/benchmark.py --costs --config-file COCO-Detection/fcos_MobileNetV2_FPN_1x.yaml --size 320x320
"""

from mgd_det.cli.benchmark import main

if __name__ == "__main__":
    main()

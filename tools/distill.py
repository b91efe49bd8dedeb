#!/usr/bin/env python
"""Distils a light detector from a trained one, by the recommended recipe. Installed as ``mgd-distill``.

python tools/distill.py --teacher COCO-Detection/retinanet_R_50_FPN_3x.yaml --student mobilenetv2 --output-dir output/a
python tools/distill.py --teacher my_training/ --student resnet18 --iterations 3000 --batch 8 --output-dir output/b \
    --train-json a.json --train-images a/ --val-json b.json --val-images b/ --baseline
"""

from mgd_det.cli.distill import main

if __name__ == "__main__":
    main()

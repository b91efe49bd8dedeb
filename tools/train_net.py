#!/usr/bin/env python
"""Trains, distils and evaluates a detector: Detectron2's tools/train_net.py with MGD. Installed as ``mgd-train``.

python tools/train_net.py --config-file configs/COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml --num-gpus 8
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
python tools/train_net.py --config-file ... --eval-teacher
python tools/train_net.py --config-file ... --train-json a.json --train-images a/ --val-json b.json --val-images b/
"""

from mgd_det.cli.train_net import main

if __name__ == "__main__":
    main()

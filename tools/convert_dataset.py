#!/usr/bin/env python
"""Converts a data set of YOLO's or Pascal VOC's format to COCO's. Installed as ``mgd-convert-dataset``.

python tools/convert_dataset.py my_yolo_set/data.yaml --output-dir my_yolo_set/coco
python tools/convert_dataset.py VOCdevkit/VOC2012 --output-dir voc_coco
"""

import sys

from mgd_det.cli.convert_dataset import main

if __name__ == "__main__":
    sys.exit(main())

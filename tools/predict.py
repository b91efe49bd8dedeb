#!/usr/bin/env python
"""Finds the objects of images with a trained detector: pictures and a json. Installed as ``mgd-predict``.

python tools/predict.py --model output/a images/ --output-dir predictions
python tools/predict.py --model output/a/student.yaml images/val --annotations val.json --score-threshold 0 \
    --no-pictures --output-dir predictions
"""

import sys

from mgd_det.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())

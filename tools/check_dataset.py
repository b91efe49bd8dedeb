#!/usr/bin/env python
"""Lists everything that is wrong with a data set in COCO's format. Installed as ``mgd-check-dataset``.

python tools/check_dataset.py --json train.json --images images/train
python tools/check_dataset.py --json val.json --images images/val --eval --masks
python tools/check_dataset.py --dataset coco_2017_train --output problems.json
"""

import sys

from mgd_det.cli.check_dataset import main

if __name__ == "__main__":
    sys.exit(main())

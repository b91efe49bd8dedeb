#!/usr/bin/env python
"""Makes FashionScenes, a detection data set that needs no COCO. Installed as ``mgd-prepare-fashion-scenes``.

python tools/prepare_fashion_scenes.py tiny
python tools/prepare_fashion_scenes.py small large --workers 8
"""

from mgd_det.cli.prepare_fashion_scenes import main

if __name__ == "__main__":
    main()

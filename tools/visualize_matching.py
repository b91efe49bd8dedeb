#!/usr/bin/env python
"""Shows the channel matching of a distillation as pictures and a table. Installed as ``mgd-visualize-matching``.

python tools/visualize_matching.py --output-dir output/matching \\
    --config-file configs/FashionScenes/retinanet_MobileNetV2_FPN_mgd_R50.yaml
python tools/visualize_matching.py --config-file ... --checkpoint output/.../model_0000799.pth --position res4 \\
    --output-dir output/matching MODEL.MGD.TEACHER.WEIGHTS teacher.pth
"""

from mgd_det.cli.visualize_matching import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Writes report.html and model_card.md of a training again. Installed as ``mgd-report``.

python tools/report.py --config-file output/config.yaml
python tools/report.py --config-file output/config.yaml REPORT.ALONE output_alone
"""

from mgd_det.cli.report import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Writes a trained detector as a model of ONNX Runtime, OpenVINO or torch.export. Installed as ``mgd-export``.

python tools/export.py --model output/my_student --output student.onnx
python tools/export.py --model output/my_student --output student_int8.onnx --int8
python tools/export.py --model config.yaml --with-nms --output whole.onnx MODEL.WEIGHTS model_final.pth
"""

from mgd_det.cli.export import main

if __name__ == "__main__":
    main()

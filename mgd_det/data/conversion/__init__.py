"""Data sets in the formats of YOLO and Pascal VOC as jsons in COCO's format. The images stay where they are.

Libraries for this exist: supervision brings a plotting stack and leaves out lines it cannot read without saying so, and
globox knows no polygons. A wrong line must be named, with file and number, so the two readers are this project's.
"""

from mgd_det.data.conversion.coco_split import BadLines, CocoSplit
from mgd_det.data.conversion.voc import read_voc
from mgd_det.data.conversion.yolo import read_yolo

__all__ = ["BadLines", "CocoSplit", "read_voc", "read_yolo"]

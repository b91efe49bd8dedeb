"""Networks. Importing this package fills Detectron2's registries."""

from mgd_det.modeling import backbone  # noqa: F401

"""Meta-architectures. Importing this package puts them into META_ARCH_REGISTRY."""

from mgd_det.modeling.meta_arch.fcos import FCOS

__all__ = ["FCOS"]

"""Hiding four warnings of Detectron2's code that its users can do nothing about."""

import warnings


def ignore_detectron2_warnings() -> None:
    """Ignore deprecations that Detectron2 runs into: two when it is imported, one in training, one on several ranks."""
    for message, category, module in (
        ("`torch.jit.script` is deprecated", Warning, r"torch\.jit\._script"),
        ("pkg_resources is deprecated as an API", Warning, r"detectron2\.model_zoo\.model_zoo"),
        ("`broadcast_buffers` is deprecated", Warning, r"detectron2\.engine\.defaults"),
        ("torch.meshgrid: in an upcoming release", UserWarning, r"torch\.functional"),
    ):
        warnings.filterwarnings("ignore", message, category, module)

"""The config and the weights in the folder of a training (OUTPUT_DIR, train.output_dir)."""

import os
from typing import Tuple

from mgd_det.checkpoint.resumable import named_checkpoint
from mgd_det.errors import UserError
from mgd_det.files.student_files import STUDENT_CONFIG, STUDENT_WEIGHTS

CONFIG = "config.yaml"


def files_of_training(folder: str, flag: str, needs_weights: bool = True, finished: bool = False) -> Tuple[str, str]:
    """Return the paths of the config and of the weights in the folder of a training.

    The config is config.yaml, which knows the data, or else student.yaml. The weights are model_final.pth, or else the
    last checkpoint.

    Args:
        folder: that of the training.
        flag: the flag that names the folder, for the error.
        needs_weights: False if other weights are given; the path of those in the folder may then be of no file.
        finished: whether the last checkpoint of a training that has not ended is not enough.

    Raises:
        UserError: the folder has no config, or no weights.
    """
    configs = [os.path.join(folder, name) for name in (CONFIG, STUDENT_CONFIG)]
    found = [config for config in configs if os.path.isfile(config)]
    weights = os.path.join(folder, STUDENT_WEIGHTS)
    if not finished and not os.path.isfile(weights):
        weights = os.path.join(folder, named_checkpoint(folder) or "")
    if not found or (needs_weights and not os.path.isfile(weights)):
        missing = f"{CONFIG} and no {STUDENT_CONFIG}"
        if found:
            missing = STUDENT_WEIGHTS + ("" if finished else " and no checkpoint")
        raise UserError(
            f"{flag} {folder} has no {missing}: give the folder of a {'finished ' if finished else ''}training, or a "
            "config and trained weights"
        )
    return found[0], weights

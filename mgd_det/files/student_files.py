"""The files that a training leaves for its student: student.yaml and, beside it, model_final.pth."""

import os

STUDENT_CONFIG, STUDENT_WEIGHTS = "student.yaml", "model_final.pth"


def student_weights(folder: str) -> str:
    """Return the path of the student's weights for student.yaml, absolute, so that it holds in any current folder."""
    path = os.path.join(folder, STUDENT_WEIGHTS)
    return path if "://" in path else os.path.abspath(path)


def weights_beside(config_file: str, weights: str) -> str:
    """Return the weights of a config; of a student.yaml, the model_final.pth beside it, if there is one.

    The path in a student.yaml is wrong after its folder was moved, and it is another student's after the folder was
    copied.

    Args:
        config_file: the path of the config.
        weights: what it names as its weights.
    """
    if os.path.basename(config_file) != STUDENT_CONFIG or os.path.basename(weights) != STUDENT_WEIGHTS:
        return weights
    beside = os.path.join(os.path.dirname(os.path.abspath(config_file)), STUDENT_WEIGHTS)
    return beside if os.path.isfile(beside) else weights

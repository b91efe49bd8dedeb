"""From a teacher and a student, by name, to the config of a distillation by the recommended recipe."""

from mgd_det.recipe.recommended import RunData, recommended_config
from mgd_det.recipe.settings import Settings
from mgd_det.recipe.students import STUDENTS, Student, find_student
from mgd_det.recipe.teacher_files import TrainedDetector, find_teacher

__all__ = [
    "STUDENTS",
    "RunData",
    "Settings",
    "Student",
    "TrainedDetector",
    "find_student",
    "find_teacher",
    "recommended_config",
]

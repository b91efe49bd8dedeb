"""Trainings whose student inherits from its teacher."""

import toy

from mgd_det.engine import Trainer


def overrides(data, folder):
    """Overrides of a training of three steps that inherits all it can."""
    opts = [*data, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SEED", "5"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "2"]
    return [*opts, "OUTPUT_DIR", str(folder), "MODEL.MGD.INHERIT", "['fpn', 'head']"]


def plain_config(teacher, opts):
    """Of a plain student, which inherits too."""
    opts = [*opts, "MODEL.MGD.TEACHER.CONFIG_FILE", toy.RETINANET, "MODEL.MGD.TEACHER.WEIGHTS", teacher]
    return toy.plain_config(opts=[*opts, "MODEL.MGD.TEACHER.OPTS", str(toy.teacher_opts())])


def loaded(cfg, resume=False):
    """A trainer that is ready to train."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer

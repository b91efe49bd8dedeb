"""Trainings whose matching comes from their own features, with a record of those features."""

import numpy as np
import torch
import toy
from detectron2.modeling import build_model

from mgd_det.engine import MatchingUpdate
from mgd_det.engine.training_step import TrainStep
from mgd_det.matching import assign_channels
from mgd_det.modeling import find_distillation


def online_config(teacher):
    opts = ["MODEL.MGD.MARGIN", "measured", "MODEL.MGD.POSITIONS", "['res3', 'res4']"]
    return toy.distilled_config(teacher, opts=opts)


def no_loader():
    raise AssertionError("an online update makes a data loader")


class Recording:
    """Of a model: the features that its distiller is given, the groups in force then, and what ran."""

    def __init__(self, model):
        backbone = find_distillation(model)
        self.distiller = backbone.distiller
        self.positions = self.distiller.positions
        self.features, self.groups, self.observed, self.forwards = [], [], [], {"student": 0, "teacher": 0}
        self.distiller.register_forward_pre_hook(lambda module, args: self._record(backbone, *args))
        for name, net in (("student", model.backbone), ("teacher", backbone.teacher.backbone)):
            net.bottom_up.stem.register_forward_hook(lambda *_, name=name: self._count(name))

    def _record(self, backbone, student, teacher):
        copies = [{k: x.detach().double().numpy().copy() for k, x in maps.items()} for maps in (student, teacher)]
        self.features.append(copies)
        self.groups.append({p.name: self.distiller.groups(p).clone() for p in self.positions})
        self.observed.append(backbone.observer is not None)

    def _count(self, name):
        self.forwards[name] += 1

    def expected_groups(self, p, forwards):
        similarities = []
        for student, teacher in (self.features[i] for i in forwards):
            for s, t in zip(student[p.student], teacher[p.teacher]):
                s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
                similarities.append(s / np.linalg.norm(s, axis=1)[:, None] @ (t / np.linalg.norm(t, axis=1)[:, None]).T)
        return assign_channels(torch.from_numpy(2 - 2 * np.mean(similarities, axis=0)))

    def expected_mean_square(self, p, forwards, margin, covered=None):
        """By the groups of the first of these forwards; ``covered``: rows and columns of the images' part of a map."""
        groups, margin = self.groups[forwards[0]][p.name].numpy(), margin.double().numpy()
        values = []
        for maps in (self.features[i][1][p.teacher] for i in forwards):
            for image, (height, width) in zip(maps, covered or [maps.shape[2:]] * len(maps)):
                members = image[groups, :height, :width]  # (Cs, K, h, w)
                largest = np.abs(members).argmax(axis=1)
                target = np.take_along_axis(members, largest[:, None], axis=1)[:, 0]
                values.append(np.maximum(target, margin[groups].mean(1).reshape(-1, 1, 1)).ravel() ** 2)
        return np.concatenate(values).mean()

    def expected_margin(self, p, forwards):
        maps = np.concatenate([self.features[i][1][p.teacher] for i in forwards]).swapaxes(0, 1)
        return [x[x < 0].mean() if (x < 0).any() else 0 for x in maps]


def train(model, batches, start, end, lr=0.01, accumulate=1, state=None, extra=(), **matching):
    step = TrainStep(model, batches, torch.optim.SGD(model.parameters(), lr=lr), accumulate=accumulate)
    hook = MatchingUpdate(model, no_loader, source="online", **matching)
    step.register_hooks([hook, *extra])
    if state is not None:
        hook.load_state_dict(state)
    step.train(start, end)
    return step, hook


def seeded_model(cfg):
    torch.manual_seed(3)
    return build_model(cfg)

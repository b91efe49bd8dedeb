"""A small distiller with a matching in force, and features for it."""

import torch
from torch import nn

from mgd_det.distillation import POSITION_LOSS_REGISTRY, Distiller, Position

# The losses of one position; the others need the next one too.
LOSSES = [name for name, loss in POSITION_LOSS_REGISTRY if not loss.needs_following]
POSITIONS = [Position("res2", "res2", 3, 7), Position("res5", "res5", 4, 8)]
GROUPS = {"res2": torch.tensor([[5, 0], [1, 2], [6, 3]]), "res5": torch.tensor([[7, 1], [0, 2], [4, 3], [5, 6]])}
SINGLE = {name: groups[:, :1] for name, groups in GROUPS.items()}
SIZES = {"res2": (6, 8), "res5": (3, 4)}
# Fewer teacher channels than student channels.
WIDE = Position("res2", "res2", 5, 3)
WIDE_GROUPS = {"res2": torch.tensor([[-1], [2], [0], [-1], [1]])}


def margins(position):
    return -torch.linspace(0.1, 1.5, position.teacher_channels)


def mean_square(position):
    return torch.tensor({"res2": 0.5, "res5": 3.0}.get(position.name, 2.0))


def partial_l2(weights=(1.0,), scale="target"):
    return {"partial_l2": {"weights": weights, "scale": scale}}


def matched(positions=POSITIONS, groups=None, losses=None, **options):
    """A distiller with a matching in force; its norm layers are not those they were made with.

    ``weights`` and ``scale`` are those of partial L2.
    """
    own = {key: options.pop(key) for key in ("weights", "scale") if key in options}
    distiller = Distiller(positions, losses=partial_l2(**own) if losses is None else losses, **options)
    groups = groups or (SINGLE if distiller.reducer == "sm" else GROUPS)
    for p in positions:
        distiller.set_matching(p, groups=groups[p.name], margin=margins(p), mean_square=mean_square(p))
    torch.manual_seed(3)
    for parameter in distiller.parameters():
        nn.init.uniform_(parameter, 0.3, 1.2)
    return distiller


def features(images=2, positions=POSITIONS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = {}, {}
    for p in positions:
        size = SIZES.get(p.name, (3, 4))
        student[p.student] = torch.randn(images, p.student_channels, *size, generator=generator)
        teacher[p.teacher] = torch.randn(images, p.teacher_channels, *size, generator=generator)
    return student, teacher

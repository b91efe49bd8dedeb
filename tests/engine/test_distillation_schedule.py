"""Trainings in which only some steps distil."""

import pytest
import torch
import toy
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from torch.nn.parallel import DistributedDataParallel

from mgd_det.config import without_distillation
from mgd_det.data import register_coco_folder
from mgd_det.engine import MatchingUpdate, Trainer
from mgd_det.engine.training_step import TrainStep
from mgd_det.modeling import find_distillation

INTERVAL = ["MODEL.MGD.INTERVAL", "2", "MODEL.MGD.STOP_ITER", "5"]


class Recording(HookBase):
    """Of each step: the names of its distillation losses, the teacher's forwards and the positions' groups."""

    def __init__(self, model):
        distillation = find_distillation(model)
        self.losses, self.forwards, self.groups = [], [], []
        self._distiller, self._count = distillation.distiller, 0
        self._names = []
        distillation.teacher.backbone.bottom_up.stem.register_forward_hook(self._forward)
        model.register_forward_hook(lambda module, args, output: self._names.append([k for k in output if "mgd" in k]))

    def _forward(self, *_):
        self._count += 1

    def after_step(self):
        self.losses.append(self._names[-1])
        self.forwards.append(self._count)
        self.groups.append(self._distiller.groups(self._distiller.positions[0]).clone())


def train(model, steps, **matching):
    torch.manual_seed(0)
    step = TrainStep(model, [toy.batch(seed=i) for i in range(steps)], torch.optim.SGD(model.parameters(), lr=0.01))
    matching = {"num_batches": 2, "periods": [100], **matching}
    hook = MatchingUpdate(model, None, source="online", **matching)
    recording = Recording(model.module if isinstance(model, DistributedDataParallel) else model)
    step.register_hooks([hook, recording])
    step.train(0, steps)
    return recording


def seeded_model(cfg):
    torch.manual_seed(3)
    return build_model(cfg)


@pytest.mark.slow
def test_the_teacher_runs_only_in_steps_that_distil(teacher):
    cfg = toy.distilled_config(teacher, opts=["MODEL.MGD.POSITIONS", "['res4']", *INTERVAL])
    seen = train(seeded_model(cfg), 7)
    assert seen.losses == [["loss_mgd_res4"], [], ["loss_mgd_res4"], [], ["loss_mgd_res4"], [], []]
    assert seen.forwards == [1, 1, 2, 2, 3, 3, 3]


@pytest.mark.slow
def test_a_window_is_of_distilled_steps(teacher):
    """The first step's own matching; then that of the first two distilled steps, 0 and 2, which ends before step 4."""
    cfg = toy.distilled_config(teacher, opts=["MODEL.MGD.POSITIONS", "['res4']", "MODEL.MGD.INTERVAL", "2"])
    seen = train(seeded_model(cfg), 7)
    assert all(torch.equal(seen.groups[i], seen.groups[0]) for i in (1, 2, 3))
    assert not torch.equal(seen.groups[4], seen.groups[0])
    assert all(torch.equal(seen.groups[i], seen.groups[4]) for i in (5, 6))


@pytest.mark.slow
def test_no_update_is_due_after_the_end(teacher):
    cfg = toy.distilled_config(teacher, opts=["MODEL.MGD.POSITIONS", "['res4']", "MODEL.MGD.STOP_ITER", "3"])
    seen = train(seeded_model(cfg), 6, periods=[4], num_batches=1)
    assert not torch.equal(seen.groups[1], seen.groups[0]) or torch.equal(seen.groups[1], seen.groups[2])
    assert all(torch.equal(groups, seen.groups[2]) for groups in seen.groups[3:])


@pytest.mark.slow
def test_a_step_that_does_not_distil_is_the_plain_students(teacher):
    cfg = toy.distilled_config(teacher, opts=INTERVAL)
    distilled = seeded_model(cfg)
    toy.solve_matching(distilled)
    plain = build_model(without_distillation(cfg))
    plain.load_state_dict(distilled.state_dict())
    find_distillation(distilled).schedule.set_iteration(1, 100)
    outputs = []
    for model in (distilled, plain):
        step = TrainStep(model, [toy.batch()], torch.optim.SGD(model.parameters(), lr=0.01))
        step.train(0, 1)
        outputs.append({name: p.grad for name, p in model.named_parameters() if "mgd" not in name})
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(gradient, outputs[1][name]) for name, gradient in outputs[0].items())


@pytest.mark.slow
def test_ranks_need_no_search_for_unused_parameters(teacher, run_ranks):
    """Norm layers and adapters get a gradient, of zero, in the steps that do not distil."""
    opts = ["MODEL.MGD.POSITIONS", "['res4', 'p3']", "MODEL.MGD.MATCHING.KINDS", "['assignment', 'adapter']"]
    opts += ["MODEL.MGD.LOSS.NAMES", "['partial_l2', 'fsp']", "MODEL.MGD.LOSS.MASK.NAME", "boxes"]
    opts += ["MODEL.MGD.BOXES.WEIGHT", "1.0", "MODEL.MGD.CROSS_KD.WEIGHT", "0.1"]
    cfg = toy.distilled_config(teacher, opts=[*opts, *INTERVAL])

    def rank_train(rank):
        model = DistributedDataParallel(seeded_model(cfg))
        seen = train(model, 6)
        return seen.forwards, [p.detach().clone() for p in model.parameters()]

    (forwards, first), (_, second) = run_ranks(rank_train, 2)
    assert forwards == [1, 1, 2, 2, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.slow
def test_resuming_with_all_of_it_ends_with_equal_tensors(teacher, tmp_path):
    _, train_json, _, train_images, *_ = toy.write_scenes(tmp_path / "toy")
    register_coco_folder("schedule_train", train_json, train_images)
    opts = ["DATASETS.TRAIN", "('schedule_train',)", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2", "SEED", "5"]
    opts += ["SOLVER.MAX_ITER", "7", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SOLVER.CHECKPOINT_PERIOD", "3"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path), *INTERVAL, "MODEL.MGD.STOP_ITER", "6"]
    opts += ["MODEL.MGD.POSITIONS", "['res3', 'res4', 'p3', 'p4']", "MODEL.MGD.LOSS.MASK.NAME", "scores"]
    opts += ["MODEL.MGD.LOSS.NAMES", "['partial_l2', 'pkd', 'ab', 'fsp']"]
    opts += ["MODEL.MGD.MATCHING.KINDS", "['assignment', 'random', 'identity', 'adapter']"]
    opts += ["MODEL.MGD.LOSS.PKD.DECAY", "cosine", "MODEL.MGD.LOSS.PARTIAL_L2.DECAY", "linear"]
    opts += [
        "MODEL.MGD.MATCHING.NUM_BATCHES",
        "2",
        "MODEL.MGD.LOGITS.WEIGHT",
        "0.5",
        "MODEL.MGD.LOGITS.DECAY",
        "linear",
    ]
    opts += ["MODEL.MGD.BOXES.WEIGHT", "0.5", "MODEL.MGD.BOXES.DECAY", "cosine"]
    opts += ["MODEL.MGD.CROSS_KD.WEIGHT", "0.1", "MODEL.MGD.CROSS_KD.DECAY", "linear"]
    cfg = toy.distilled_config(teacher, opts=opts)
    try:
        Trainer(cfg).train()
        uninterrupted = torch.load(tmp_path / "model_final.pth")
        (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
        resumed = Trainer(cfg)
        resumed.resume_or_load(resume=True)
        assert resumed.start_iter == 3
        resumed.train()
    finally:
        DatasetCatalog.remove("schedule_train")
    again = torch.load(tmp_path / "model_final.pth")
    assert all(torch.equal(tensor, again["model"][key]) for key, tensor in uninterrupted["model"].items())
    states = [x["trainer"]["hooks"]["MatchingUpdate"] for x in (uninterrupted, again)]
    assert states[0]["adapters"] and states[0]["matched"] == ["p3", "p4", "res3", "res4"]
    for part in ("norms", "adapters"):
        assert all(torch.equal(tensor, states[1][part][key]) for key, tensor in states[0][part].items())

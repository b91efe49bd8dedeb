"""Gloo processes on the CPU against one process: matching, losses, gradients, and a whole training of each program."""

import io
import json
import logging
import sys
import time
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import coco_data
import pytest
import torch
import torch.distributed as dist
import toy
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from mgd_det import model_zoo
from mgd_det.cli.error_reports import run_program
from mgd_det.data import register_coco_folder
from mgd_det.distributed import ranks
from mgd_det.distributed.sync_batch_norm import CPUSyncBatchNorm
from mgd_det.engine import MatchingUpdate, Trainer, lazy_trainer
from mgd_det.errors import UserError
from mgd_det.modeling import find_distillation


@pytest.fixture(scope="module")
def cfg(teacher):
    return toy.distilled_config(teacher)


def seeded_model(cfg):
    torch.manual_seed(11)
    return build_model(cfg)


def matched(cfg, batches, dtype=torch.float32):
    """The model after the matching before training, and a training step of learning rate 0."""
    model = ranks.distributed(seeded_model(cfg).to(dtype))
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks(
        [MatchingUpdate(model, lambda: batches, num_batches=len(batches), periods=[10], source="measured")]
    )
    trainer.train(0, 1)
    return model


def matchings(model):
    return find_distillation(model).distiller.distillation_state()["matchings"]


@pytest.mark.slow
@pytest.mark.parametrize("batches_of_ranks", [[2, 1], [1, 2, 1]])
def test_all_ranks_have_the_matching_of_the_union_of_their_images(cfg, run_ranks, batches_of_ranks):
    union = [toy.batch(seed=i) for i in range(sum(batches_of_ranks))]

    def rank_train(rank):
        start = sum(batches_of_ranks[:rank])
        return matchings(matched(cfg, union[start : start + batches_of_ranks[rank]]))

    of_ranks = run_ranks(rank_train, len(batches_of_ranks))
    for position, matching in matchings(matched(cfg, union)).items():
        for rank in of_ranks:
            assert torch.equal(rank[position]["groups"], matching["groups"]), position
            torch.testing.assert_close(rank[position]["margin"], matching["margin"])


# ---------------------------------------------------------------------- loss and gradients
def step(model, batch):
    """Losses by name, gradients, and what batch norms have counted so far."""
    if hasattr(model, "module"):
        assert isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
    detector = getattr(model, "module", model)
    # Detectron2's RetinaNet divides by a moving average of a rank's positives, which begins at 100 on each: the mean
    # over the ranks is the loss of the union only where it has settled, and ranks have equally many. Here it has.
    detector._ema_update = lambda name, positives, initial: positives
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in detector.state_dict().items() if "running" in name}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients, buffers


def norms(cfg, student, distiller):
    cfg = cfg.clone()
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = student
    cfg.MODEL.RETINANET.NORM = "SyncBN" if student == "SyncBN" else ""  # Detectron2's: one for each level
    cfg.MODEL.MGD.NORM = distiller
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("student, distiller", [("FrozenBN", "GN"), ("SyncBN", "SyncBN")])
def test_ranks_of_a_part_of_the_batch_have_the_loss_and_gradients_of_one(cfg, run_ranks, student, distiller):
    """Not so in the authors' code, whose distillation loss shrinks with the number of ranks."""
    cfg = norms(cfg, student, distiller)
    images = toy.batch(((64, 64),) * 4)  # each has one object, so that ranks have equally many positives

    def rank_step(rank):
        mine = images[2 * rank : 2 * rank + 2]
        model = matched(cfg, [mine], torch.float64)  # float64, as a ReLU that flips by rounding changes a gradient
        sync = sum(isinstance(module, CPUSyncBatchNorm) for module in model.modules())
        return (*step(model, mine), sync)

    (losses, gradients, buffers, sync), (other_losses, *_) = run_ranks(rank_step, 2)
    assert (sync > 20) == (student == "SyncBN")
    expected_losses, expected_gradients, expected_buffers = step(matched(cfg, [images], torch.float64), images)
    assert losses.keys() == expected_losses.keys() and len(losses) == 6
    for name, loss in expected_losses.items():
        assert (losses[name] + other_losses[name]) / 2 == pytest.approx(loss, rel=1e-5), name
    for got, expected in ((gradients, expected_gradients), (buffers, expected_buffers)):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=name)


# ---------------------------------------------------------------------- whole trainings
@pytest.fixture
def scenes(tmp_path):
    """Five images to evaluate on: two ranks have three and two of them."""
    flags = toy.write_scenes(tmp_path / "toy", train=8, val=5)
    for split, annotations, images in (("train", *flags[1:4:2]), ("val", *flags[5:8:2])):
        register_coco_folder(f"ranks_{split}", annotations, images)
    yield
    coco_data.forget("ranks_")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def scores(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]
    return [line["bbox/AP"] for line in lines if "bbox/AP" in line]


def detections(folder):
    results = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    return sorted((d["image_id"], d["category_id"], d["score"], *d["bbox"]) for d in results)


@pytest.mark.slow
def test_matching_precise_bn_evaluation_and_checkpoint_of_the_same_iteration(
    cfg, scenes, run_ranks, tmp_path, monkeypatch
):
    # With "BN", each rank would evaluate its images with statistics of its own.
    cfg = norms(cfg, "SyncBN", "GN")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("ranks_train",), ("ranks_val",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 0, 4, 3
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 4, (), 2
    cfg.TEST.EVAL_PERIOD = cfg.TEST.PRECISE_BN.NUM_ITER = 2
    cfg.TEST.PRECISE_BN.ENABLED = True
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.OUTPUT_DIR = str(tmp_path)

    def rank_train(rank):
        trainer = Trainer(cfg)
        assert any(isinstance(hook, hooks.PreciseBN) for hook in trainer._hooks)
        trainer.resume_or_load(resume=False)
        trainer.train()
        return matchings(trainer.model), trainer.model.module.state_dict(), getattr(trainer, "_last_eval_results", None)

    (first, weights, results), (second, other_weights, _) = run_ranks(rank_train, 2)
    for position in first:
        assert torch.equal(first[position]["groups"], second[position]["groups"])
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert {"model_0000001.pth", "model_0000003.pth", "model_final.pth"} <= {f.name for f in tmp_path.iterdir()}
    assert len(scores(tmp_path)) == 2

    # The five images were evaluated, each once: one process finds the same.
    model = build_model(cfg)
    model.load_state_dict(weights, strict=False)
    cfg.OUTPUT_DIR = str(tmp_path / "alone")
    alone = Trainer.test(cfg, model)
    assert alone["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    found, expected = detections(tmp_path), detections(tmp_path / "alone")
    assert {image for image, *_ in found} == {1, 2, 3, 4, 5} and len(found) == len(expected)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_a_lazy_config_on_two_ranks(teacher, scenes, run_ranks, tmp_path):
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py")
    cfg.model.head.input_shape = [{"_target_": "detectron2.layers.ShapeSpec", "channels": 16}] * 5
    cfg.model.head.conv_dims, cfg.model.backbone.student.out_channels = [16], 16
    cfg.model.backbone.norm_groups, cfg.model.num_classes = 8, 10
    cfg.model.backbone.teacher.update(config_file=toy.RETINANET, weights=teacher, opts=toy.teacher_opts())
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = "ranks_train", "ranks_val"
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        loader.mapper.augmentations, loader.num_workers = [], 0
    cfg.dataloader.train.total_batch_size, cfg.optimizer.lr = 2, 0.001
    cfg.train.update(device="cpu", init_checkpoint="", seed=1, max_iter=3, eval_period=2, output_dir=str(tmp_path))
    cfg.train.checkpointer.period = 2
    cfg.train.matching = dict(num_batches=1, periods=[2])

    def rank_train(rank):
        lazy_trainer.train(cfg)

    run_ranks(rank_train, 2)
    checkpoint = torch.load(tmp_path / "model_final.pth")
    assert checkpoint["iteration"] == 2 and "MatchingUpdate" in checkpoint["trainer"]["hooks"]
    assert len(scores(tmp_path)) == 2  # after iterations 2 and 3


# ---------------------------------------------------------------------- what ranks do together
def rejoin(rank, folder, timeout, world_size=2, local_size=2):
    """Leaves the group of ``run_ranks`` for one of this project."""
    dist.destroy_process_group()
    ranks.join(
        dist.FileStore(str(folder / "store"), world_size),
        rank=rank,
        local_rank=rank % local_size,
        world_size=world_size,
        local_size=local_size,
        device="cpu",
        timeout=timedelta(seconds=timeout),
    )


@pytest.mark.slow
def test_ranks_wait_for_the_main_process_longer_than_for_a_collective(run_ranks, tmp_path):
    def rank_work(rank):
        rejoin(rank, tmp_path, timeout=2)

        def work():
            time.sleep(3)
            return f"of rank {rank}"

        def fail():
            raise UserError("no data")

        result = ranks.on_main_process(work)
        with pytest.raises(UserError, match="no data"):
            ranks.on_main_process(fail)
        return result, ranks.on_main_process(lambda: rank)

    assert run_ranks(rank_work, 2) == [("of rank 0", 0)] * 2


def test_ranks_do_not_wait_for_a_main_process_that_failed(run_ranks, tmp_path):
    def rank_work(rank):
        rejoin(rank, tmp_path, timeout=20)

        def fail():
            raise MemoryError("while saving")

        with pytest.raises((MemoryError, RuntimeError)) as error:
            ranks.on_main_process(fail)
        if rank == 0:
            ranks.is_first_to_fail()  # as a program does that ends of it
        return str(error.value)

    assert run_ranks(rank_work, 2) == ["while saving", "another rank failed while this one waited for the main process"]


def test_nobody_can_tell_who_failed_where_the_store_is_gone(monkeypatch):
    class Gone:
        def check(self, keys):
            raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(ranks, "_store", Gone())
    assert not ranks.has_failed_rank()


def test_one_rank_speaks_of_several_that_fail(run_ranks, tmp_path):
    assert ranks.is_first_to_fail() and not ranks.has_failed_rank()  # one process

    def rank_fail(rank):
        rejoin(rank, tmp_path, timeout=20, world_size=3, local_size=3)
        before = ranks.has_failed_rank()
        dist.barrier()
        message = io.StringIO()
        # A rank leaves at once; this one still has to tell what it said.
        with patch.object(ranks, "leave", sys.exit), redirect_stderr(message), pytest.raises(SystemExit) as end:
            run_program(train)
        dist.barrier()
        return before, message.getvalue(), end.value.code, ranks.has_failed_rank()

    def train():
        raise UserError("no data")

    outcomes = run_ranks(rank_fail, 3)
    assert sorted(message for _, message, _, _ in outcomes) == ["", "", "error: no data\n"]
    assert all((before, status, after) == (False, 1, True) for before, _, status, after in outcomes)


def test_machines_of_different_sizes(run_ranks, tmp_path):
    def rank_join(rank):
        with pytest.raises(UserError, match=r"different numbers of processes \(1, 2\)"):
            rejoin(rank, tmp_path, timeout=20, world_size=3, local_size=2 if rank < 2 else 1)
        return True

    assert run_ranks(rank_join, 3) == [True] * 3

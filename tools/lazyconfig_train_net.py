#!/usr/bin/env python
"""Trains, distils and evaluates what a LazyConfig describes: Detectron2's program of this name with MGD.

python tools/lazyconfig_train_net.py --config-file configs/COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py --num-gpus 8
python tools/lazyconfig_train_net.py --config-file ... --resume train.eval_period=10000
python tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=output/model_final.pth

It reads the entries that Detectron2's program reads (model, dataloader, optimizer, lr_multiplier and train) and, where
model.backbone is an MGDBackbone, train.matching: the arguments of mgd_det.engine.MatchingUpdate. For data sets in
COCO format it has the flags of tools/train_net.py.
"""

import copy
import logging
import os
from contextlib import contextmanager

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, default_setup, default_writers, hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.data import check_dataset, dataset_classes, register_coco_folder
from mgd_det.engine import MatchingUpdate, argument_parser, check_gpus, run_program
from mgd_det.engine.messages import quiet_training_errors
from mgd_det.errors import UserError
from mgd_det.model_zoo import find_config_file
from mgd_det.modeling.backbone import unwrapped

logger = logging.getLogger("mgd_det.lazyconfig_train_net")


def main(args):
    """One process of the training; see :func:`mgd_det.engine.run_program` for how it ends."""
    run_program(lambda: run(args))


def run(args):
    cfg = setup(args)
    if args.eval_only:
        evaluate(cfg, resume=args.resume)
    else:
        train(cfg, resume=args.resume)


def launch_main(args):
    check_gpus(args)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


# ---------------------------------------------------------------------------- training and evaluation
def train(cfg, resume=False):
    model = instantiate(cfg.model)
    logger.info(f"Model:\n{model}")
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = WeightsCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    # Up to the first that rank 0 alone has, the order is the same on every rank: the matching's update is collective.
    trainer_hooks = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        LossNormalizer(model),
    ]
    if is_distilled(cfg):
        trainer_hooks.append(matching_hook(cfg, model))
    if comm.is_main_process():
        trainer_hooks.append(hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
    trainer_hooks.append(hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, model)))
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer_hooks.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    trainer.register_hooks(trainer_hooks)

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    with explained_training_errors(checkpointer):
        # A checkpoint's iteration is the one that was finished last.
        trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def matching_hook(cfg, model):
    if "matching" not in cfg.train:
        raise UserError(
            "train.matching is not in the config: give the arguments of MatchingUpdate, for example "
            "train.matching = dict(num_batches=1000, periods=[5000])"
        )
    seed = max(cfg.train.get("seed", 0), 0)
    return MatchingUpdate(model, lambda: instantiate(cfg.dataloader.train), seed=seed, **cfg.train.matching)


class LossNormalizer(HookBase):
    """Saves what RetinaNet and FCOS divide their losses by, a running mean that is no buffer of the model."""

    def __init__(self, model):
        self._model = unwrapped(model)

    def state_dict(self):
        normalizer = getattr(self._model, "loss_normalizer", None)
        return {} if normalizer is None else {"loss_normalizer": float(normalizer)}

    def load_state_dict(self, state_dict):
        self._model.loss_normalizer = state_dict["loss_normalizer"]


def evaluate(cfg, resume=False):
    """Evaluates the model with train.init_checkpoint, or with the last checkpoint of train.output_dir."""
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = WeightsCheckpointer(model, cfg.train.output_dir)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if checkpointer.unset_keys:
        logger.warning(
            f"{len(checkpointer.unset_keys)} tensors of the model are not in the weights and stay random, "
            f"such as {checkpointer.unset_keys[0]}: the results will be poor."
        )
    return test(cfg, create_ddp_model(model, **cfg.train.ddp))


def test(cfg, model):
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


@contextmanager
def explained_training_errors(checkpointer):
    with quiet_training_errors():
        try:
            yield
        except FloatingPointError as e:
            saved = checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else ""
            raise UserError(
                f"{e}\nTraining stopped, and nothing that is not finite was saved. "
                + (f"The last checkpoint is {saved}. " if saved else "There is no checkpoint yet. ")
                + "Lower optimizer.lr or model.backbone.losses, or lengthen the warm-up of lr_multiplier."
            ) from e


# ---------------------------------------------------------------------------- the config
def setup(args):
    """The config of a run, checked against the machine and the data; starts logging to train.output_dir.

    Raises UserError for what the user has to mend.
    """
    cfg = read_config(args.config_file, args.opts)
    if args.eval_teacher:
        raise UserError("--eval-teacher: tools/train_net.py scores teachers, by the yaml config of this name")
    use_coco_flags(cfg, args)
    plain = student_config(cfg)
    if args.eval_only:
        cfg = plain  # needs no teacher
    warning = use_available_device(cfg)
    check_data(cfg, train=not args.eval_only)
    args.config_file = find_config_file(args.config_file, lazy=True)  # default_setup prints the file
    try:
        default_setup(cfg, args)
    except OSError as e:
        raise UserError(f"train.output_dir {cfg.train.output_dir} cannot be written: {e}") from e
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mgd_det")
    if warning:
        logger.warning(warning)
    if is_distilled(cfg) and comm.is_main_process():
        plain.train.init_checkpoint = os.path.join(cfg.train.output_dir, "model_final.pth")
        LazyConfig.save(plain, os.path.join(cfg.train.output_dir, "student.yaml"))
    return cfg


def read_config(name, opts):
    """The LazyConfig of a path or of a name of a model zoo, with overrides."""
    path = find_config_file(name, lazy=True)
    try:
        cfg = LazyConfig.load(path)
    except (SyntaxError, ValueError) as e:
        raise UserError(f"--config-file {name}: {e.__cause__ or e}") from e
    missing = {"model", "dataloader", "optimizer", "lr_multiplier", "train"} - set(cfg)
    if missing:
        hint = " It is a yaml config, which tools/train_net.py takes." if "MODEL" in cfg or "_BASE_" in cfg else ""
        raise UserError(f"--config-file {name} is no LazyConfig of a training: it lacks {', '.join(missing)}.{hint}")
    for opt in opts:
        try:
            LazyConfig.apply_overrides(cfg, [opt])
        except Exception as e:  # the parser, OmegaConf and Detectron2 each have their own
            reason = str(e).splitlines()[0]
            raise UserError(f"the override {opt!r} cannot be applied, give KEY=VALUE of the config: {reason}") from e
    return cfg


def is_distilled(cfg):
    return "student" in cfg.model.backbone


def student_config(cfg):
    """A copy of the config that builds the plain student; of a config without distillation, a plain copy."""
    cfg = copy.deepcopy(cfg)
    if is_distilled(cfg):
        cfg.model.backbone = cfg.model.backbone.student
        cfg.train.pop("matching", None)
    return cfg


def use_available_device(cfg: DictConfig) -> str:
    """Turns train.device from a GPU that is not there to "cpu". Returns a warning of it, or ""."""
    if not cfg.train.device.startswith("cuda") or torch.cuda.is_available():
        return ""
    warning = (
        f"train.device is {cfg.train.device!r}, but this machine has no GPU that torch can use: running on the CPU."
    )
    cfg.train.device = "cpu"
    if cfg.train.amp.enabled:
        cfg.train.amp.enabled = False
        warning += " train.amp needs a GPU and is off."
    return warning


# ---------------------------------------------------------------------------- the data
def use_coco_flags(cfg, args):
    for split in ("train", "val"):
        json_file, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if bool(json_file) != bool(images):
            raise UserError(f"--{split}-json and --{split}-images go together: give both or none")
        if json_file:
            name = f"coco_folder_{split}"
            class_head(cfg).num_classes = len(register_coco_folder(name, json_file, images))
            cfg.dataloader["test" if split == "val" else "train"].dataset.names = name
    if args.train_json and args.val_json:
        train, val = dataset_classes("coco_folder_train"), dataset_classes("coco_folder_val")
        if train != val:
            raise UserError(f"--val-json has other categories than --train-json: {val} instead of {train}")


def class_head(cfg):
    """The node with the num_classes that the detector's other parts refer to."""
    return cfg.model if "num_classes" in cfg.model else cfg.model.roi_heads


def check_data(cfg, train):
    masks = ("segmentation",) if "mask_head" in cfg.model.get("roi_heads", {}) else ()
    for split, keys in (("train", masks), ("test", (*masks, "area", "iscrowd"))):
        names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
        if names is None or (split == "train" and not train):
            continue
        for name in [names] if isinstance(names, str) else names:
            check_dataset(name, keys)
            classes, expected = dataset_classes(name), class_head(cfg).num_classes
            # To train, the config may have classes to spare; the evaluator knows the data's classes only.
            if classes is not None and (len(classes) > expected or (split == "test" and len(classes) < expected)):
                raise UserError(
                    f"{name} has {len(classes)} classes, but the config's num_classes is {expected}: set it to "
                    f"{len(classes)}, or use weights and data of the same classes"
                )


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    run_program(lambda: launch_main(arguments))

"""Distils a light detector from a trained one, by the recommended recipe. One command, no config to write.

The student is a detector of the teacher's kind with another network. The program makes its config, shows how it
differs from the base config and why, writes it to OUTPUT_DIR/config.yaml and trains. `tools/train_net.py --config-file
OUTPUT_DIR/config.yaml` repeats the same run.
"""

import argparse
import gc
import logging
import os
from typing import List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from mgd_det.cli import report, train_net
from mgd_det.cli.arguments import positive
from mgd_det.cli.comparison import write_comparison
from mgd_det.cli.data_setup import learned_classes, use_coco_folders
from mgd_det.cli.error_reports import run_in_processes, run_program, without_flags_among_overrides
from mgd_det.cli.yaml_setup import add_data_flags, argument_parser, coco_folder_of
from mgd_det.config import class_head, merge_config
from mgd_det.data.class_names import class_names
from mgd_det.distributed.processes import add_launch_flags
from mgd_det.distributed.torchrun import is_under_torchrun
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_text_atomically
from mgd_det.files.folder_lock import refuse_locked_folder
from mgd_det.files.outputs import writable_folder
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.recipe import RunData, Settings, TrainedDetector, find_student, find_teacher, recommended_config
from mgd_det.recipe.recommended import alone, kind_of
from mgd_det.visualization.scores import SCORES_FILE

_SHOWN_CLASSES = 4  # of a detector, in one line


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the program.

    Args:
        argv: the arguments without the program's name; None for those of the command line.
    """
    args = parse_args(argv)
    cfg, scores_teacher = run_program(lambda: prepare(without_flags_among_overrides(args)))
    if args.config_only:
        return
    resume = ["--resume"] * args.resume
    if args.baseline and scores_teacher:
        _run(["--eval-teacher"], args, cfg.OUTPUT_DIR)
    _run(resume, args, cfg.OUTPUT_DIR)
    if args.baseline:
        _run(resume, args, alone(cfg).OUTPUT_DIR)
        run_program(lambda: _compare(cfg, scores_teacher))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", required=True, metavar="NAME", help="of a model zoo, a yaml config, or the folder of a training"
    )
    parser.add_argument("--teacher-weights", default="", metavar="FILE", help="instead of the teacher's own")
    parser.add_argument(
        "--student", required=True, metavar="NAME", help="such as mobilenetv2 or resnet18 (docs/students.md)"
    )
    parser.add_argument(
        "--light", action="store_true", help="a narrower FPN and light heads too, several times faster (docs/light.md)"
    )
    parser.add_argument(
        "--iterations", type=positive, metavar="N", help="default: for as many images as the base config's"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="images in a batch (default: the base config's)")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="OUTPUT_DIR of the config")
    parser.add_argument("--resume", action="store_true", help="continue; give the other arguments again")
    parser.add_argument(
        "--baseline", action="store_true", help="also train the student alone, and end in a table of all three"
    )
    parser.add_argument("--config-only", action="store_true", help="write the config, and do not train")
    data = add_data_flags(parser, "data sets (default: the teacher's)")
    data.add_argument("--train-dataset", action="append", default=[], metavar="NAME", help="registered; repeatable")
    data.add_argument("--val-dataset", action="append", default=[], metavar="NAME", help="registered; repeatable")
    parser.add_argument("--num-gpus", "--gpus", type=int, default=1, metavar="N", help="of this machine (default: 1)")
    add_launch_flags(parser)
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config, which win: KEY VALUE ...")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Tuple[CfgNode, bool]:
    """Make the config, show it, and write it to config.yaml of the output folder.

    With ``--baseline``, the config of the student alone is written too.

    Returns:
        The config, and whether the teacher can be scored on its data.

    Raises:
        UserError: the teacher, the student, the data or an override cannot be used.
    """
    if is_under_torchrun():
        raise UserError(
            "mgd-distill starts its own processes (--num-gpus). Under torchrun, make the config with --config-only, "
            "and give it to tools/train_net.py"
        )
    given = merge_config("", args.opts).MODEL.MGD.TEACHER  # needed to read the teacher's config
    teacher = find_teacher(args.teacher, args.teacher_weights or given.WEIGHTS, given.OPTS)
    settings = recommended_config(
        teacher,
        find_student(args.student),
        RunData(coco_folder_of(args), args.train_dataset, args.val_dataset),
        light=args.light,
        iterations=args.iterations,
        batch=args.batch,
        teacher_opts=given.OPTS,
        output_dir=args.output_dir,
    )
    settings.override(args.opts)
    cfg = settings.cfg
    if args.baseline and not cfg.DATASETS.TEST and not cfg.DATASETS.COCO_FOLDER.VAL_JSON:
        raise UserError("--baseline compares by AP: give --val-json and --val-images, or --val-dataset")
    note, scores_teacher = _use_classes(settings, teacher, args.opts)
    _keep_teacher(teacher, [cfg.OUTPUT_DIR, alone(cfg).OUTPUT_DIR])
    _write(cfg)
    if args.baseline:
        _write(alone(cfg))
    print(f"Teacher: {kind_of(teacher.cfg)}, {args.teacher}\n{note}\n{settings}\n")
    print(f"{_learning_rate(settings)}\nThe config is written to {os.path.join(cfg.OUTPUT_DIR, 'config.yaml')}.\n")
    return cfg, scores_teacher


def _keep_teacher(teacher: TrainedDetector, folders: Sequence[str]) -> None:
    """Refuse an output folder whose new files would replace the teacher's."""
    outputs = [os.path.realpath(folder) for folder in folders]
    for path in (teacher.config_file, teacher.weights):
        if os.path.isfile(path) and os.path.dirname(os.path.realpath(path)) in outputs:
            raise UserError(
                f"--output-dir is the folder of the teacher's {os.path.basename(path)}, which the student would "
                "replace: give another folder"
            )


def _compare(cfg: CfgNode, scores_teacher: bool) -> None:
    """Print the table of teacher, alone and distilled, and write the report again, which then has all three."""
    teacher_scores = os.path.join(cfg.OUTPUT_DIR, "teacher", SCORES_FILE) if scores_teacher else ""
    print("\n" + write_comparison(cfg, alone(cfg).OUTPUT_DIR, teacher_scores))
    if cfg.REPORT.ENABLED:
        opts = ["REPORT.ALONE", alone(cfg).OUTPUT_DIR, "REPORT.TEACHER_SCORES", teacher_scores]
        report.run(argparse.Namespace(config_file=os.path.join(cfg.OUTPUT_DIR, "config.yaml"), opts=opts))


def _run(flags: List[str], args: argparse.Namespace, folder: str) -> None:
    """Run a training or an evaluation with config.yaml of a folder, as tools/train_net.py does."""
    # Detectron2 adds handlers for each output folder: the second run of a process would log twice, and to both.
    for name in ("detectron2", "fvcore", "mgd_det"):
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()
    processes = ["--num-gpus", str(args.num_gpus), "--dist-timeout", str(args.dist_timeout)]
    if args.cpu_processes is not None:
        processes += ["--cpu-processes", str(args.cpu_processes)]
    argv = ["--config-file", os.path.join(folder, "config.yaml"), *processes, *flags]
    run_in_processes(train_net.run, argument_parser().parse_args(argv), train_net.device)
    gc.collect()  # the trainer and its hooks refer to each other
    torch.cuda.empty_cache()


def _use_classes(settings: Settings, teacher: TrainedDetector, opts: Sequence[str]) -> Tuple[str, bool]:
    """Set NUM_CLASSES to the data's; return a note about the teacher's, and whether they are the same."""
    cfg = settings.cfg
    head = class_head(cfg)
    key = next(f"MODEL.{name}.NUM_CLASSES" for name, node in cfg.MODEL.items() if node is head)
    use_coco_folders(cfg)
    for split in ("TRAIN", "TEST"):
        if cfg.DATASETS[split] == (f"coco_folder_{'val' if split == 'TEST' else 'train'}",):
            settings.set(f"DATASETS.{split}", cfg.DATASETS[split], "the name of the data set of the json")
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][:1]
    ours = class_names(names[0]) if names else None
    if ours is not None and key not in opts:
        settings.set(key, len(ours), f"the classes of {names[0]}")
    theirs = next(iter(learned_classes(teacher.cfg).values()), None)
    number = class_head(teacher.cfg).NUM_CLASSES
    if head.NUM_CLASSES != number or (ours and theirs and ours != theirs):
        inherited = (
            "The student inherits the teacher's head without its class layer (of an R-CNN: all layers with outputs for "
            "each class), which starts from random weights. "
        ) * ("head" in cfg.MODEL.MGD.INHERIT)
        return (
            f"The teacher's classes ({_shown(theirs, number)}) are not the data's ({_shown(ours, head.NUM_CLASSES)}). "
            f"{inherited}The teacher cannot be scored on these data."
        ), False
    if theirs is None:
        return f"The names of the teacher's {number} classes are not known: they count as those of the data.", True
    return f"Teacher and data have the same classes ({_shown(theirs, number)}).", True


def _shown(classes: Optional[Sequence[str]], number: int) -> str:
    if not classes:
        return f"{number}, names unknown"
    return f"{number}: {', '.join(classes[:_SHOWN_CLASSES])}{', ...' if number > _SHOWN_CLASSES else ''}"


def _learning_rate(settings: Settings) -> str:
    solver, why = settings.cfg.SOLVER, settings.why("SOLVER.BASE_LR") or f"that of {settings.base}"
    return f"Learning rate: {solver.BASE_LR:g} for {solver.IMS_PER_BATCH} images a batch ({why})."


def _write(cfg: CfgNode) -> None:
    refuse_locked_folder(cfg.OUTPUT_DIR, "--output-dir")
    folder = writable_folder(cfg.OUTPUT_DIR, "--output-dir")
    write_text_atomically(os.path.join(folder, "config.yaml"), cfg.dump())


if __name__ == "__main__":
    main()

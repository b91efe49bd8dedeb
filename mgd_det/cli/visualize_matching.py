"""Shows the channel matching of a distillation: how well it matches, and which channels it pairs.

The cost is measured on some batches of the training set. Without --checkpoint, the program shows the last one in
OUTPUT_DIR; if there is none, it shows the student at the start of training.

Writes matching.png and channels_<position>.png, and prints a table.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.cli.arguments import positive
from mgd_det.cli.data_setup import check_proposal_files, use_coco_folders, use_keypoints
from mgd_det.cli.error_reports import program
from mgd_det.cli.yaml_setup import read_config, use_available_device, use_folder_of_training
from mgd_det.config import MGD_BACKBONE
from mgd_det.data import check_dataset
from mgd_det.data.class_names import check_same_classes, class_names
from mgd_det.data.mapper import CheckedMapper
from mgd_det.distillation import Distiller, MatchingStatistics
from mgd_det.distillation.losses import marginal_relu
from mgd_det.engine import Trainer
from mgd_det.errors import UserError
from mgd_det.files.outputs import writable_folder
from mgd_det.files.unsafe_files import add_unsafe_files_flag
from mgd_det.matching import assign_channels
from mgd_det.modeling import Distillation, attach_losses, find_distillation
from mgd_det.visualization import MatchedPosition, plot_matched_channels, plot_matching, spread_channels

MOST_CHANNELS = 32  # in one picture, which takes seconds and stays readable


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a config with distillation")
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the last one in the config's OUTPUT_DIR")
    parser.add_argument(
        "--batches", type=positive, default=20, metavar="N", help="to measure on (default: %(default)s)"
    )
    parser.add_argument("--image", type=int, default=0, metavar="N", help="of the training set (default: %(default)s)")
    parser.add_argument(
        "--position", action="append", metavar="NAME", help="to draw channels of; may be repeated (default: all)"
    )
    parser.add_argument(
        "--channels",
        type=positive,
        default=6,
        metavar="N",
        help=f"student channels to draw, at most {MOST_CHANNELS} (default: %(default)s)",
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="folder of the pictures")
    add_unsafe_files_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config: KEY VALUE ...")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure the cost, print the table and draw the pictures."""
    writable_folder(args.output_dir, "--output-dir")
    if args.channels > MOST_CHANNELS:
        print(f"--channels is {args.channels}: a picture shows at most {MOST_CHANNELS}, so {MOST_CHANNELS} are drawn.")
    cfg = read_config(args.config_file, args.opts)
    use_folder_of_training(cfg, args.config_file, args.opts)
    if cfg.MODEL.BACKBONE.NAME != MGD_BACKBONE:
        raise UserError(
            f"--config-file {args.config_file} has no distillation: MODEL.BACKBONE.NAME is "
            f"{cfg.MODEL.BACKBONE.NAME}, not {MGD_BACKBONE}"
        )
    warning = use_available_device(cfg)
    if warning:
        print(warning, file=sys.stderr)
    use_coco_folders(cfg)
    check_proposal_files(cfg)
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set")
    for name in cfg.DATASETS.TRAIN:
        check_dataset(name, ["keypoints"] * cfg.MODEL.KEYPOINT_ON)
        use_keypoints(cfg, name, trained=True)
    check_same_classes({f"DATASETS.TRAIN {name}": class_names(name) for name in cfg.DATASETS.TRAIN}, {})
    dataset = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    if not 0 <= args.image < len(dataset):
        raise UserError(f"--image is {args.image}, but the training set has images 0 to {len(dataset) - 1}")
    cfg.freeze()

    detector = build_model(cfg).eval()
    attach_losses(detector)  # it also tells the backbone how much of a batch is padding, as in training
    distillation = find_distillation(detector)
    assert distillation is not None
    names = _chosen_positions(distillation.distiller, args.position)
    loaded = load_student(cfg, detector, distillation, args.checkpoint)
    statistics = _measure(cfg, detector, distillation, args.batches)
    matched = matched_positions(statistics, distillation.distiller, loaded)
    print(f"\nStudent: {loaded.source}. Measured on {statistics.num_images} images of {', '.join(cfg.DATASETS.TRAIN)}.")
    print(_table(matched))
    title = f"Channel matching of {loaded.source}"
    paths = [plot_matching(matched, os.path.join(args.output_dir, "matching.png"), title=title)]
    paths += _draw_channels(args, cfg, detector, distillation, dataset[args.image], matched, names, loaded.source)
    print("\n" + "\n".join(paths))


@dataclass
class Loaded:
    """Where the student's weights come from, and the groups of its checkpoint by position, if it has any."""

    source: str
    groups: Optional[Dict[str, torch.Tensor]]


def load_student(cfg: CfgNode, detector: nn.Module, distillation: Distillation, checkpoint: Optional[str]) -> Loaded:
    """Load the student's weights and, if the checkpoint has it, the state of the distillation."""
    checkpointer = WeightsCheckpointer(detector, save_dir=cfg.OUTPUT_DIR)
    path = checkpoint or (checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else "")
    if not path:
        if cfg.MODEL.WEIGHTS:
            checkpointer.load(cfg.MODEL.WEIGHTS)
        source = f"the untrained student ({cfg.MODEL.WEIGHTS or 'random weights'})"
        print(f"There is no checkpoint in {cfg.OUTPUT_DIR}: the matching is solved for {source}.")
        return Loaded(source, None)
    rest = checkpointer.load(path)
    name = os.path.basename(path)
    bottom_up = [key for key in checkpointer.unset_keys if key.startswith("backbone.")]
    if bottom_up:
        raise UserError(
            f"--checkpoint {path} does not set {len(bottom_up)} tensors of the student's backbone, such as "
            f"{bottom_up[0]}: give a checkpoint of the config's student, {cfg.MODEL.MGD.STUDENT_BACKBONE}"
        )
    state = rest.get("trainer", {}).get("hooks", {}).get("MatchingUpdate")
    if state is None:
        print(f"{path} has no matching (it is from a training without distillation): only the optimum is shown.")
        return Loaded(name, None)
    distillation.distiller.load_distillation_state(state)
    groups = {p.name: distillation.distiller.groups(p).cpu() for p in distillation.distiller.matched_positions}
    return Loaded(name, groups if all(g.numel() > 0 for g in groups.values()) else None)


def _measure(cfg: CfgNode, detector: nn.Module, distillation: Distillation, batches: int) -> MatchingStatistics:
    """Measure the cost on some batches of the training set."""
    statistics = distillation.start_matching()
    seed_all_rng(max(cfg.SEED, 0))
    loader = iter(Trainer.build_train_loader(cfg))
    for _ in tqdm(range(batches), desc="measuring", unit="batch"):
        distillation.measure(detector, next(loader), statistics)
    if not distillation.distiller.is_matched:
        statistics.solve()
    return statistics


def matched_positions(statistics: MatchingStatistics, distiller: Distiller, loaded: Loaded) -> List[MatchedPosition]:
    """Return the optimal matching of each position, with that of the checkpoint, if any."""
    matched = []
    for p in distiller.matched_positions:
        cost = statistics.cost(p)
        groups = assign_channels(cost, distiller.group_size(p))
        matched.append(MatchedPosition(p.name, cost, groups, loaded.groups[p.name] if loaded.groups else None))
    return matched


def _table(matched: Sequence[MatchedPosition]) -> str:
    headers = ["position", "student\nchannels", "teacher\nchannels", "group\nsize", "random\nassignment"]
    headers += ["checkpoint's\nmatching", "optimum\nnow", "teacher channels\nleft out"]
    rows = []
    for m in matched:
        former = "-" if m.former_cost is None else f"{m.former_cost:.4f}"
        costs = [f"{m.random_cost:.4f}", former, f"{m.optimal_cost:.4f}"]
        rows.append([m.name, *m.cost.shape, m.groups.shape[1], *costs, m.left_out])
    return "Mean cost of a matched pair, from 0 (alike) over 2 (unrelated) to 4 (opposite):\n" + tabulate(
        rows, headers=headers, disable_numparse=True
    )


def _draw_channels(
    args: argparse.Namespace,
    cfg: CfgNode,
    detector: nn.Module,
    distillation: Distillation,
    entry: Dict[str, Any],
    matched: Sequence[MatchedPosition],
    names: Sequence[str],
    source: str,
) -> List[str]:
    """Draw the channels of the positions ``names``, by the checkpoint's matching if there is one."""
    example = CheckedMapper(cfg, is_train=False)(entry)
    shown = distillation.start_matching()
    distillation.measure(detector, [example], shown)
    image = _input_image(detector, example, cfg.INPUT.FORMAT)
    distiller, paths = distillation.distiller, []
    for position, m in zip(distiller.matched_positions, matched):
        if m.name not in names:
            continue
        groups = m.groups if m.former is None else m.former
        rows = groups[:, 0] >= 0
        with torch.no_grad():
            student = distiller.adapted(position, shown.last_student[position.student])
            if m.name in distiller.norms:  # no loss but PKD or AT has none
                student = distiller.norms[m.name].eval()(student)
            student = student[0]
            teacher = shown.last_teacher[position.teacher]
            reduced, margin = distiller.reduce(teacher, distiller.margin(position), groups[rows].to(teacher.device))
        name = distiller.reducer.upper()
        targets = {
            f"{name} of\nthe group": _on_all_channels(reduced[0], rows),
            f"target: max\n({name}, margin)": _on_all_channels(marginal_relu(reduced, margin)[0], rows),
        }
        matching = "the optimal matching" if m.former is None else "the checkpoint's matching"
        output = os.path.join(args.output_dir, f"channels_{m.name}.png")
        paths.append(
            plot_matched_channels(
                image,
                student.cpu(),
                teacher[0].cpu(),
                targets,
                groups,
                output,
                channels=spread_channels(m.cost, groups, min(args.channels, MOST_CHANNELS)),
                cost=m.cost,
                student_note=f"after {cfg.MODEL.MGD.NORM}" if cfg.MODEL.MGD.NORM and m.name in distiller.norms else "",
                title=f"{m.name} under {matching}, {source}: student channels from best to worst matched",
            )
        )
    return paths


def _on_all_channels(feature: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return (matched Cs, H, W) as (Cs, H, W) on the CPU, zero for student channels without a group."""
    full = torch.zeros(len(rows), *feature.shape[1:])
    full[rows] = feature.float().cpu()
    return full


def _input_image(detector: Any, example: Dict[str, Any], channel_order: str) -> np.ndarray:
    """Return the example as the detector sees it, padding included, (H, W, 3) uint8 RGB."""
    batch = detector.preprocess_image([example]).tensor[0]
    pixels = (batch * detector.pixel_std + detector.pixel_mean).clamp(0, 255).permute(1, 2, 0).cpu().numpy()
    pixels = pixels.round().astype(np.uint8)
    return pixels if channel_order == "RGB" else pixels[:, :, ::-1]


def _chosen_positions(distiller: Distiller, asked: Optional[Sequence[str]]) -> List[str]:
    names = [p.name for p in distiller.matched_positions]
    if not names:
        raise UserError(
            "no position of the config is matched by an assignment, so there is no matching to show: its losses "
            "compare the channels one to one"
        )
    for name in asked or ():
        if name.replace(".", "_") not in names:
            raise UserError(f"--position {name!r} is not a position of the config: use one of {', '.join(names)}")
    return [name.replace(".", "_") for name in asked or names]


main = program(parse_args, run)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Trains, distils and evaluates what a LazyConfig describes: Detectron2's program of this name with MGD.

python tools/lazyconfig_train_net.py --config-file configs/COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py --num-gpus 8
python tools/lazyconfig_train_net.py --config-file ... --resume train.eval_period=10000
python tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=output/model_final.pth

For data sets in COCO format it has the flags of tools/train_net.py.
"""

from mgd_det.cli import lazy_setup
from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.distributed.processes import launch
from mgd_det.engine import lazy_trainer


def main(args):
    """One process of the training; see :func:`mgd_det.cli.error_reports.run_program` for how it ends."""
    run_program(lambda: run(args))


def run(args):
    cfg = lazy_setup.setup(args)
    if args.eval_only:
        lazy_trainer.evaluate(cfg, resume=args.resume)
    else:
        lazy_trainer.train(cfg, resume=args.resume)


def launch_main(args):
    launch(main, args, device=lambda: lazy_setup.read_config(args.config_file, args.opts).train.device)


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    run_program(lambda: launch_main(arguments))

#!/usr/bin/env python
"""Trains, distils and evaluates a detector: Detectron2's tools/train_net.py with MGD.

python tools/train_net.py --config-file configs/COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml --num-gpus 8
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
python tools/train_net.py --config-file ... --eval-teacher
python tools/train_net.py --config-file ... --train-json a.json --train-images a/ --val-json b.json --val-images b/
"""

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mgd_det.cli.error_reports import run_program
from mgd_det.cli.yaml_setup import argument_parser, read_config, setup
from mgd_det.distributed.processes import launch
from mgd_det.engine import Trainer, load_and_test


def main(args):
    """One process of the training; see :func:`mgd_det.cli.error_reports.run_program` for how it ends."""
    run_program(lambda: run(args))


def run(args):
    cfg = setup(args)
    if args.eval_only or args.eval_teacher:
        results = load_and_test(cfg, resume=args.resume and not args.eval_teacher)
        if comm.is_main_process() and not args.eval_teacher:
            verify_results(cfg, results)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def launch_main(args):
    launch(main, args, device=lambda: read_config(args.config_file, args.opts).MODEL.DEVICE)


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    run_program(lambda: launch_main(arguments))

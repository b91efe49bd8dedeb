"""The recommended config of every kind of teacher with several students."""

import pytest
import torch
from detectron2.modeling import build_model
from fast_cases import fast
from random_teachers import random_teacher

from mgd_det import model_zoo
from mgd_det.config import MGD_BACKBONE, merge_config, without_distillation
from mgd_det.errors import UserError
from mgd_det.modeling import find_distillation
from mgd_det.recipe import RunData, find_student, find_teacher, recommended_config
from mgd_det.recipe.recommended import alone, kind_of

FCOS = """
_BASE_: "{base}"
MODEL:
  BACKBONE: {{NAME: "build_fcos_resnet_fpn_backbone"}}
  FCOS: {{NUM_CONVS: 2}}
  WEIGHTS: "trained.pth"
"""
# Name of the teacher's kind: its config, and the config of the recommended recipe for this kind.
TEACHERS = {
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_3x.yaml", "COCO-Detection/retinanet"),
    "FCOS": ("", "COCO-Detection/fcos"),
    "Faster R-CNN": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "COCO-Detection/faster_rcnn"),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "COCO-InstanceSegmentation/mask_rcnn"),
    "Cascade Mask R-CNN": (
        "Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml",
        "COCO-InstanceSegmentation/cascade_mask_rcnn",
    ),
    "Keypoint R-CNN": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml", ""),
}
STUDENTS = ["mobilenetv2", "resnet18", "shufflenetv2_x0.5", "mobilenetv3_small"]
NO_DATA = RunData({})


@pytest.fixture
def teacher(tmp_path):
    def find(kind):
        name = TEACHERS[kind][0]
        if not name:
            name = tmp_path / "fcos.yaml"
            name.write_text(FCOS.format(base=model_zoo.get_config_file("Base-FCOS.yaml")))
        return find_teacher(str(name))

    return find


def shapes_on_meta(cfg):
    cfg = without_distillation(cfg)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_model(cfg).state_dict().items()}


@pytest.mark.parametrize("kind", fast(TEACHERS))
def test_every_student_is_a_detector_of_the_teachers_kind(teacher, kind):
    found = teacher(kind)
    theirs = shapes_on_meta(found.cfg)
    heads = {name: shape for name, shape in theirs.items() if not name.startswith("backbone.") and "." in name}
    assert kind_of(found.cfg) == kind and len(heads) > 5
    for name in STUDENTS:
        cfg = recommended_config(found, find_student(name), NO_DATA).cfg
        assert cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE and kind_of(cfg) == kind
        ours = shapes_on_meta(cfg)
        assert {key: ours.get(key) for key in heads} == heads  # all can be inherited
        outputs = [key for key in theirs if key.startswith("backbone.fpn_output")]
        assert outputs and all(ours[key] == theirs[key] for key in outputs)


@pytest.mark.parametrize("kind", [kind for kind, (_, recipe) in TEACHERS.items() if recipe])
def test_it_is_the_recipe_of_the_config_that_comes_with_the_project(teacher, kind):
    expected = merge_config(
        model_zoo.get_config_file(f"{TEACHERS[kind][1]}_MobileNetV2_FPN_mgd_R50_recommended_1x.yaml"), []
    )
    cfg = recommended_config(teacher(kind), find_student("mobilenetv2"), NO_DATA).cfg
    assert cfg.MODEL.MGD.STUDENT_BACKBONE == expected.MODEL.MGD.STUDENT_BACKBONE
    assert (cfg.MODEL.MGD.POSITIONS, cfg.MODEL.MGD.LOSS) == (expected.MODEL.MGD.POSITIONS, expected.MODEL.MGD.LOSS)
    assert cfg.MODEL.MGD.INHERIT == ["fpn", "head"]  # from an FCOS too, if an FCOS teaches
    assert cfg.SOLVER == expected.SOLVER
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.PIXEL_MEAN) == (expected.MODEL.WEIGHTS, expected.MODEL.PIXEL_MEAN)
    for node in ("RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET", "ANCHOR_GENERATOR"):
        if kind != "FCOS" and node != "ANCHOR_GENERATOR":
            assert cfg.MODEL[node] == expected.MODEL[node], node
    assert cfg.DATASETS.TRAIN == expected.DATASETS.TRAIN  # the teacher's


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEACHERS)
def test_it_builds_with_its_teacher(teacher, kind, monkeypatch):
    monkeypatch.setattr("mgd_det.modeling.mgd_backbone.build_teacher", random_teacher)
    cfg = recommended_config(teacher(kind), find_student("mobilenetv2"), NO_DATA).cfg
    cfg.MODEL.DEVICE = "cpu"
    positions = find_distillation(build_model(cfg)).distiller.positions
    first = 2 if "R-CNN" in kind else 3
    assert [p.student for p in positions] == [f"p{level}" for level in range(first, first + 4)]
    assert all(p.student_channels == p.teacher_channels == 256 for p in positions)


def test_the_learning_rate_follows_the_batch_and_the_steps_the_iterations(teacher):
    found, student = teacher("Faster R-CNN"), find_student("resnet18")
    settings = recommended_config(found, student, NO_DATA, iterations=3000, batch=4)
    solver = settings.cfg.SOLVER
    assert solver.BASE_LR == pytest.approx(0.02 / 4) and solver.IMS_PER_BATCH == 4
    assert "0.02" in settings.why("SOLVER.BASE_LR") and "4/16" in settings.why("SOLVER.BASE_LR")
    assert (solver.MAX_ITER, solver.STEPS) == (3000, (2000, 2667))  # two thirds and eight ninths, as 1x
    assert solver.WARMUP_ITERS == 300 and solver.CHECKPOINT_PERIOD == 750
    # As many images as 1x.
    assert recommended_config(found, student, NO_DATA, batch=8).cfg.SOLVER.MAX_ITER == 180000
    assert recommended_config(found, student, NO_DATA, iterations=1).cfg.SOLVER.STEPS == ()


def test_data_of_its_own(teacher):
    found, student = teacher("RetinaNet"), find_student("resnet18")
    files = RunData({"TRAIN_JSON": "/a.json", "TRAIN_IMAGES": "/a", "VAL_JSON": "/b.json", "VAL_IMAGES": "/b"})
    datasets = recommended_config(found, student, files).cfg.DATASETS
    assert dict(datasets.COCO_FOLDER) == files.coco_folder
    datasets = recommended_config(found, student, RunData({}, ["a", "b"], ["c"])).cfg.DATASETS
    assert (datasets.TRAIN, datasets.TEST) == (("a", "b"), ("c",))
    # Not COCO's val2017, whose classes are others.
    assert recommended_config(found, student, RunData({}, ["a"])).cfg.DATASETS.TEST == ()
    both = RunData({"TRAIN_JSON": "/a.json", "TRAIN_IMAGES": "/a"}, ["a"])
    with pytest.raises(UserError, match="--train-dataset and --train-json"):
        recommended_config(found, student, both)


@pytest.mark.parametrize(
    "name, message",
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x.yaml", "MODEL.BACKBONE.NAME 'build_resnet_backbone'"),
        ("COCO-Detection/faster_rcnn_R_50_DC5_3x.yaml", "MODEL.BACKBONE.NAME 'build_resnet_backbone'"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml", "MODEL.META_ARCHITECTURE 'PanopticFPN'"),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "MODEL.META_ARCHITECTURE 'ProposalNetwork'"),
        ("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml", "MODEL.LOAD_PROPOSALS True"),
    ],
)
def test_teachers_that_the_recipe_does_not_fit(name, message):
    with pytest.raises(UserError) as error:
        recommended_config(find_teacher(name), find_student("resnet18"), NO_DATA)
    assert f"--teacher {name}" in str(error.value) and message in str(error.value)


def test_the_student_alone_has_no_part_of_its_teacher(teacher):
    cfg = recommended_config(teacher("RetinaNet"), find_student("mobilenetv2"), NO_DATA, output_dir="/out").cfg
    plain = alone(cfg)
    assert (plain.MODEL.BACKBONE.NAME, plain.MODEL.MGD.INHERIT) == ("build_retinanet_mobilenetv2_fpn_backbone", [])
    assert plain.OUTPUT_DIR == "/out/alone" and cfg.OUTPUT_DIR == "/out"
    assert (plain.SEED, plain.SOLVER) == (cfg.SEED, cfg.SOLVER)


def test_the_data_of_a_teacher_that_skipped_broken_input(teacher):
    found = teacher("RetinaNet")
    found.cfg.DATASETS.TRAIN, found.cfg.DATASETS.TEST = ("a_without_broken",), ("b_without_broken", "c")
    found.cfg.DATASETS.BROKEN_INPUT = "skip"
    data = recommended_config(found, find_student("resnet18"), NO_DATA).cfg.DATASETS
    assert (data.TRAIN, data.TEST, data.BROKEN_INPUT) == (("a",), ("b", "c"), "skip")

"""What a student starts from: its teacher's FPN and heads, compared with the teacher's file as torch.load reads it."""

import json
import logging
from collections import OrderedDict

import pytest
import torch
import toy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.cli.yaml_setup import read_config, save_student_config
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import check_inheritance, inherit, inherit_from_config, inherit_from_teacher

BOTH = ["fpn", "head"]


@pytest.fixture(scope="module", params=[toy.RETINANET, toy.FCOS, toy.RCNN])
def base(request):
    return request.param


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Paths of checkpoints of random teachers, by base and overrides."""
    folder, made = tmp_path_factory.mktemp("teachers"), {}

    def get(base=toy.RETINANET, opts=()):
        key = (base, *opts)
        if key not in made:
            torch.manual_seed(len(made) + 7)
            teacher = build_model(toy.teacher_config(base, opts))
            toy.randomize_norms(teacher)
            made[key] = str(folder / f"{len(made)}.pth")
            torch.save({"model": teacher.state_dict()}, made[key])
        return made[key]

    return get


def config(weights, base=toy.RETINANET, parts=BOTH, teacher=(), opts=()):
    """A plain student's config with a teacher of ``base`` or, with an own base, of the first of ``teacher``."""
    teacher_base, teacher_opts = teacher or (base, [])
    cfg = toy.plain_config(base, opts=opts)
    cfg.MODEL.MGD.INHERIT = list(parts)
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE, cfg.MODEL.MGD.TEACHER.WEIGHTS = teacher_base, weights
    cfg.MODEL.MGD.TEACHER.OPTS = [*toy.teacher_opts(teacher_base), *teacher_opts]
    return cfg


def student_of(cfg):
    torch.manual_seed(1)
    return build_model(cfg)


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_head(name):
    return name.split(".")[0] in ("head", "roi_heads", "proposal_generator")


def is_fpn(name):
    return name.startswith(("backbone.fpn_", "backbone.top_block."))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [["fpn"], ["head"], BOTH])
def test_the_student_has_the_values_of_the_teachers_file_where_name_and_shape_are_equal(base, weights, parts):
    path = weights(base)
    cfg = config(path, base, parts)
    student = student_of(cfg)
    before = copy_of(student)
    report = inherit_from_config(cfg, student)
    file, after = torch.load(path)["model"], student.state_dict()
    is_wanted = {"fpn": is_fpn, "head": is_head}
    expected = {
        name
        for name, value in before.items()
        if any(is_wanted[part](name) for part in parts) and name in file and file[name].shape == value.shape
    }
    assert expected and set(report.inherited) == expected
    for name, value in after.items():
        assert torch.equal(value, (file if name in expected else before)[name]), name
    assert report.inherited == {name: file[name].numel() for name in expected}
    if "fpn" in parts:  # a half-width ResNet-50 has twice the channels of a ResNet-18
        assert report.other_shape["backbone.fpn_lateral5.weight"] == ((16, 1024, 1, 1), (16, 512, 1, 1))
        assert "backbone.fpn_output4.weight" in expected and "backbone.fpn_output4.norm.running_mean" in expected


def test_the_table_counts_by_module_and_lists_what_does_not_fit(weights):
    cfg = config(weights())
    student = student_of(cfg)
    report = inherit_from_config(cfg, student)
    rows = {line.split()[0]: line.split()[1:] for line in str(report).splitlines() if line.strip()}
    file = torch.load(weights())["model"]
    for module in ("backbone.fpn_output3", "head.bbox_subnet", "head.cls_score"):
        tensors = [
            value
            for name, value in file.items()
            if name.startswith(f"{module}.") and not name.endswith("num_batches_tracked")
        ]
        assert rows[module] == [str(len(tensors)), str(sum(value.numel() for value in tensors)), *"0000"]
    assert rows["backbone.fpn_lateral3"][2] == "1"  # its norm fits
    lateral = "backbone.fpn_lateral3.weight (16, 256, 1, 1) in the teacher, (16, 128, 1, 1) in the student"
    assert lateral in str(report)
    assert not any("num_batches_tracked" in line for line in str(report).splitlines())


def test_nothing_random_is_drawn_and_the_training_mode_stays(weights):
    cfg = config(weights())
    student = student_of(cfg).train()
    state = torch.get_rng_state()
    inherit_from_config(cfg, student)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in student.modules())


def test_the_start_is_the_students_own(weights):
    cfg = config(weights())
    students = [student_of(cfg) for _ in range(2)]
    for student in students:
        inherit_from_config(cfg, student)
    with torch.no_grad():
        students[0].head.cls_score.weight.zero_()
    assert students[1].head.cls_score.weight.abs().sum() > 0


@pytest.mark.slow
def test_a_distilled_student_inherits_as_the_plain_one_and_keeps_its_distillation(weights):
    cfg = config(weights())
    plain = student_of(cfg)
    inherit_from_config(cfg, plain)
    distilled_cfg = toy.distilled_config(weights(), opts=["MODEL.MGD.INHERIT", str(BOTH)])
    distilled = student_of(distilled_cfg)
    child = {name: value.clone() for name, value in distilled.backbone.mgd.named_parameters()}
    assert child
    inherit_from_config(distilled_cfg, distilled)
    assert list(plain.state_dict()) == list(distilled.state_dict())
    assert all(torch.equal(value, distilled.state_dict()[name]) for name, value in plain.state_dict().items())
    assert all(torch.equal(value, child[name]) for name, value in distilled.backbone.mgd.named_parameters())


def test_no_parts_no_teacher():
    cfg = toy.plain_config()
    student = student_of(cfg)
    before = copy_of(student)
    assert inherit_from_config(cfg, student) is None
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_other_input_of_the_images_does_not_matter(weights):
    teacher = (toy.RETINANET, ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]"])
    cfg = config(weights(), teacher=teacher)
    student = student_of(cfg)
    inherit_from_config(cfg, student)
    assert torch.equal(student.head.cls_score.weight, torch.load(weights())["model"]["head.cls_score.weight"])
    assert student.pixel_mean.flatten().tolist() == pytest.approx(cfg.MODEL.PIXEL_MEAN)


def test_a_faster_rcnn_teaches_a_retinanet_its_fpn(weights, caplog):
    path = weights(toy.RCNN)
    cfg = config(path, teacher=(toy.RCNN, []))
    student = student_of(cfg)
    with caplog.at_level(logging.INFO, logger="mgd_det"):
        report = inherit_from_config(cfg, student)
    file = torch.load(path)["model"]
    for level in (3, 4, 5):
        name = f"fpn_output{level}"
        assert torch.equal(getattr(student.backbone, name).weight, file[f"backbone.{name}.weight"])
    assert "backbone.fpn_output2.weight" in report.not_in_student
    assert "proposal_generator.rpn_head.conv.weight" in report.not_in_student
    assert {"head.cls_score.weight", "backbone.top_block.p6.weight"} <= set(report.not_in_teacher)
    warnings = {r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "inherit" in r.name}
    assert len(warnings) == 1 and "Nothing was inherited of: head" in warnings.pop()


def test_if_nothing_fits_the_error_names_key_value_and_cause(weights):
    # An R-CNN's heads are others than a RetinaNet's.
    cfg = config(weights(toy.RCNN), parts=["head"], teacher=(toy.RCNN, []))
    with pytest.raises(UserError, match=r"MODEL.MGD.INHERIT is \['head'\], .*no proposal_generator.*set it to \[\]"):
        inherit_from_config(cfg, student_of(cfg))
    wide = ["MODEL.FPN.OUT_CHANNELS", "32"]
    cfg = config(weights(opts=wide), parts=["fpn"], teacher=(toy.RETINANET, wide))
    cfg.MODEL.FPN.NORM = ""  # nor do the norm layers fit
    cfg.MODEL.MGD.INHERIT_CHANNELS.CRITERION = "none"
    with pytest.raises(UserError, match=r"INHERIT is \['fpn'\].*fpn_\w+.weight is \(32, .* and \(16, "):
        inherit_from_config(cfg, student_of(cfg))


def test_an_unknown_part_is_an_error_before_anything_is_built(weights):
    with pytest.raises(UserError, match=r"MODEL.MGD.INHERIT is \['fpn', 'neck'\]; .*\"fpn\", \"head\""):
        check_inheritance(config(weights(), parts=["fpn", "neck"]))
    with pytest.raises(ArgumentError, match="parts is 'fpn'"):
        inherit(nn.Module(), {}, "fpn")
    cfg = toy.plain_config(opts=["MODEL.MGD.INHERIT", "['fpn']"])
    with pytest.raises(UserError, match="MODEL.MGD.TEACHER.CONFIG_FILE is empty"):
        check_inheritance(cfg)
    cfg.MODEL.MGD.TEACHER.CONFIG_FILE = toy.RETINANET
    with pytest.raises(UserError, match="MODEL.MGD.TEACHER.WEIGHTS is empty"):
        inherit_from_config(cfg, student_of(cfg))


def test_tensors_that_the_teachers_weights_lack_are_not_inherited(weights, tmp_path):
    file = torch.load(weights())["model"]
    part = {name: value for name, value in file.items() if not name.startswith("head.bbox")}
    torch.save({"model": part}, tmp_path / "part.pth")
    cfg = config(str(tmp_path / "part.pth"))
    student = student_of(cfg)
    before = copy_of(student)
    report = inherit_from_config(cfg, student)
    assert {name for name in report.not_in_teacher if name.endswith("weight")} >= {"head.bbox_pred.weight"}
    assert not any(name.startswith("head.bbox") and "tracked" not in name for name in report.inherited)
    for name, value in student.state_dict().items():
        if name.startswith("head.bbox"):
            assert torch.equal(value, before[name]), name


# ------------------------------------------------------------------------------- classes


@pytest.fixture
def data_set():
    """Registers data sets with given class names."""
    names = []

    def register(name, classes):
        DatasetCatalog.register(name, list)
        names.append(name)
        MetadataCatalog.get(name).thing_classes = list(classes)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def class_layers(base, opts, agnostic):
    """The layers with outputs for each class, spelled out."""
    if base != toy.RCNN:
        return {"head.cls_score"}
    heads = ["roi_heads.box_predictor"]
    if "CascadeROIHeads" in opts:
        heads = [f"roi_heads.box_predictor.{i}" for i in range(3)]
    layers = {f"{head}.cls_score" for head in heads}
    if not agnostic:
        layers |= {f"{head}.bbox_pred" for head in heads}
        layers |= {"roi_heads.mask_head.predictor"} if "MODEL.MASK_ON" not in opts else set()
    return layers


AGNOSTIC = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, more", [*((kind, []) for kind in toy.DETECTORS), ("mask_rcnn", AGNOSTIC)])
def test_as_many_classes_of_other_names_leave_the_class_layers_out(kind, more, weights, data_set):
    base, opts = toy.DETECTORS[kind]
    opts = [*opts, *more]
    ours, theirs = data_set("ours", "abcdefghij"), data_set("theirs", "klmnopqrst")
    teacher = (base, [*opts, "DATASETS.TRAIN", str((theirs,))])
    cfg = config(weights(base, opts), base, teacher=teacher, opts=[*opts, "DATASETS.TRAIN", str((ours,))])
    student = student_of(cfg)
    before = copy_of(student)
    report = inherit_from_config(cfg, student)
    layers = class_layers(base, opts, agnostic=bool(more))
    if kind == "cascade_mask_rcnn":
        layers.add("roi_heads.mask_head.predictor")  # its boxes alone are class-agnostic
        layers -= {f"roi_heads.box_predictor.{i}.bbox_pred" for i in range(3)}
    assert {name.rpartition(".")[0] for name in report.other_classes} == layers
    for name, value in student.state_dict().items():
        if name.rpartition(".")[0] in layers:
            assert torch.equal(value, before[name]), name
            assert name in str(report) and name not in report.inherited

    cfg.DATASETS.TRAIN = (theirs,)
    assert inherit_from_config(cfg, student).other_classes == []
    cfg.DATASETS.TRAIN = ("not_registered",)
    assert inherit_from_config(cfg, student).other_classes == []


def test_another_number_of_classes_is_another_shape(weights):
    cfg = config(weights(), opts=["MODEL.RETINANET.NUM_CLASSES", "4"])
    report = inherit_from_config(cfg, student_of(cfg))
    assert set(report.other_shape) >= {"head.cls_score.weight", "head.cls_score.bias"}
    (teacher, student) = report.other_shape["head.cls_score.bias"]
    assert teacher[0] / student[0] == 10 / 4
    assert "head.bbox_pred.weight" in report.inherited


@pytest.mark.slow
def test_classes_of_a_teacher_that_was_trained_on_a_folder_are_read_from_its_json(weights, data_set, tmp_path):
    # Both runs register their own folder by the same name.
    ours = data_set("coco_folder_train", "abcdefghij")
    path = tmp_path / "theirs.json"

    def other_classes(content):
        path.write_text(content)
        folder = ["DATASETS.COCO_FOLDER.TRAIN_JSON", str(path), "DATASETS.TRAIN", str((ours,))]
        cfg = config(weights(), teacher=(toy.RETINANET, folder), opts=["DATASETS.TRAIN", str((ours,))])
        return inherit_from_config(cfg, student_of(cfg)).other_classes

    def categories(names):
        listed = [{"id": 9 - i, "name": name} for i, name in enumerate(names)]
        image = {"id": 1, "file_name": "a.png", "width": 8, "height": 8}
        return json.dumps({"images": [image], "annotations": [], "categories": listed})

    assert other_classes(categories("jihgfedcba")) == []
    assert other_classes(categories("abcdefghij")) == ["head.cls_score.weight", "head.cls_score.bias"]
    assert other_classes("not json") == []


# ------------------------------------------------------------------- without config, shared tensors


class Detector(nn.Module):
    """A detector whose two towers are one module, with a tensor of its own."""

    def __init__(self, fill, fpn=True):
        super().__init__()
        self.register_buffer("pixel_mean", torch.full((3,), float(fill)))
        self.backbone = nn.Module()
        layers = nn.Module()
        layers.stem = nn.Linear(2, 2)
        if fpn:
            self.backbone.bottom_up = layers
            self.backbone.fpn_output3 = nn.Linear(2, 2)
        else:
            self.backbone.stem = layers.stem
        tower = nn.Linear(2, 3)
        self.head = nn.ModuleDict(OrderedDict(cls_tower=tower, box_tower=tower))
        for parameter in self.parameters():
            nn.init.constant_(parameter, fill)


def test_shared_tensors_stay_shared_and_the_detectors_own_tensors_are_no_heads():
    student = Detector(0)
    optimized = list(student.parameters())
    report = inherit(student, Detector(5).state_dict(), BOTH)
    assert student.head.cls_tower.weight is student.head.box_tower.weight
    assert torch.equal(student.head.box_tower.weight, torch.full((3, 2), 5.0))
    assert [id(parameter) for parameter in student.parameters()] == [id(parameter) for parameter in optimized]
    assert student.pixel_mean.sum() == 0 and student.backbone.bottom_up.stem.weight.sum() == 0
    assert "pixel_mean" not in report.inherited
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_backbone_without_fpn_has_no_fpn_to_inherit():
    with pytest.raises(ArgumentError, match=r"parts is \['fpn'\], but the teacher's weights have no tensor"):
        inherit(Detector(0, fpn=False), Detector(5, fpn=False).state_dict(), ["fpn"])
    student = Detector(0, fpn=False)
    inherit(student, Detector(5, fpn=False).state_dict(), BOTH)
    assert student.backbone.stem.weight.sum() == 0 and student.head.cls_tower.bias.sum() == 15


def test_the_keyword_arguments_do_what_the_config_does(weights):
    cfg = config(weights())
    students = [student_of(cfg) for _ in range(2)]
    inherit_from_config(cfg, students[0])
    teacher = cfg.MODEL.MGD.TEACHER
    inherit_from_teacher(
        students[1], parts=BOTH, config_file=teacher.CONFIG_FILE, weights=teacher.WEIGHTS, opts=teacher.OPTS
    )
    states = [student.state_dict() for student in students]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_plain_students_config_knows_nothing_of_it(weights, tmp_path):
    cfg = config(weights(), opts=["OUTPUT_DIR", str(tmp_path)])
    text = open(save_student_config(cfg)).read()
    assert "INHERIT" not in text and "MGD" not in text


@pytest.mark.slow
def test_every_rank_starts_from_the_same(weights, run_ranks):
    path = weights()

    def start(rank):
        cfg = config(path)
        torch.manual_seed(rank)
        student = build_model(cfg)
        inherit_from_config(cfg, student)
        return {name: value for name, value in student.state_dict().items() if name.startswith("head.")}

    first, second = run_ranks(start, 2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_teacher_file_of_another_network_is_an_error(tmp_path):
    torch.save({"model": {"a.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    cfg = config(str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="other.pth: .*fit none"):
        inherit_from_config(cfg, student_of(cfg))


def test_the_key_is_a_list_of_names():
    with pytest.raises(UserError, match="MODEL.MGD.INHERIT"):
        read_config("", ["MODEL.MGD.INHERIT", "[1]"])


@pytest.mark.slow
def test_weights_are_loaded_first(weights, tmp_path):
    own = tmp_path / "own.pth"
    torch.manual_seed(3)
    torch.save({"model": build_model(toy.plain_config()).state_dict()}, own)
    cfg = config(weights(), parts=["head"])
    student = student_of(cfg)
    WeightsCheckpointer(student).load(str(own))
    inherit_from_config(cfg, student)
    theirs, ours = torch.load(weights())["model"], torch.load(own)["model"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, (theirs if is_head(name) else ours)[name]), name

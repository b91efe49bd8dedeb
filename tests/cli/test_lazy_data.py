"""The data sets of a LazyConfig."""

import coco_data
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from mgd_det import model_zoo
from mgd_det.cli import lazy_setup
from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.errors import UserError


@pytest.fixture(autouse=True)
def catalog():
    yield
    coco_data.forget("test_lazy", "coco_folder_")


def write(root, name, names=("plane", "car", "ship")):
    categories = [{"id": number, "name": text} for number, text in zip((7, 20, 91), names)]
    return [str(path) for path in coco_data.write(root / name, coco_data.content(categories=categories))]


def config(train, test, num_classes=3):
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py")
    cfg.model.num_classes = num_classes
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = train, test
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("others", [("ship", "car", "plane"), ("plane", "car", "boat")])
def test_classes_of_registered_sets(tmp_path, others):
    for name, names in (("test_lazy_same", ("plane", "car", "ship")), ("test_lazy_other", others)):
        register_coco_instances(name, {}, *write(tmp_path, name, names))
    cfg = config("test_lazy_same", "test_lazy_other")
    said = (
        rf"dataloader.test.dataset.names test_lazy_other .*'{others[2]}'.*dataloader.train.dataset.names test_lazy_same"
    )
    for train in (True, False):
        with pytest.raises(UserError, match=said):
            lazy_setup._check_data(cfg, train=train)
    with pytest.raises(UserError, match="train.dataset.names test_lazy_other .*train.dataset.names test_lazy_same"):
        lazy_setup._check_data(config(["test_lazy_same", "test_lazy_other"], ()), train=True)
    with pytest.raises(UserError, match="test.dataset.names test_lazy_other .*test.dataset.names test_lazy_same"):
        lazy_setup._check_data(config((), ["test_lazy_same", "test_lazy_other"]), train=True)
    lazy_setup._check_data(config("test_lazy_same", "test_lazy_same"), train=True)
    # The config's own set has 80 classes, so it is not what weights of 3 were trained on.
    lazy_setup._check_data(config("coco_2017_train", "test_lazy_other"), train=False)


@pytest.mark.parametrize("loss", ["logits", "boxes", "masks", "cross_kd"])
def test_heads_are_distilled_between_equal_classes(tmp_path, loss):
    for name, names in (("test_lazy_same", ("plane", "car", "ship")), ("test_lazy_other", ("ship", "car", "plane"))):
        register_coco_instances(name, {}, *write(tmp_path, name, names))
    cfg = config("test_lazy_same", "test_lazy_same")
    cfg.model.backbone.teacher.opts = ["MODEL.RETINANET.NUM_CLASSES", 3, "DATASETS.TRAIN", ("test_lazy_other",)]
    lazy_setup._check_data(cfg, train=True)
    cfg.model.backbone[loss] = {"weight": 1.0}
    with pytest.raises(UserError, match=r"teacher's config \(test_lazy_other\) .*train.dataset.names test_lazy_same"):
        lazy_setup._check_data(cfg, train=True)
    lazy_setup._check_data(cfg, train=False)


def test_classes_of_flags(tmp_path):
    train, val = write(tmp_path, "train"), write(tmp_path, "val", ("ship", "car", "plane"))
    flags = ["--train-json", train[0], "--train-images", train[1], "--val-json", val[0], "--val-images", val[1]]
    with pytest.raises(UserError, match=f"{val[0]} .*'ship', 'car', 'plane'.* {train[0]} "):
        lazy_setup._use_coco_flags(config((), ()), argument_parser().parse_args(flags))


def test_sets_without_class_names():
    DatasetCatalog.register("test_lazy_nameless", list)
    cfg = config("test_lazy_nameless", "test_lazy_nameless")
    with pytest.raises(UserError, match="dataloader.test.dataset.names test_lazy_nameless.*thing_classes = "):
        lazy_setup._check_data(cfg, train=True)
    del cfg.dataloader.evaluator
    lazy_setup._check_data(cfg, train=True)


def keypoint_config(train, test, number=3, **mapper):
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_ShuffleNetV2_FPN_mgd_R50_1x.py")
    cfg.model.roi_heads.update(num_classes=3, keypoint_head={"num_keypoints": number})
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = train, test
    cfg.dataloader.train.mapper.update(use_keypoint=True, **mapper)
    cfg.dataloader.evaluator.kpt_oks_sigmas = [0.05] * number
    return cfg


def write_keypoints(root, name, names=("left", "middle", "right")):
    parts = coco_data.content()
    for category in parts["categories"]:
        category["keypoints"] = list(names)
    for entry in parts["annotations"]:
        entry.update(keypoints=[9, 11, 2, 18, 12, 2, 27, 13, 1], num_keypoints=3)
    return [str(path) for path in coco_data.write(root / name, parts)]


@pytest.mark.slow
def test_keypoints(tmp_path):
    for name, names in (("test_lazy_same", ("left", "middle", "right")), ("test_lazy_other", ("right", "left", "top"))):
        register_coco_instances(name, {}, *write_keypoints(tmp_path, name, names))
    cocos = list(range(17))  # Detectron2's common/data/coco_keypoint.py mirrors COCO's
    for indices, used in ((None, [2, 1, 0]), (cocos, [2, 1, 0]), ([0, 1, 2], [0, 1, 2])):
        cfg = keypoint_config("test_lazy_same", "test_lazy_same", keypoint_hflip_indices=indices)
        lazy_setup._check_data(cfg, train=True)
        assert cfg.dataloader.train.mapper.keypoint_hflip_indices == used
    with pytest.raises(UserError, match="has 3 keypoints, but model.roi_heads.keypoint_head.num_keypoints is 17"):
        lazy_setup._check_data(keypoint_config("test_lazy_same", (), 17), train=True)
    with pytest.raises(UserError, match="test_lazy_other .*'right', 'left', 'top'.* test_lazy_same "):
        lazy_setup._check_data(keypoint_config("test_lazy_same", "test_lazy_other"), train=True)
    cfg = keypoint_config("test_lazy_same", "test_lazy_same")
    cfg.dataloader.evaluator.pop("kpt_oks_sigmas")
    with pytest.raises(UserError, match="dataloader.evaluator.kpt_oks_sigmas is empty"):
        lazy_setup._check_data(cfg, train=True)


def test_keypoints_of_flags_are_mirrored_by_their_names(tmp_path):
    train = write_keypoints(tmp_path, "train")
    cfg = keypoint_config((), (), keypoint_hflip_indices=[0, 1, 2])
    flags = ["--train-json", train[0], "--train-images", train[1]]
    lazy_setup._use_coco_flags(cfg, argument_parser().parse_args(flags))
    lazy_setup._check_data(cfg, train=True)
    assert cfg.dataloader.train.mapper.keypoint_hflip_indices == [2, 1, 0]

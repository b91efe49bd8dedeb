"""From the data keys to registered and checked sets."""

import json

import coco_data
import pytest
import toy
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from mgd_det.cli.data_setup import check_datasets, use_coco_folders
from mgd_det.cli.yaml_setup import argument_parser, read_config, setup
from mgd_det.config import class_head
from mgd_det.data import CheckedMapper
from mgd_det.engine import Trainer
from mgd_det.errors import UserError


@pytest.fixture(autouse=True)
def catalog():
    yield
    coco_data.forget("coco_folder_", "test_setup")


def folder_opts(root, *splits, images=6):
    opts = []
    for split in splits:
        json_file, folder = coco_data.write(root / split, coco_data.content(images))
        opts += [f"DATASETS.COCO_FOLDER.{split.upper()}_JSON", str(json_file)]
        opts += [f"DATASETS.COCO_FOLDER.{split.upper()}_IMAGES", str(folder)]
    return opts


def config(root, *splits, base=toy.RETINANET, opts=()):
    return read_config(base, [*folder_opts(root, *splits), "OUTPUT_DIR", str(root / "out"), *opts])


def edit(cfg, split, change):
    path = cfg.DATASETS.COCO_FOLDER[f"{split}_JSON"]
    with open(path) as file:
        content = json.load(file)
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


@pytest.mark.parametrize("base", [toy.RETINANET, toy.RCNN])
def test_the_keys_alone_name_the_sets_and_their_classes(tmp_path, base):
    cfg = config(tmp_path, "train", "val", base=base)
    use_coco_folders(cfg)
    assert cfg.DATASETS.TRAIN == ("coco_folder_train",) and cfg.DATASETS.TEST == ("coco_folder_val",)
    assert class_head(cfg).NUM_CLASSES == 3
    cfg.INPUT.MASK_FORMAT = "polygon"
    check_datasets(cfg, train=True)
    assert len(DatasetCatalog.get("coco_folder_val")) == 6
    assert not (tmp_path / "out").exists()


def test_nothing_changes_without_the_keys():
    cfg = read_config(toy.RETINANET)
    use_coco_folders(cfg)
    assert cfg == read_config(toy.RETINANET)


def test_one_split_leaves_the_other_to_the_config(tmp_path):
    cfg = config(tmp_path, "val")
    train = cfg.DATASETS.TRAIN
    use_coco_folders(cfg)
    assert cfg.DATASETS.TRAIN == train and cfg.DATASETS.TEST == ("coco_folder_val",)


def test_flags_win_over_keys(tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path / "out"), "MODEL.DEVICE", "cpu"]
    keys = [*folder_opts(tmp_path / "keys", "train", "val"), *opts]
    flags = folder_opts(tmp_path / "flags", "train")
    argv = ["--config-file", toy.RETINANET, "--train-json", flags[1], "--train-images", flags[3], *keys]
    cfg = setup(argument_parser().parse_args(argv))
    folder = cfg.DATASETS.COCO_FOLDER
    assert (folder.TRAIN_JSON, folder.TRAIN_IMAGES) == (flags[1], flags[3])
    assert folder.VAL_JSON == keys[5]
    assert DatasetCatalog.get("coco_folder_train")[0]["file_name"].startswith(flags[3])


@pytest.mark.parametrize("opts, said", [
    (["DATASETS.COCO_FOLDER.VAL_IMAGES", "x"], "--val-json and --val-images go together .DATASETS.COCO_FOLDER"),
    (["DATASETS.BROKEN_INPUT", "ignore"], "DATASETS.BROKEN_INPUT is 'ignore'.*\"refuse\" or \"skip\""),
])  # fmt: skip
def test_keys_that_do_not_fit(opts, said):
    with pytest.raises(UserError, match=said):
        use_coco_folders(read_config(toy.RETINANET, opts))


def test_other_categories(tmp_path):
    cfg = config(tmp_path, "train", "val")
    edit(cfg, "VAL", lambda c: c["categories"].pop())
    edit(cfg, "VAL", lambda c: c.update(annotations=[]))
    with pytest.raises(
        UserError, match="val/instances.json .*'plane', 'ship'.*train/instances.json .*'plane', 'car', 'ship'"
    ):
        use_coco_folders(cfg)


@pytest.mark.parametrize("key, masks, evaluated", [
    ("segmentation", True, False), ("segmentation", True, True), ("area", False, True), ("iscrowd", False, True),
])  # fmt: skip
def test_keys_are_needed_where_they_are_read(tmp_path, key, masks, evaluated):
    cfg = config(tmp_path, "train", "val", base=toy.RCNN)
    for split in ("TRAIN", "VAL"):
        if (split == "VAL") == evaluated:
            edit(cfg, split, lambda c: c["annotations"][2].pop(key))
    use_coco_folders(cfg)
    cfg.MODEL.MASK_ON = masks
    with pytest.raises(UserError, match=f"annotation 3: no '{key}'"):
        check_datasets(cfg, train=True)
    if evaluated and key != "segmentation":
        cfg.DATASETS.TEST = ()
    cfg.MODEL.MASK_ON = False
    check_datasets(cfg, train=True)


def keypoint_config(root, *splits, opts=()):
    on = ["MODEL.KEYPOINT_ON", "True", "MODEL.MASK_ON", "False", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"]
    test = [] if "val" in splits else ["DATASETS.TEST", "()"]
    cfg = config(root, *splits, base=toy.RCNN, opts=[*on, *test, *opts])
    for split in splits:
        edit(cfg, split.upper(), add_keypoints)
    use_coco_folders(cfg)
    return cfg


def add_keypoints(content, names=("left", "middle", "right")):
    for category in content["categories"]:
        category["keypoints"] = list(names)
    for entry in content["annotations"]:
        entry.update(keypoints=[9, 11, 2, 18, 12, 2, 27, 13, 1], num_keypoints=3)


def test_keypoint_heads_need_keypoints(tmp_path):
    cfg = keypoint_config(tmp_path, "train")
    check_datasets(cfg, train=True)
    edit(cfg, "TRAIN", lambda content: content["annotations"][2].pop("keypoints"))
    with pytest.raises(UserError, match="annotation 3: no 'keypoints'") as error:
        check_datasets(cfg, train=True)
    assert "--keypoints" in str(error.value)
    edit(cfg, "TRAIN", lambda content: [entry.pop("keypoints", None) for entry in content["annotations"]])
    with pytest.raises(UserError, match="'keypoints'.*MODEL.KEYPOINT_ON"):
        check_datasets(cfg, train=True)


@pytest.mark.parametrize("broken_input", ["refuse", "skip"])
def test_keypoints_of_json_and_config(tmp_path, broken_input):
    """Names and pairs are where Detectron2 reads them; a mirrored image exchanges left and right."""
    cfg = keypoint_config(tmp_path, "train", "val", opts=["DATASETS.BROKEN_INPUT", broken_input])
    edit(
        cfg, "TRAIN", lambda content: content["annotations"][2].update(bbox=[1, 1, 1 - 2 * (broken_input == "skip"), 1])
    )
    check_datasets(cfg, train=True)
    assert cfg.DATASETS.TRAIN[0].endswith("_without_broken") == (broken_input == "skip")
    mapper = CheckedMapper(cfg, is_train=True)
    assert mapper.keypoint_hflip_indices == [2, 1, 0]
    record = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0]
    shape, (left, middle, right) = coco_data.SIZE, (9.5, 18.5, 27.5)
    seen = set()
    for _ in range(20):
        mapped = mapper(record)
        points = mapped["instances"].gt_keypoints.tensor[0, :, 0] * shape[1] / mapped["image"].shape[2]
        seen.add(tuple(round(x, 2) for x in points.tolist()))
    assert seen == {(left, middle, right), (shape[1] - right, shape[1] - middle, shape[1] - left)}


@pytest.mark.parametrize(
    "opts, change, said",
    [
        (["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "17"], None, "coco_folder_train has 3 .*NUM_KEYPOINTS is 17: .* 3"),
        ([], lambda c: [x.pop("keypoints") for x in c["categories"]], "DATASETS.KEYPOINT_NAMES.*keypoint_names"),
        (
            [],
            lambda c: c["categories"][0].update(keypoints=["a", "b", "c"]),
            r"\['a', 'b', 'c'\] and \['left', 'middle'",
        ),
        ([], lambda c: add_keypoints(c, ["a", "b"]), r"3 keypoints.*2 names, \['a', 'b'\]"),
        ([], lambda c: add_keypoints(c, ["a", "b", "b"]), r"\['a', 'b', 'b'\]"),
        (["DATASETS.KEYPOINT_NAMES", "['a', 'b']"], None, r"DATASETS.KEYPOINT_NAMES has 2 names, \['a', 'b'\]"),
        (["DATASETS.KEYPOINT_NAMES", "['a', 'b', 3]"], None, r"\['a', 'b', 3\] of DATASETS.KEYPOINT_NAMES"),
        (["DATASETS.KEYPOINT_FLIP_PAIRS", "[['left', 'up']]"], None, r"\['left', 'up'\] of .*KEYPOINT_FLIP_PAIRS"),
        (["DATASETS.KEYPOINT_FLIP_PAIRS", "['left', 'right']"], None, "left of .*KEYPOINT_FLIP_PAIRS"),
    ],
)
def test_keypoints_that_do_not_fit(tmp_path, opts, change, said):
    cfg = keypoint_config(tmp_path, "train", opts=opts)
    if change:
        edit(cfg, "TRAIN", change)
    with pytest.raises(UserError, match=said):
        check_datasets(cfg, train=True)


def test_names_of_keypoints_may_be_in_the_config_alone(tmp_path):
    opts = ["DATASETS.KEYPOINT_NAMES", "['a', 'b', 'c']", "DATASETS.KEYPOINT_FLIP_PAIRS", "[['b', 'c']]"]
    cfg = keypoint_config(tmp_path, "train", opts=opts)
    edit(cfg, "TRAIN", lambda content: [category.pop("keypoints") for category in content["categories"]])
    check_datasets(cfg, train=True)
    assert CheckedMapper(cfg, is_train=True).keypoint_hflip_indices == [0, 2, 1]


def test_keypoints_of_train_and_val(tmp_path):
    cfg = keypoint_config(tmp_path, "train", "val")
    edit(cfg, "VAL", lambda content: add_keypoints(content, ["left", "right", "middle"]))
    with pytest.raises(
        UserError, match=r"coco_folder_val .*'left', 'right', 'middle'.* coco_folder_train .*'left', 'mid"
    ):
        check_datasets(cfg, train=True)
    edit(cfg, "VAL", lambda content: [category.pop("keypoints") for category in content["categories"]])
    coco_data.forget("coco_folder_")
    use_coco_folders(cfg)
    check_datasets(cfg, train=True)


def test_masks_that_are_no_polygons(tmp_path):
    cfg = config(tmp_path, "train", base=toy.RCNN, opts=["DATASETS.TEST", "()"])
    mask = {"size": list(coco_data.SIZE), "counts": [100, 2972]}
    edit(cfg, "TRAIN", lambda c: c["annotations"][2].update(segmentation=mask))
    use_coco_folders(cfg)
    check_datasets(cfg, train=True)  # FashionScenes' configs take RLEs
    cfg.INPUT.MASK_FORMAT = "polygon"
    for cfg.DATASETS.BROKEN_INPUT in ("refuse", "skip"):
        with pytest.raises(UserError, match="annotation 3 .* INPUT.MASK_FORMAT is 'polygon': set it .* to 'bitmask'"):
            check_datasets(cfg, train=True)
    check_datasets(cfg, train=False)


def test_skipping_puts_new_sets_in_place(tmp_path):
    cfg = config(tmp_path, "train", "val", opts=["DATASETS.BROKEN_INPUT", "skip"])
    for split in ("TRAIN", "VAL"):
        images = tmp_path / split.lower() / "images"
        coco_data.truncate(images / "1.png")
        edit(cfg, split, lambda c: c["annotations"][2].update(bbox=[1, 1, -1, 1]))
    use_coco_folders(cfg)
    check_datasets(cfg, train=True)
    assert cfg.DATASETS.TRAIN == ("coco_folder_train_without_broken",)
    assert cfg.DATASETS.TEST == ("coco_folder_val_without_broken",)
    # A truncated image is left out at the start only where it would be evaluated.
    assert [r["image_id"] for r in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])] == [1, 2, 4, 5, 6]
    assert [r["image_id"] for r in DatasetCatalog.get(cfg.DATASETS.TEST[0])] == [2, 4, 5, 6]


def test_the_config_of_a_run_that_skipped_finds_the_sets_again(tmp_path):
    """Of registered sets, which no key of the config describes."""
    files = coco_data.write(tmp_path, coco_data.content())
    register_coco_instances("test_setup_own", {}, *map(str, files))
    opts = ["DATASETS.TRAIN", "('test_setup_own_without_broken',)", "DATASETS.TEST", "()"]
    cfg = config(tmp_path, opts=[*opts, "MODEL.RETINANET.NUM_CLASSES", "3"])
    check_datasets(cfg, train=True)
    assert cfg.DATASETS.TRAIN == ("test_setup_own",)


def test_sound_sets_stay_in_place(tmp_path):
    cfg = config(tmp_path, "train", "val", opts=["DATASETS.BROKEN_INPUT", "skip"])
    use_coco_folders(cfg)
    check_datasets(cfg, train=True)
    assert cfg.DATASETS.TRAIN == ("coco_folder_train",) and cfg.DATASETS.TEST == ("coco_folder_val",)


def test_the_list_of_skipped_images_starts_anew_unless_resumed(tmp_path):
    cfg = config(tmp_path, "train", opts=["DATASETS.TEST", "()"])
    use_coco_folders(cfg)
    path = tmp_path / "out" / "datasets" / "skipped_images.txt"
    path.parent.mkdir(parents=True)
    path.write_text("1.png\n")
    check_datasets(cfg, train=True, resume=True)
    check_datasets(cfg, train=False)
    assert path.exists()
    check_datasets(cfg, train=True)
    assert not path.exists()


def test_ranks_agree(tmp_path, run_ranks):
    """The first rank writes; the others use what it wrote, or raise what it raised."""

    def rank(number):
        broken = config(tmp_path / "set", "val", opts=["DATASETS.BROKEN_INPUT", "skip"]) if number == 0 else None
        comm.synchronize()
        cfg = comm.all_gather(broken)[0]
        if number == 0:
            edit(cfg, "VAL", lambda c: c["annotations"][2].update(bbox=[1, 1, -1, 1]))
        comm.synchronize()
        use_coco_folders(cfg)
        check_datasets(cfg, train=False)
        images = [record["image_id"] for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])]
        class_head(cfg).NUM_CLASSES = 7
        cfg.DATASETS.TEST = ("coco_folder_val",)
        try:
            check_datasets(cfg, train=False)
        except UserError as error:
            return images, str(error)

    first, second = run_ranks(rank, 2)
    assert first == second
    assert first[0] == [1, 2, 4, 5, 6] and "has 3 classes" in first[1]


def test_a_training_set_without_any_object_is_one_message(tmp_path):
    cfg = config(tmp_path, "train")
    edit(cfg, "TRAIN", lambda content: content.update(annotations=[]))
    use_coco_folders(cfg)
    with pytest.raises(UserError, match="DATASETS.TRAIN coco_folder_train has no image with an object to learn"):
        Trainer.build_train_loader(cfg)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert Trainer.build_train_loader(cfg) is not None


def registered(root, name, categories=None, images=6, metadata=None):
    """Registers a set as a user's own program does, with other names of its categories by id."""
    names = categories or coco_data.CATEGORIES
    parts = coco_data.content(images, categories=[{"id": number, "name": names[number]} for number in names])
    json_file, folder = coco_data.write(root / name, parts)
    register_coco_instances(name, metadata or {}, str(json_file), str(folder))


REVERSED = {91: "plane", 7: "ship", 20: "car"}
RENAMED = {91: "boat", 7: "plane", 20: "car"}


@pytest.mark.parametrize("others", [REVERSED, RENAMED])
@pytest.mark.parametrize("broken_input", ["refuse", "skip"])
@pytest.mark.parametrize("train, test, said", [
    (["same"], ["other"], "DATASETS.TEST test_setup_other .*DATASETS.TRAIN test_setup_same"),
    (["same", "other"], [], "DATASETS.TRAIN test_setup_other .*DATASETS.TRAIN test_setup_same"),
    ([], ["same", "other"], "DATASETS.TEST test_setup_other .*DATASETS.TEST test_setup_same"),
])  # fmt: skip
def test_classes_of_registered_sets(tmp_path, others, broken_input, train, test, said):
    registered(tmp_path, "test_setup_same")
    registered(tmp_path, "test_setup_other", others)
    cfg = read_config(toy.RETINANET, ["MODEL.RETINANET.NUM_CLASSES", "3", "DATASETS.BROKEN_INPUT", broken_input])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ([f"test_setup_{name}" for name in names] for names in (train, test))
    with pytest.raises(UserError, match=f"{said}.*'{others[7]}'"):
        check_datasets(cfg, train=bool(train))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ["test_setup_same"] * 2, ["test_setup_same"]
    check_datasets(cfg, train=True)


def set_up(root, *argv):
    opts = ["OUTPUT_DIR", str(root / "out"), "MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", "3"]
    return setup(argument_parser().parse_args([*argv[:-1], "--config-file", toy.RETINANET, *opts, *argv[-1]]))


@pytest.mark.slow
def test_weights_are_scored_on_the_classes_that_they_have_learned(tmp_path):
    registered(tmp_path, "test_setup_same")
    registered(tmp_path, "test_setup_other", REVERSED)
    test = ["DATASETS.TEST", "('test_setup_other',)"]
    said = r"DATASETS.TEST test_setup_other .*DATASETS.TRAIN \(test_setup_same\) .*set DATASETS.TRAIN "
    with pytest.raises(UserError, match=said):
        set_up(tmp_path, "--eval-only", ["DATASETS.TRAIN", "('test_setup_same',)", *test])
    # Sets of another number of classes, unknown ones, and sets whose files are elsewhere.
    for train in ("fashion_scenes_small_train", "not_registered", "test_setup_other"):
        set_up(tmp_path, "--eval-only", ["DATASETS.TRAIN", f"('{train}',)", *test])
    (tmp_path / "test_setup_same" / "instances.json").unlink()
    set_up(tmp_path, "--eval-only", ["DATASETS.TRAIN", "('test_setup_same',)", *test])


@pytest.mark.slow
def test_a_teacher_is_scored_on_the_classes_that_it_has_learned(tmp_path):
    registered(tmp_path, "test_setup_same")
    registered(tmp_path, "test_setup_other", REVERSED)
    teacher = ["MODEL.RETINANET.NUM_CLASSES", "3", "DATASETS.TRAIN", "('test_setup_other',)"]

    def opts(train, *more):
        mgd = ["MODEL.BACKBONE.NAME", "build_mgd_backbone", "MODEL.MGD.TEACHER.CONFIG_FILE", toy.RETINANET]
        mgd += ["MODEL.MGD.TEACHER.WEIGHTS", "teacher.pth", "MODEL.MGD.TEACHER.OPTS", str([*teacher, *more])]
        return [*mgd, "DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{train}',)"]

    said = r"DATASETS.TEST test_setup_same .*DATASETS.TRAIN of the teacher's config \(test_setup_other\)"
    with pytest.raises(UserError, match=said):
        set_up(tmp_path, "--eval-teacher", opts("test_setup_same"))
    set_up(tmp_path, "--eval-teacher", opts("test_setup_other"))
    set_up(tmp_path, "--eval-teacher", opts("test_setup_same", "DATASETS.TRAIN", "()"))
    # Its heads are distilled class by class; its features are not.
    for loss in ("LOGITS", "BOXES"):
        with pytest.raises(UserError, match=r"teacher's config \(test_setup_other\) .*DATASETS.TRAIN test_setup_same"):
            set_up(tmp_path, [*opts("test_setup_same"), f"MODEL.MGD.{loss}.WEIGHT", "1.0"])
    set_up(tmp_path, opts("test_setup_same"))
    # A teacher that was trained by flags on a json of its own.
    json_file = str(tmp_path / "test_setup_other" / "instances.json")
    with pytest.raises(UserError, match=f"COCO_FOLDER.TRAIN_JSON of the teacher's config .{json_file}"):
        set_up(tmp_path, "--eval-teacher", opts("test_setup_same", "DATASETS.COCO_FOLDER.TRAIN_JSON", json_file))


def test_sets_without_class_names(tmp_path):
    """Without a json, COCO's evaluator writes one at the end, which takes the names."""
    DatasetCatalog.register("test_setup_nameless", lambda: [{"file_name": "1.png", "image_id": 1, "annotations": []}])
    registered(tmp_path, "test_setup_same")
    cfg = toy.plain_config(opts=["MODEL.RETINANET.NUM_CLASSES", "3", "DATASETS.TRAIN", "('test_setup_nameless',)"])
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path / "out"), ("test_setup_same",)
    check_datasets(cfg, train=True)
    cfg.DATASETS.TEST = ("test_setup_nameless",)
    for check in (lambda: check_datasets(cfg, train=True), lambda: Trainer(cfg)):
        with pytest.raises(UserError, match="DATASETS.TEST test_setup_nameless.*thing_classes = "):
            check()


def test_sets_that_a_run_wrote_without_broken_entries_are_the_original_ones():
    cfg = toy.plain_config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("a_without_broken", "b"), ("c_without_broken",)
    use_coco_folders(cfg)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("a", "b"), ("c",))

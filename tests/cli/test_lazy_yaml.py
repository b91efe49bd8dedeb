"""LazyConfigs saved as yaml, which a stranger may have written."""

import malicious
import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from mgd_det import model_zoo
from mgd_det.cli.lazy_setup import read_config, student_config
from mgd_det.cli.lazy_yaml import load_lazy_yaml
from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import ALLOW_UNSAFE_FILES

# The configs have them, and a LazyConfig without them is none of a training.
PARTS = "dataloader: {}\noptimizer: {}\nlr_multiplier: {}\ntrain: {}\n"


@pytest.fixture(autouse=True)
def by_default(monkeypatch):
    monkeypatch.delenv(ALLOW_UNSAFE_FILES, raising=False)


@pytest.mark.parametrize("name", [name for name in model_zoo.config_names() if name.endswith("_1x.py")])
def test_saved_configs_are_read_as_detectron2_reads_them(tmp_path, name):
    cfg = model_zoo.get_config(name)
    for saved in [cfg, student_config(cfg)] if "model" in cfg else [cfg]:
        path = str(tmp_path / "saved.yaml")
        LazyConfig.save(saved, path)
        assert OmegaConf.to_container(load_lazy_yaml(path)) == OmegaConf.to_container(LazyConfig.load(path))


@pytest.mark.parametrize(
    "model, message",
    [
        ("{_target_: os.mkdir, path: MARKER}", "_target_ 'os.mkdir'"),
        ("[[{_target_: builtins.eval}]]", "_target_ 'builtins.eval'"),
        ("{_target_: detectron2.data.build.pickle.load}", "_target_ 'detectron2.data.build.pickle.load'"),
        ("{_target_: detectron2.data.build.torchdata._utils.python_exit_status}", "_target_ 'detectron2.data.build"),
        ("{_target_: detectron2.config.LazyConfig.load, filename: x.py}", "_target_ 'detectron2.config"),
        ("{_target_: torch.nn.modules.module.torch.load, f: x.pth}", "_target_ 'torch.nn"),
        ("{_target_: detectron2.modeling.nothing}", "_target_ 'detectron2.modeling.nothing'"),
        ("{_target_: '${name}'}", "_target_ "),
        ("{_target_: {_target_: os.mkdir}}", "_target_ {'_target_': 'os.mkdir'}"),
        ("!!python/object/apply:os.mkdir [MARKER]", "the tag .*os.mkdir"),
        ("!!python/object:os.mkdir {}", "the tag .*os.mkdir"),
        (
            "{_target_: detectron2.data.get_detection_dataset_dicts, names: x, proposal_files: [a.pkl]}",
            r"proposals \['a.pkl'\]",
        ),
        (f"{{_target_: torch.nn.ReLU, inplace: {malicious.yaml_resolver('MARKER')}}}", r"interpolation '\${oc.create:"),
        (f"[!!python/tuple [{malicious.yaml_resolver('MARKER', 'oc.decode')}]]", r"interpolation '\${oc.decode:"),
        ("['a ${oc.env:HOME}']", r"interpolation 'a \${oc.env:HOME}'"),
        ("['${a.${name}}']", r"interpolation '\${a.\${name}}'"),
        (
            f"!!python/object:detectron2.layers.shape_spec.ShapeSpec {{channels: {malicious.yaml_resolver('MARKER')}}}",
            r"interpolation '\${oc.create:",
        ),
        (
            "!!python/object:detectron2.layers.shape_spec.ShapeSpec {channels: [1]}",
            "a ShapeSpec has no number as channels",
        ),
    ],
)
def test_what_a_yaml_file_may_not_name(tmp_path, model, message):
    path = tmp_path / "saved.yaml"
    path.write_text(f"{PARTS}name: os.mkdir\nmodel: {model.replace('MARKER', str(tmp_path / 'marker'))}\n")
    with pytest.raises(UserError, match=f"--config-file {path}: .*{message}.*--allow-unsafe-files"):
        read_config(str(path), [])
    assert not (tmp_path / "marker").exists()


def test_references_to_nodes(tmp_path):
    path = tmp_path / "saved.yaml"
    path.write_text("a: {b-c: [3]}\nd: {e: '${a.b-c[0]}', f: '${.e}', g: '${..a.b-c}'}\n")
    assert OmegaConf.to_container(load_lazy_yaml(str(path)), resolve=True)["d"] == {"e": 3, "f": 3, "g": [3]}


def test_the_flag_admits_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    path = tmp_path / "saved.yaml"
    path.write_text(f"{PARTS}model: {malicious.yaml_tag(tmp_path / 'marker')}\n")
    assert set(read_config(str(path), [])) == {"dataloader", "optimizer", "lr_multiplier", "train", "model"}
    assert (tmp_path / "marker").exists()
    path.write_text(f"{PARTS}model: {{_target_: os.mkdir}}\n")
    assert read_config(str(path), []).model._target_ == "os.mkdir"
    messages = [record.getMessage() for record in caplog.records if record.name == "mgd_det.files.unsafe_files"]
    assert len(messages) == 2 and all(str(path) in message for message in messages)


@pytest.mark.parametrize("content", ["[1, 2]", "", "a: [1"])
def test_a_broken_file(tmp_path, content):
    (tmp_path / "broken.yaml").write_text(content)
    with pytest.raises(UserError, match="--config-file .*broken.yaml: "):
        read_config(str(tmp_path / "broken.yaml"), [])

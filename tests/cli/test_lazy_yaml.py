"""LazyConfigs saved as yaml, which a stranger may have written."""

import malicious
import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from mgd_det import model_zoo
from mgd_det.cli.lazy_setup import read_config, student_config
from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import ALLOW_UNSAFE_FILES

# A LazyConfig of a training has them.
PARTS = "dataloader: {}\noptimizer: {}\nlr_multiplier: {}\ntrain: {}\n"


@pytest.fixture(autouse=True)
def by_default(monkeypatch):
    monkeypatch.delenv(ALLOW_UNSAFE_FILES, raising=False)


@pytest.mark.parametrize(
    "model",
    [
        "{_target_: os.mkdir, path: MARKER}",
        "{_target_: torch.nn.ReLU}",  # what it names is not looked at
        "!!python/object/apply:os.mkdir [MARKER]",
        malicious.yaml_tag("MARKER"),
        f"{{_target_: torch.nn.ReLU, inplace: {malicious.yaml_resolver('MARKER')}}}",
        f"[!!python/tuple [{malicious.yaml_resolver('MARKER', 'oc.decode')}]]",
        f"!!python/object:detectron2.layers.shape_spec.ShapeSpec {{channels: {malicious.yaml_resolver('MARKER')}}}",
    ],
)
def test_a_yaml_file_is_refused(tmp_path, model):
    path = tmp_path / "saved.yaml"
    path.write_text(f"{PARTS}model: {model.replace('MARKER', str(tmp_path / 'marker'))}\n")
    with pytest.raises(UserError, match=f"--config-file {path}: .*tools/train_net.py.*--allow-unsafe-files"):
        read_config(str(path), [])
    assert not (tmp_path / "marker").exists()


def test_the_flag_allows_saved_configs(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    path = tmp_path / "saved.yaml"
    cfg = student_config(model_zoo.get_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py"))
    LazyConfig.save(cfg, str(path))
    assert OmegaConf.to_container(read_config(str(path), [])) == OmegaConf.to_container(LazyConfig.load(str(path)))
    assert [str(path) in r.getMessage() for r in caplog.records if r.name == "mgd_det.files.unsafe_files"] == [True]


@pytest.mark.parametrize("content", ["[1, 2]", "", "a: [1"])
def test_a_broken_file(tmp_path, monkeypatch, content):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    (tmp_path / "broken.yaml").write_text(content)
    with pytest.raises(UserError, match="--config-file .*broken.yaml"):
        read_config(str(tmp_path / "broken.yaml"), [])

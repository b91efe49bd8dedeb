"""Weights from URLs, here of a local server."""

import hashlib
import io
import re

import pytest
import torch
from torch import nn
from web import serving

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.config import merge_config
from mgd_det.errors import UserError
from mgd_det.files.downloads import check_url, hash_prefix


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def source():
    return nn.Linear(3, 2)


@pytest.fixture(scope="module")
def content(source):
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    return buffer.getvalue()


def test_a_download_is_what_the_hash_in_its_name_says(source, content, cache):
    digits = hashlib.sha256(content).hexdigest()
    wrong = digits[:7] + ("0" if digits[7] != "0" else "1")
    files = {f"/a/linear-{digits[:8]}.pth": content, f"/linear-{wrong}.pth": content, "/linear.pth": content}
    with serving(files) as url:
        for path in ("linear.pth", f"a/linear-{digits[:8]}.pth"):
            target = nn.Linear(3, 2)
            WeightsCheckpointer(target).load(f"{url}/{path}")
            assert torch.equal(target.weight, source.weight)
        for _ in range(2):  # also of what lies in the cache
            with pytest.raises(UserError, match=f"begins with {digits[:8]}, not with {wrong}.*Delete .*{wrong}.pth"):
                WeightsCheckpointer(nn.Linear(3, 2)).load(f"{url}/linear-{wrong}.pth")


def test_a_download_that_is_cut_short_is_not_kept(content, cache):
    with serving({"/cut.pth": content}) as url:
        with pytest.raises(UserError, match=f"weights {url}/cut.pth: .*retrieval incomplete"):
            WeightsCheckpointer(nn.Linear(3, 2)).load(f"{url}/cut.pth")
        with pytest.raises(UserError, match="absent.pth: .*HTTP Error 404"):
            WeightsCheckpointer(nn.Linear(3, 2)).load(f"{url}/absent.pth")
    assert [path.name for path in cache.rglob("*") if path.suffix != ".lock"] == []


def test_a_download_that_is_no_checkpoint_can_be_deleted(cache):
    with serving({"/page.pth": b"<html>log in</html>"}) as url:
        with pytest.raises(UserError, match=f"cannot be read as a checkpoint.*Delete {cache}/page.pth to download"):
            WeightsCheckpointer(nn.Linear(3, 2)).load(f"{url}/page.pth")


@pytest.mark.parametrize(
    "name, digits",
    [
        ("resnet18-f37072fd.pth", "f37072fd"),
        ("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", "258fb6c6"),
        ("a/b-0123456789abcdef.safetensors", "0123456789abcdef"),
        ("a-f37072fd/resnet18.pth", None),
        ("model_final_bfca0b.pkl", None),
        ("R-50.pkl", None),
        ("net-f37072f.pth", None),
    ],
)
def test_hashes_in_names(name, digits):
    assert hash_prefix(name) == digits


@pytest.mark.parametrize(
    "url, leads_out",
    [
        ("https://host/../x.pth", True),
        ("https://host//../x.pth", True),
        ("https://host/a/../../x.pth", True),
        ("detectron2://../../x.pkl", True),
        ("https://host/a/../x.pth", False),
        ("https://host/a..b/x.pth", False),
        ("../x.pth", False),
    ],
)
def test_urls_that_lead_out_of_the_cache(url, leads_out):
    if leads_out:
        with pytest.raises(UserError, match=re.escape(url)):
            check_url(url)
    else:
        check_url(url)


def test_nothing_is_written_outside_the_cache(tmp_path, content):
    (tmp_path / "own.yaml").write_text("")
    with serving({"/../x.pth": content, "/../x.yaml": b"VERSION: 2"}) as url:
        with pytest.raises(UserError, match="written outside the cache"):
            WeightsCheckpointer(nn.Linear(3, 2)).load(f"{url}/../x.pth")
        (tmp_path / "own.yaml").write_text(f"_BASE_: {url}/../x.yaml")
        with pytest.raises(UserError, match="own.yaml.*outside the cache"):
            merge_config(str(tmp_path / "own.yaml"), [])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["own.yaml"]

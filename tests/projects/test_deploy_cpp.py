"""projects/Deploy/detect.cpp: its images against Pillow, the whole program against detect.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import exported
import numpy as np
import pytest
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from mgd_det.export import detector_settings, write_model

DEPLOY = Path(__file__).parents[2] / "projects" / "Deploy"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
RESIZER = """
#include <iostream>
#include "image.hpp"
int main(int argc, char** argv) {
  try {
    const Image image = network_image(read_ppm(argv[1]), std::stod(argv[2]), std::stod(argv[3]));
    std::cout << "P6 " << image.width << " " << image.height << " 255\\n";
    std::cout.write(reinterpret_cast<const char*>(image.rgb.data()), image.rgb.size());
  } catch (const std::exception& e) {
    std::cerr << e.what();
    return 1;
  }
}
"""
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def resizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resizer")
    (folder / "main.cpp").write_text(RESIZER)
    compiled = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-I", str(DEPLOY)]
    subprocess.run([*compiled, "-o", str(folder / "resizer"), str(folder / "main.cpp")], check=True)
    return folder / "resizer"


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(40, 60), (61, 37), (7, 200), (32, 32)])
@pytest.mark.parametrize("rule", [(32, 50), (95, 1000), (0, 0)])
def test_images_are_resized_as_by_pillow(resizer, tmp_path, size, rule):
    image = noise(*size)
    image.save(tmp_path / "a.ppm")
    done = subprocess.run([resizer, tmp_path / "a.ppm", *map(str, rule)], capture_output=True, check=True)
    (tmp_path / "b.ppm").write_bytes(done.stdout)
    height, width = ResizeShortestEdge.get_output_shape(*size, *rule) if rule[0] else size
    expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    found = np.asarray(Image.open(tmp_path / "b.ppm"))
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"P5 2 2 255 1234", "no binary PPM"),
        (b"P6 2 2 65535\n", "8 bits"),
        (b"P6 2 2 255\n12345678901", "cut short"),
        (b"", "no binary PPM"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_ppm(resizer, tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.ppm").write_bytes(content)
    done = subprocess.run([resizer, tmp_path / "a.ppm", "0", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and "a.ppm" in done.stderr


def test_a_comment_in_the_header(resizer, tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 # a comment\n2 1\n# another\n255\nabcdef")
    done = subprocess.run([resizer, tmp_path / "a.ppm", "0", "0"], capture_output=True, check=True)
    assert done.stdout == b"P6 2 1 255\nabcdef"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program, compiled by its CMakeLists.txt."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    if not os.environ.get("ONNXRUNTIME_ROOT"):
        pytest.skip("ONNXRUNTIME_ROOT does not name a folder with include/ and lib/ of ONNX Runtime")
    folder = tmp_path_factory.mktemp("build")
    for arguments in (["-S", DEPLOY, "-B", folder, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"], ["--build", folder]):
        done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "detect"


@pytest.mark.slow
@pytest.mark.parametrize("detector, channels", [("retinanet", "BGR"), ("mask_rcnn", "RGB")])
def test_the_objects_are_those_of_detect_py(program, tmp_path, detector, channels):
    pytest.importorskip("onnxruntime")
    sizes = ["INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "150", "INPUT.FORMAT", channels]
    model, cfg = exported.build(detector, "R18", sizes)
    ids = [3 * i + 2 for i in range(10)]
    settings = detector_settings(cfg, model, ['a "min_size": 7', *exported.CLASSES[1:]], ids, whole=True)
    write_model(model, settings, str(tmp_path / "a.onnx"), "onnx", exported.inputs()[1]["image"].float())
    images = [tmp_path / f"{i}.ppm" for i in range(3)]
    for i, (path, size) in enumerate(zip(images, [(60, 90), (200, 120), (96, 96)])):
        noise(*size, seed=i).resize((size[1], size[0])).save(path)
    done = subprocess.run(
        [program, tmp_path / "a.onnx", tmp_path / "cpp.json", *images], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # On PNG files: detect.py reads the folders' usual suffixes.
    for path in images:
        Image.open(path).save(path.with_suffix(".png"))
    arguments = [DEPLOY / "detect.py", tmp_path / "a.onnx", *(path.with_suffix(".png") for path in images)]
    subprocess.run([sys.executable, *map(str, arguments), "--json", str(tmp_path / "py.json")], check=True)
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("cpp.json", "py.json"))
    assert len(expected) > 20 and {entry["image_id"] for entry in expected} == {1, 2, 3}
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    for key in ("image_id", "category_id"):
        assert [entry[key] for entry in found] == [entry[key] for entry in expected]
    for key, tolerance in (("score", 1e-3), ("bbox", 0.05)):
        values = [np.array([entry[key] for entry in entries]) for entries in (found, expected)]
        np.testing.assert_allclose(*values, atol=tolerance, rtol=0)


@pytest.mark.parametrize("metadata, message", [("", "no model of tools/export.py"), ("retinanet", "--with-nms")])
def test_models_that_it_cannot_run(program, tmp_path, metadata, message):
    onnx = pytest.importorskip("onnx")
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [3, "height", "width"])
    same = onnx.helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, [3, "height", "width"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["image"], ["same"])], "a", [image], [same])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    if metadata:
        onnx.helper.set_model_props(model, {"mgd_det": json.dumps({"version": 1, "kind": metadata})})
    onnx.save(model, tmp_path / "a.onnx")
    noise(40, 60).save(tmp_path / "a.ppm")
    for name, text in (("a.onnx", message), ("none.onnx", "none.onnx")):
        argv = [program, tmp_path / name, tmp_path / "out.json", tmp_path / "a.ppm"]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 1 and text in done.stderr and name in done.stderr, done.stderr
        assert not (tmp_path / "out.json").exists()
    assert subprocess.run([program], capture_output=True).returncode == 2

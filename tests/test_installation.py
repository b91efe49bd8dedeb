"""What setup.py installs, and what an import without Detectron2 says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_installed_package_is_whole(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "README.md", "mgd_det", "configs"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(copy)], check=True)
    installed = tmp_path / "site" / "mgd_det"
    for folder, target in ((ROOT / "mgd_det", installed), (ROOT / "configs", installed / "configs")):
        files = [p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".py", ".yaml")]
        assert len(files) > 5
        assert [str(f) for f in files if not (target / f).is_file()] == []
    # Found by name, from another folder than the checkout.
    code = "import mgd_det.model_zoo as z; print(z.__file__); print(z.get_config_file('demo/retinanet_R_50_FPN.yaml'))"
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [Path(line).is_relative_to(installed) for line in output] == [True, True]


def test_import_without_detectron2_says_how_to_get_it():
    code = (
        "import sys; sys.modules['detectron2'] = None\nimport importlib.util as u\nu.find_spec = lambda *a, **k: None\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + "import mgd_det"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 1
    assert "Detectron2, which is not installed" in result.stderr and "make install" in result.stderr


def test_setup_does_not_import_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    )
    result = subprocess.run(
        [sys.executable, "-c", "__file__ = 'setup.py'\n" + code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "0.1.0" in result.stdout

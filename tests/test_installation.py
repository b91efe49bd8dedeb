"""What pyproject.toml and setup.py install, what they claim, and what an import without Detectron2 says."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mgd_det import __version__

ROOT = Path(__file__).parents[1]
# Python 3.10 has no reader of TOML.
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def section(name):
    """The lines of a section of pyproject.toml."""
    return re.search(rf"^\[{re.escape(name)}\]\n(.*?)(?=^\[|\Z)", PYPROJECT, re.MULTILINE | re.DOTALL).group(1)


PROGRAMS = dict(re.findall(r'^([\w-]+) = "(.+)"$', section("project.scripts"), re.MULTILINE))


def pinned(lock):
    """Versions by name."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that a copy of the checkout was installed into, without Git and what a checkout ignores."""
    folder = tmp_path_factory.mktemp("installation")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "mgd_det", "configs"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder / "site"), str(copy)], check=True)
    return folder / "site"


@pytest.mark.slow
def test_an_installed_package_is_whole(site, tmp_path):
    installed = site / "mgd_det"
    for folder, target in ((ROOT / "mgd_det", installed), (ROOT / "configs", installed / "configs")):
        files = [
            p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".py", ".yaml", ".typed", ".html", ".md")
        ]
        assert len(files) > 5
        assert [str(f) for f in files if not (target / f).is_file()] == []
    assert (installed / "py.typed").is_file()
    # Found by name, from another folder than the checkout.
    code = "import mgd_det.model_zoo as z; print(z.__file__); print(z.get_config_file('demo/retinanet_R_50_FPN.yaml'))"
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [Path(line).is_relative_to(installed) for line in output] == [True, True]


@pytest.mark.slow
def test_the_version_and_the_programs_are_installed(site):
    (metadata,) = site.glob("mgd_det-*.dist-info")
    assert f"\nVersion: {__version__}\n" in (metadata / "METADATA").read_text(encoding="utf-8")
    scripts = re.findall(r"^(\S+) = (\S+)$", (metadata / "entry_points.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(scripts) == PROGRAMS
    assert {"mgd-train", "mgd-distill", "mgd-report"} <= set(PROGRAMS)
    assert sorted(path.name for path in (site / "bin").iterdir()) == sorted(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_prints_its_help(program, capsys, monkeypatch):
    module, function = PROGRAMS[program].split(":")
    main = getattr(importlib.import_module(module), function)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert f"usage: {program}" in capsys.readouterr().out


def test_import_without_detectron2_says_how_to_get_it():
    code = (
        "import sys; sys.modules['detectron2'] = None\nimport importlib.util as u\nu.find_spec = lambda *a, **k: None\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + "import mgd_det"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 1
    assert "Detectron2, which is not installed" in result.stderr and "make install" in result.stderr


def test_building_does_not_import_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    )
    result = subprocess.run(
        [sys.executable, "-c", "__file__ = 'setup.py'\n" + code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == __version__


def test_the_oldest_versions_are_those_that_are_tested():
    oldest = dict(re.findall(r'"([\w.-]+)>=([\w.]+)[",]', section("project").split("dependencies = [")[1]))
    oldest.update(re.findall(r'^timm = \["(timm)>=(.+)"\]$', section("project.optional-dependencies"), re.MULTILINE))
    assert {"torch", "torchvision", "numpy", "timm"} <= set(oldest)
    tested = pinned("requirements-lowest.lock")
    assert {name: tested.get(name) for name in oldest} == oldest


def test_pre_commit_has_the_linter_of_the_lock():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    revisions = {repo["repo"].rsplit("/", 1)[-1]: repo.get("rev") for repo in hooks}
    assert revisions["ruff-pre-commit"] == "v" + pinned("requirements.lock")["ruff"]


def test_the_docs_list_every_program():
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(mgd-[\w-]+)` \| `tools/(\w+)\.py` \|$", page, re.MULTILINE))
    assert listed == {name: target.split(":")[0].split(".")[-1] for name, target in PROGRAMS.items()}

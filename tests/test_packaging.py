"""What is published: the wheel and the sdist, as they are built, and installed where nothing else is."""

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import SOAK
from packaging.metadata import Metadata
from packaging.version import Version
from test_docs import ROOT, blocks

import ckptmgr

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist it was made from."""
    directory = tmp_path_factory.mktemp("dist")
    command([sys.executable, "-m", "build", "--outdir", directory, ROOT])
    (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    return wheel, sdist


def command(words, **how):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.xdist_group("packaging")
def test_the_metadata_is_that_of_the_project(built):
    wheel, _ = built
    (file,) = [name for name in names_in(wheel) if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(file)
    found = Metadata.from_email(text)  # raises what an index would refuse
    assert (found.name, str(found.version)) == (PROJECT["name"], ckptmgr.__version__)
    assert str(found.requires_python) == PROJECT["requires-python"]
    assert found.license_expression == PROJECT["license"] == "Apache-2.0"
    assert set(found.provides_extra) == set(PROJECT["optional-dependencies"])
    required = {requirement.name for requirement in found.requires_dist if requirement.marker is None}
    assert required == {re.match(r"[\w-]+", each)[0] for each in PROJECT["dependencies"]}
    assert email.message_from_bytes(text).get_payload().startswith("# ckptmgr")


@pytest.mark.xdist_group("packaging")
def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = names_in(built[0])
    assert {name.split("/")[0] for name in names} == {"ckptmgr", f"ckptmgr-{ckptmgr.__version__}.dist-info"}
    files = [path for path in (ROOT / "ckptmgr").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    sources = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if name.startswith("ckptmgr/")} == sources
    assert {path.suffix for path in files} == {".py", ".typed", ".css", ".js"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.xdist_group("packaging")
def test_the_sdist_holds_what_is_said_about_the_project(built):
    with tarfile.open(built[1]) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert top >= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "docs", "tests"}


@pytest.mark.xdist_group("packaging")
def test_an_index_would_take_both(built):
    assert "PASSED" in command([sys.executable, "-m", "twine", "check", "--strict", *built])


def test_the_version_and_the_licence_are_said_once():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {ckptmgr.__version__}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert f"\ncopyright: ckptmgr {ckptmgr.__version__}, " in (ROOT / "mkdocs.yml").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == ckptmgr.__version__ == importlib.metadata.version("ckptmgr")


def test_the_oldest_versions_are_those_that_are_tested():
    """`make oldest` installs tests/oldest.txt."""
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    allowed = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", each).groups() for each in PROJECT["dependencies"]]
    for name, lowest in allowed:
        assert Version(pinned[name]) == Version(lowest), name


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="installs JAX into an empty environment")
@pytest.mark.xdist_group("packaging")
def test_the_loop_of_the_readme_runs_where_only_the_wheel_is_installed(built, tmp_path):
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    command([python, "-m", "pip", "install", "--quiet", built[0]])
    model, loop, *_ = [each.text for each in blocks((ROOT / "README.md").read_text()) if each.language == "python"]
    script = model + loop + "\nprint(ckptmgr.__file__, manager.latest())\n"
    for _ in range(2):  # the second goes on where the first ended
        said = command([python, "-W", "error", "-c", script], cwd=tmp_path).split()
    assert Path(said[0]).is_relative_to(tmp_path / "empty")
    assert said[1] == "300"

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import capi
import capi_kernels

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project():
    """What setup.py says, as setuptools reads it."""
    import_module("setuptools")  # From Python 3.12 on, distutils is its own.
    run_setup = import_module("distutils.core").run_setup
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return run_setup("setup.py", stop_after="init")
    finally:
        os.chdir(before)


def test_an_install_holds_both_packages_and_all_their_files(project) -> None:
    """A folder without __init__.py imports from a checkout, but no install would contain it."""
    for package in (capi, capi_kernels):
        assert package.__doc__
        root = Path(package.__file__).parent
        files = {path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        installed = {
            path
            for name in project.packages
            for path in (ROOT / name.replace(".", "/")).glob("*.py")
            if name.split(".")[0] == root.name
        }
        for pattern in project.package_data[root.name]:
            found = set(root.glob(pattern))
            assert found, pattern
            installed |= found
        assert files == installed
        assert root / "py.typed" in files


def test_the_version_stands_in_one_place(project) -> None:
    version = capi_kernels.__version__
    assert capi.__version__ == project.get_version() == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert f"({version})" in (ROOT / "CHANGELOG.md").read_text()


def test_licence_paper_and_readme_are_named(project) -> None:
    assert project.metadata.license_expression == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert project.get_long_description() == (ROOT / "README.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    authors = [author["family-names"] for author in paper["authors"]]
    assert authors == ["Darcet", "Baldassarre", "Oquab", "Mairal", "Bojanowski"]
    assert paper["url"] == project.metadata.project_urls["Paper"] == "https://arxiv.org/abs/2502.08769"


def test_triton_is_no_requirement_and_the_benchmarks_bring_what_they_need(project) -> None:
    assert not any("triton" in requirement for requirement in project.install_requires)
    for extra in ("bench", "dev"):
        assert {"pytest", "pytest-benchmark"} <= set(project.extras_require[extra])


def test_everything_but_the_kernels_works_without_triton() -> None:
    program = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # not to be found
import torch, capi, capi_kernels
for package in (capi, capi_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("_triton"):
            importlib.import_module(module.name)
assert "matplotlib" not in sys.modules  # it takes a third of a second of every start
features, weight = torch.randn(4, 3, 8), torch.randn(6, 8, requires_grad=True)
capi_kernels.clustering_head(features, weight, torch.zeros(6)).loss.backward()
assert weight.grad.isfinite().all()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr

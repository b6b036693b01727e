"""A wheel of this repository holds the C++ libraries of every set of the machine's kind, under a tag that is true of them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernels_stub import write_stub

from workers.kv_memory.native.build import CHECKSUM
from workers.machine.native_build import NativeSource, is_built_from, supported
from workers.model.native.build import KERNELS

pytest.importorskip("hatchling", reason="wheels are built by hatchling")

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not supported(KERNELS.sets), reason="needs g++ and a processor that the kernels know"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """This repository's packages, with kernels that compile at once."""
    folder = tmp_path / "tree"
    for name in ("workers", "router", "cluster"):
        ignored = shutil.ignore_patterns("__pycache__", "lib")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "hatch_build.py", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    source = folder / KERNELS.main.parent.relative_to(ROOT)
    shutil.rmtree(source)
    write_stub(source / KERNELS.main.name)
    return folder


def build_wheel(tree: Path, **environment: str) -> tuple[Path, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"],
        cwd=tree,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel, done.stdout + done.stderr


def in_tree(source: NativeSource, tree: Path) -> NativeSource:
    return NativeSource(tree / source.main.relative_to(ROOT), source.name, source.sets, source.flags)


@needs_compiler
def test_a_wheel_holds_a_library_for_every_set_of_its_kind_of_machine(tree: Path) -> None:
    wheel, output = build_wheel(tree)
    zipfile.ZipFile(wheel).extractall(tree / "installed")
    for source in (KERNELS, CHECKSUM):
        installed = in_tree(source, tree / "installed")
        made = in_tree(source, tree)
        wanted = [each for each in source.sets if each.machine == platform.machine()]
        assert {installed.prebuilt(each).name for each in wanted} == {
            p.name for p in installed.prebuilt_folder.iterdir()
        }
        assert all(is_built_from(installed.prebuilt(each), made.label(each)) for each in wanted)
        assert not made.prebuilt_folder.exists(), "building a wheel leaves nothing in the source tree"
    assert "baton-serve: compiled" in output


@needs_compiler
@pytest.mark.skipif(shutil.which("readelf") is None, reason="compares with readelf")
def test_the_tag_names_the_newest_glibc_that_the_libraries_need(tree: Path) -> None:
    wheel, _ = build_wheel(tree)
    zipfile.ZipFile(wheel).extractall(tree / "installed")
    text = "".join(
        subprocess.run(["readelf", "-dV", str(path)], capture_output=True, text=True, check=True).stdout
        for path in (tree / "installed").rglob("*.so")
    )
    needed = max(tuple(map(int, version)) for version in re.findall(r"GLIBC_(\d+)\.(\d+)", text))
    needed = max(needed, (2, 17))
    assert wheel.name.endswith(f"-py3-none-manylinux_{needed[0]}_{needed[1]}_{platform.machine()}.whl")
    assert "libstdc++" not in text


def test_without_a_compiler_the_wheel_holds_python_only_and_the_build_says_so(tree: Path) -> None:
    wheel, output = build_wheel(tree, BATON_COMPILER="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert "NO C++ LIBRARIES ARE BUILT" in output


ALONE = """
import sys, types
sys.path.insert(0, sys.argv[1])
for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
    sys.modules[name] = types.ModuleType(name)
interface = sys.modules["hatchling.builders.hooks.plugin.interface"] = types.ModuleType("interface")
interface.BuildHookInterface = list

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "workers", "hatch_build"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
import hatch_build
print(len(hatch_build.SOURCES))
"""


def test_a_build_needs_nothing_that_is_not_installed_yet() -> None:
    found = subprocess.run([sys.executable, "-c", ALONE, str(ROOT)], capture_output=True, text=True, check=False)
    assert found.stdout == "2\n", found.stderr

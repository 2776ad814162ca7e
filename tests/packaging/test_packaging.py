"""The package as users get it: built from a copy of this checkout, installed elsewhere, imported from a foreign folder.

No network: the build uses the tools of this environment, and the fresh environments borrow its libraries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = sysconfig.get_path("purelib")

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout: cannot copy what is in it")


def run(*args: str | Path, cwd: Path, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GPUGUARD_", "PYTHON"))}
    done = subprocess.run([str(arg) for arg in args], cwd=cwd, env={**clean, **environ}, capture_output=True, text=True,
                          check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def copy_checkout(to: Path) -> Path:
    """Copy what belongs to the project, links as links, as a git checkout of its own."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, to / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    run("git", "init", "-q", cwd=to)
    run("git", "add", "-A", cwd=to)
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-q", "-m", "copy", cwd=to)
    return to


def fresh_venv(folder: Path) -> Path:
    """Return the Python of a new environment that finds the libraries of this one behind its own."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    Path(own, "libraries.pth").write_text(f"{LIBRARIES}\n")
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: nothing can be built")
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
        "--wheel-dir", out, ".", cwd=checkout)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    python = fresh_venv(tmp_path_factory.mktemp("venv") / "v")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel,
        cwd=wheel.parent)
    return python


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in names_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gpuguard"}


def test_the_wheel_has_everything_that_is_read_at_run_time(wheel):
    names = names_in(wheel)
    wanted = {"gpuguard/py.typed", "gpuguard/kernels/__init__.py"}
    wanted |= {f"gpuguard/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    wanted |= {f"gpuguard/signatures/{path.name}" for path in (ROOT / "signatures").glob("*.toml")}
    wanted |= {f"gpuguard/models/{path.name}" for path in (ROOT / "models").glob("*.npz")}
    wanted |= {f"gpuguard/{path.name}" for path in (ROOT / "gpuguard").glob("*.pyi")}
    for pattern in ("ui/**/*.html", "ui/**/*.css", "ui/**/*.js", "lab/recordings/**/*"):
        found = (path for path in (ROOT / "gpuguard").glob(pattern) if path.is_file())
        wanted |= {path.relative_to(ROOT).as_posix() for path in found}
    if shutil.which("clang") and Path("/usr/include/bpf/bpf_helpers.h").exists():
        objects = (ROOT / "ext" / "bpf").glob("*.bpf.c")
        wanted |= {f"gpuguard/bpf/{path.stem}.o" for path in objects}
    assert any(name.startswith("gpuguard/signatures/") for name in wanted)
    assert wanted - names == set()


def test_the_wheel_has_the_compiled_modules_and_no_sources_of_them(wheel):
    names = names_in(wheel)
    compiled = {name.split("/")[1].split(".")[0] for name in names if name.endswith(".so")}
    needs_libbpf = {"_launches", "_processes"} if not Path("/usr/include/bpf/libbpf.h").exists() else set()
    modules = {f"_{path.stem}" for path in (ROOT / "ext").glob("*.pyx")} - needs_libbpf
    assert compiled == modules | {"libgpuguard_capture"}
    assert [name for name in names if name.endswith((".pyx", ".c", ".h", "ruff.toml"))] == []


def test_building_leaves_the_checkout_clean(wheel, checkout):
    assert run("git", "status", "--porcelain", cwd=checkout).stdout == ""


def test_an_installed_package_works_from_a_foreign_folder(installed, tmp_path):
    code = """
import importlib, pkgutil, sys
from importlib.resources import files
import gpuguard, gpuguard.kernels
assert sys.prefix in gpuguard.__file__, gpuguard.__file__
assert any(one.name.endswith(".toml") for one in files("gpuguard.signatures").iterdir())
compiled = [m.name for m in pkgutil.iter_modules(gpuguard.__path__) if m.name.startswith("_") and m.name != "__main__"]
assert compiled
for name in compiled:
    importlib.import_module(f"gpuguard.{name}")
for name in gpuguard.__all__:
    getattr(gpuguard, name)
"""
    run(installed, "-c", code, cwd=tmp_path)


def test_the_installed_command_runs_from_a_foreign_folder(installed, tmp_path):
    command = installed.parent / "gpuguard"
    assert run(command, "--version", cwd=tmp_path).stdout.strip().endswith("0.1.0")
    assert "mode" in run(command, "config", "show", cwd=tmp_path).stdout


def test_a_checkout_without_links_is_refused(checkout, tmp_path):
    lost = tmp_path / "lost"
    shutil.copytree(checkout, lost, symlinks=True, ignore=shutil.ignore_patterns(".git", "build"))
    for name in ("kernels", "models", "signatures"):
        link = lost / "gpuguard" / name
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)  # what git does where core.symlinks is off
        done = run(sys.executable, "setup.py", "--name", cwd=lost, check=False)
        assert done.returncode != 0
        assert f"gpuguard/{name} is not a folder" in done.stderr
        link.unlink()
        link.symlink_to(target)
    assert run(sys.executable, "setup.py", "--name", cwd=lost).returncode == 0


def test_an_editable_install_in_compat_mode_finds_everything(checkout, tmp_path):
    own = tmp_path / "editable"
    shutil.copytree(checkout, own, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "*.pyx"))
    python = fresh_venv(tmp_path / "v")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps",
        "--no-build-isolation", "--config-settings", "editable_mode=compat", "--editable", own, cwd=tmp_path)
    code = """
from importlib.resources import files
import gpuguard.kernels
print(gpuguard.kernels.__file__)
assert any(one.name.endswith(".toml") for one in files("gpuguard.signatures").iterdir())
"""
    assert str(own) in run(python, "-c", code, cwd=tmp_path).stdout


def test_the_source_archive_can_build(checkout, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    run("tar", "-xzf", archive, cwd=tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    sources = [path for path in (ROOT / "ext").rglob("*") if path.suffix in (".pyx", ".pxi", ".pxd", ".h")]
    sources += [*(ROOT / "ext" / "bpf").glob("*.bpf.c"), *(ROOT / "ext" / "inject").glob("*.c")]
    sources += [*(ROOT / "kernels").glob("*.py"), *(ROOT / "signatures").glob("*.toml"), ROOT / "LICENSE"]
    sources += (ROOT / "models").glob("*")
    missing = [path.relative_to(ROOT).as_posix() for path in sources
               if not (unpacked / path.relative_to(ROOT)).exists()]
    assert missing == []
    assert run(sys.executable, "setup.py", "--name", cwd=unpacked).returncode == 0


def test_importing_gpuguard_loads_nothing_heavy(tmp_path):
    code = "import sys; before = set(sys.modules); import gpuguard; print(' '.join(set(sys.modules) - before))"
    loaded = set(run(sys.executable, "-c", code, cwd=ROOT).stdout.split())
    heavy = {"numba", "grpc", "pynvml", "numpy", "msgspec", "google.protobuf", "psutil", "pyroute2", "rich", "click",
             "structlog", "yaml", "cupy", "llvmlite", "asyncio"}
    assert loaded & heavy == set()
    assert {name for name in loaded if name.startswith("gpuguard")} == {"gpuguard"}


def test_the_guard_itself_loads_neither_numba_nor_grpc_nor_the_driver(tmp_path):
    code = "import sys, gpuguard; gpuguard.Guard(); print(' '.join(sys.modules))"
    loaded = set(run(sys.executable, "-c", code, cwd=ROOT).stdout.split())
    assert loaded & {"numba", "grpc", "pynvml", "cupy", "llvmlite"} == set()

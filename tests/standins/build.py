"""Build the CUDA stand-ins: a driver library with the real stub shapes, and two programs of the driver API.

They exist so that the launch eye can be run where there is no GPU. The product never imports or ships them, and nothing
they do is computed on a GPU: `hasher` makes a miner's driver calls and `trainer` a training job's, no more.

Usage: ``python tests/standins/build.py DIRECTORY``, or ``build(directory)``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11")
PROGRAMS = ("hasher", "trainer")


#: Drivers whose exports differ in shape: up to 555, 580, 595.
SHAPES = (555, 580, 595)


def build(out_dir: Path, driver: int = SHAPES[0]) -> dict[str, Path]:
    """Build into ``out_dir``; return the paths by name: libcuda, hasher, trainer.

    The programs find ``libcuda.so.1`` beside themselves, so that no environment variable is needed. The exports of the
    library have the shape of this driver's.

    Raises
    ------
    subprocess.CalledProcessError
        If the compiler fails.
    FileNotFoundError
        If there is no C compiler.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    library = out_dir / "libcuda.so.1"
    sources = [str(HERE / "libcuda" / name) for name in ("stubs.S", "driver.c")]
    shared = ("-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-Wl,--build-id=sha1", "-Wl,-z,noexecstack")
    _run(compiler, *FLAGS, f"-DDRIVER={driver}", *shared, "-o", str(library), *sources)
    paths = {"libcuda": library}
    for name in PROGRAMS:
        paths[name] = out_dir / name
        source = str(HERE / "programs" / f"{name}.c")
        _run(compiler, *FLAGS, "-o", str(paths[name]), source, str(library), "-Wl,-rpath,$ORIGIN")
    return paths


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    for _name, _path in build(Path(sys.argv[1])).items():
        sys.stdout.write(f"{_name} {_path}\n")

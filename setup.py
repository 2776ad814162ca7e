"""Build the compiled parts; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# The wheel holds one package: kernels/ and signatures/ enter it through these links. Without them the build would
# succeed and the wheel would lack both.
for link in ("kernels", "signatures"):
    if not (ROOT / "gpuguard" / link).is_dir():
        sys.exit(f"gpuguard/{link} is not a folder: this checkout lost its symbolic links")


class Build(build_ext):
    """Build the Cython modules, and with clang the eBPF objects beside them. Without clang the launch eye is closed."""

    def run(self) -> None:
        super().run()
        clang = shutil.which("clang")
        out = Path(self.get_ext_fullpath("gpuguard._packets")).parent / "bpf"
        out.mkdir(parents=True, exist_ok=True)
        for source in sorted((ROOT / "ext" / "bpf").glob("*.bpf.c")):
            if clang is None:
                print(f"warning: no clang, {source.name} not built", file=sys.stderr)
                continue
            target = out / source.name.replace(".bpf.c", ".bpf.o")
            flags = ["-O2", "-g", "-target", "bpf", "-D__TARGET_ARCH_x86", "-I/usr/include/x86_64-linux-gnu"]
            subprocess.run([clang, *flags, "-c", str(source), "-o", str(target)], check=True)


def extension(name: str, **options: object) -> Extension:
    """Return the extension gpuguard._NAME of ext/NAME.pyx."""
    return Extension(f"gpuguard._{name}", [f"ext/{name}.pyx"], include_dirs=[np.get_include(), "ext"],
                     extra_compile_args=["-O3"], **options)


setup(
    ext_modules=[extension(path.stem) for path in sorted((ROOT / "ext").glob("*.pyx")) if path.stem != "launches"]
    + ([extension("launches", libraries=["bpf"])] if (ROOT / "ext" / "launches.pyx").exists() else []),
    cmdclass={"build_ext": Build},
)

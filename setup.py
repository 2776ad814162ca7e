"""Build the compiled parts; everything else is in pyproject.toml."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).parent
BPF_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
# These load eBPF. Where libbpf is missing they are left out, and their eyes report themselves closed.
NEED_LIBBPF = {"launches", "processes"}
# GCC's own bounds leave apart what a packet passes through, each called from one or two places: 12 % more instructions.
INLINE = ["--param=max-inline-insns-single=600", "--param=inline-unit-growth=200"]

# The wheel holds one package: these folders enter it through links. Without them the build would succeed and the wheel
# would lack all of them.
for link in ("kernels", "models", "signatures"):
    if not (ROOT / "gpuguard" / link).is_dir():
        sys.exit(f"gpuguard/{link} is not a folder: this checkout lost its symbolic links")


def warn(text: str) -> None:
    """Say what the build leaves out."""
    print(f"warning: {text}", file=sys.stderr)


class Build(build_ext):
    """Build the Cython modules, and with clang the eBPF objects beside them."""

    def run(self) -> None:
        super().run()
        machine = platform.machine()
        clang = shutil.which("clang")
        self.build_capture()
        inplace = self.inplace or getattr(self, "editable_mode", False)
        out = (ROOT if inplace else Path(self.build_lib)) / "gpuguard" / "bpf"
        for source in sorted((ROOT / "ext" / "bpf").glob("*.bpf.c")):
            if clang is None or machine not in BPF_ARCHITECTURES:
                warn(f"{source.name} not built: {'no clang' if clang is None else f'not known on {machine}'}")
                continue
            out.mkdir(parents=True, exist_ok=True)
            target = out / source.name.replace(".bpf.c", ".bpf.o")
            flags = ["-O2", "-g", "-target", "bpf", f"-D__TARGET_ARCH_{BPF_ARCHITECTURES[machine]}",
                     f"-I/usr/include/{machine}-linux-gnu", f"-I{ROOT / 'ext'}"]
            built = subprocess.run([clang, *flags, "-c", str(source), "-o", str(target)], check=False)
            if built.returncode:
                warn(f"{source.name} not built: clang failed (are the headers of libbpf installed?)")

    def build_capture(self) -> None:
        """Build the cooperative shim: a plain library, since other programs load it."""
        inplace = self.inplace or getattr(self, "editable_mode", False)
        target = (ROOT if inplace else Path(self.build_lib)) / "gpuguard" / "libgpuguard_capture.so"
        if platform.machine() != "x86_64":
            warn(f"{target.name} not built: the driver's stubs are known on x86-64 only")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
        try:
            objects = self.compiler.compile(["ext/inject/shim.c"], output_dir=self.build_temp, extra_postargs=flags,
                                            depends=["ext/inject/capture.h"])
            self.compiler.link_shared_object(objects, str(target), libraries=["dl", "pthread"])
        except (CompileError, LinkError) as error:
            warn(f"{target.name} not built: {error}")

    def build_extensions(self) -> None:
        left_out = [one.name for one in self.extensions if "bpf" in one.libraries]
        if left_out and not self.has_libbpf():
            self.extensions = [one for one in self.extensions if one.name not in left_out]
            warn(f"{', '.join(left_out)} not built: libbpf or its headers are missing (libbpf-dev)")
        super().build_extensions()

    def has_libbpf(self) -> bool:
        """Return whether a program that uses libbpf compiles and links here."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text("#include <bpf/libbpf.h>\nint main(void) { return libbpf_major_version() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder)
                self.compiler.link_executable(objects, "probe", output_dir=folder, libraries=["bpf"])
            except (CompileError, LinkError):
                return False
        return True


def extension(source: Path) -> Extension:
    """Return the extension gpuguard._NAME of ext/NAME.pyx."""
    name = source.stem
    parts = sorted(f"ext/{one.name}" for one in source.parent.iterdir() if one.suffix in (".h", ".pxi", ".pxd"))
    return Extension(f"gpuguard._{name}", [f"ext/{name}.pyx"], include_dirs=[np.get_include(), "ext"],
                     libraries=["bpf"] if name in NEED_LIBBPF else [], extra_compile_args=["-O3", *INLINE],
                     depends=parts)


setup(
    ext_modules=[extension(source) for source in sorted((ROOT / "ext").glob("*.pyx"))],
    cmdclass={"build_ext": Build},
)

"""Build the stand-in ``libnvidia-ml.so.1``.

Every nvml* name that the installed binding asks for becomes a weak symbol that answers NVML_ERROR_NOT_SUPPORTED; the
scripted ones of nvml.c override it. So the library answers every call that the real pynvml can make.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "libnvidia-ml.so.1"
NOT_SUPPORTED = 3


def binding_names() -> list[str]:
    """Return every function that the installed nvidia-ml-py looks up in the library."""
    found = importlib.util.find_spec("pynvml")
    if found is None or found.origin is None:
        sys.exit("nvidia-ml-py is not installed")
    return sorted(set(re.findall(r'_nvmlGetFunctionPointer\("(nvml\w+)"\)', Path(found.origin).read_text())))


def build(out_dir: Path) -> Path:
    """Compile the library into ``out_dir`` (for LD_LIBRARY_PATH) and return its path."""
    out_dir.mkdir(parents=True, exist_ok=True)
    others = out_dir / "nvml_others.c"
    weak = '__attribute__((weak, visibility("default")))'
    others.write_text("".join(f"{weak} int {name}(void) {{ return {NOT_SUPPORTED}; }}\n" for name in binding_names()))
    library = out_dir / LIBRARY
    flags = ["-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-fPIC", "-fvisibility=hidden", "-shared"]
    sources = [str(HERE / "nvml.c"), str(others)]
    subprocess.run(["cc", *flags, f"-Wl,-soname,{LIBRARY}", "-o", str(library), *sources, "-lpthread"], check=True)
    others.unlink()
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))

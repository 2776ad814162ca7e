#!/bin/sh
# The tests of the machine-code decoder with it built under AddressSanitizer and UndefinedBehaviorSanitizer (gcc's),
# then
# the whole way of a scan and the decoder under mutation, for GPUGUARD_ASAN_FUZZ_SECONDS each (default 20).
# Run from anywhere: sh tests/asan_sass.sh [pytest options]; PYTHON names the interpreter, .venv/bin/python if unset.
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
case $python in /*) ;; *) python=$PWD/$python ;; esac
asan=$(gcc -print-file-name=libasan.so)
ubsan=$(gcc -print-file-name=libubsan.so)
case $asan in /*) ;; *) echo "gcc has no libasan here" >&2; exit 1 ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# The package as it is, but for the one compiled part.
mkdir -p "$work/gpuguard"
for path in "$root"/gpuguard/*; do
  case $path in */_sass.*.so) ;; *) ln -s "$path" "$work/gpuguard/" ;; esac
done
cp -r "$root/tests" "$root/scripts" "$work/"

cd "$root"
"$python" - "$work" <<'PY'
import sys

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup

flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
extension = Extension("gpuguard._sass", ["ext/sass.pyx"], include_dirs=[np.get_include(), "ext"],
                      extra_compile_args=flags, extra_link_args=flags)
setup(name="gpuguard-asan", packages=[], py_modules=[],
      ext_modules=cythonize([extension], build_dir=f"{sys.argv[1]}/build", quiet=True),
      script_args=["-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", f"{sys.argv[1]}/build"])
PY

cd "$work"
# -s: a report must not end in what pytest captures. PYTHONMALLOC: every object in memory of its own.
# Leaks are the interpreter's own at exit.
under_asan() {
  LD_PRELOAD="$asan $ubsan" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONMALLOC=malloc PYTHONPATH="$work" "$python" "$@"
}
under_asan -m pytest -q -s -c "$root/pyproject.toml" --rootdir "$work" "$@" \
  "$work"/tests/code/test_decode.py "$work"/tests/code/test_constants.py "$work"/tests/code/test_containers.py
for target in fuzz_scan fuzz_sass fuzz_ptx; do
  under_asan "$work/tests/fuzz/$target.py" "${GPUGUARD_ASAN_FUZZ_SECONDS:-20}"
done

#!/bin/sh
# The tests of the packet parser and of the flow table, with them built under AddressSanitizer and
# UndefinedBehaviorSanitizer (gcc's).
# Run from anywhere: sh tests/asan_packets.sh [pytest options]; PYTHON names the interpreter, .venv/bin/python if unset.
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
asan=$(gcc -print-file-name=libasan.so)
ubsan=$(gcc -print-file-name=libubsan.so)
case $asan in /*) ;; *) echo "gcc has no libasan here" >&2; exit 1 ;; esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

# The package as it is, but for these compiled parts.
mkdir -p "$work/gpuguard" "$work/tests"
for path in "$root"/gpuguard/*; do
  case $path in */_packets.*.so | */_flows.*.so | */_attempts.*.so) ;; *) ln -s "$path" "$work/gpuguard/" ;; esac
done
cp "$root"/tests/*packets*.py "$root"/tests/*flows*.py "$root"/tests/*attempts.py "$root"/tests/*dns_answers.py \
  "$root"/tests/conversation.py "$root"/tests/test_evasion.py "$root"/tests/test_reordered.py \
  "$root"/tests/test_reverse_console.py "$root"/tests/test_reverse_pool.py "$work/tests/"
ln -s "$root/tests/fixtures" "$work/tests/"

cd "$root"
"$python" - "$work" <<'PY'
import sys

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup

flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
extensions = [Extension(f"gpuguard._{name}", [f"ext/{name}.pyx"], include_dirs=[np.get_include(), "ext"],
                        extra_compile_args=flags, extra_link_args=flags) for name in ("packets", "flows", "attempts")]
setup(name="gpuguard-asan", packages=[], py_modules=[],
      ext_modules=cythonize(extensions, build_dir=f"{sys.argv[1]}/build", quiet=True),
      script_args=["-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", f"{sys.argv[1]}/build"])
PY

cd "$work"
# -s: a report must not end in what pytest captures. PYTHONMALLOC: every object in memory of its own.
# Leaks are the interpreter's own at exit.
LD_PRELOAD="$asan $ubsan" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONMALLOC=malloc PYTHONPATH="$work" \
  "$python" -m pytest -q -s -c "$root/pyproject.toml" --rootdir "$work" "$@" \
  "$work"/tests/test_packets*.py "$work"/tests/test_flows*.py \
  "$work"/tests/test_attempts.py "$work"/tests/test_dns_answers.py "$work"/tests/test_evasion.py \
  "$work"/tests/test_reordered.py "$work"/tests/test_reverse_*.py

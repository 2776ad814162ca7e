#!/bin/sh
# Prepare what a machine with a GPU but without network, clang and libbpf needs: build/gpu/wheels and build/gpu/lib.
#
# usage: carry.sh [PYTHON]      a Python of the version that is there (default: python3.12), on the same architecture
#
# The wheel of GPUGuard holds the eBPF objects, which are compiled here. libbpf and what it stands on are those of
# this machine.
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
python=${1:-python3.12}
build=${GPUGUARD_GPU_BUILD:-$root/build/gpu}
# What an ordinary machine-learning image lacks; NumPy, CuPy, Numba and PyTorch are there.
needed='msgspec structlog click rich markdown-it-py mdurl pygments prometheus-client pyyaml pyroute2 psutil lz4
    zstandard nvidia-ml-py grpcio grpcio-health-checking grpcio-reflection opentelemetry-proto protobuf
    typing-extensions'

# With what was built and measured before: nothing of this machine may pass for the other's.
for made in wheels lib site venv programs results work; do rm -rf "${build:?}/$made"; done
mkdir -p "$build/wheels" "$build/lib"
"$python" -m venv "$build/venv"
"$build/venv/bin/pip" install -q 'setuptools>=77' 'Cython>=3.1' 'numpy>=2' wheel
# From a copy: the checkout may hold objects of another Python.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
(cd "$root" && git ls-files -z | tar c --null -T -) | tar x -C "$copy"
(cd "$copy" && "$build/venv/bin/pip" wheel -q --no-deps --no-build-isolation --wheel-dir "$build/wheels" .)
# shellcheck disable=SC2086
"$build/venv/bin/pip" download -q --only-binary=:all: --no-deps --dest "$build/wheels" $needed
for name in libbpf.so.1 libelf.so.1; do
    found=$(ldconfig -p | sed -n "s|.*$name .*=> ||p" | head -n 1)
    [ -n "$found" ] || { echo "$name is not on this machine" >&2; exit 1; }
    cp -L "$found" "$build/lib/$name"
done
rm -rf "$build/venv"
du -sh "$build/wheels" "$build/lib"

#!/bin/sh
# Compile every CUDA kernel for four architectures and check what it uses, without a GPU (scripts/check_ptx.py).
#
# The compilers are about 1 GB and go into a venv of their own, build/ptx. All are of one CUDA minor version: a newer
# NVVM writes PTX that an older ptxas, and an older driver, refuses. Exit status 75: they could not be installed.
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/build/ptx
if [ ! -e "$venv/.ready" ]; then
    python3 -m venv "$venv" &&
        "$venv/bin/pip" install -q --disable-pip-version-check 'numba==0.68.1' 'numba-cuda[cu13]==0.30.4' \
            'cuda-toolkit[cccl,cudart,nvrtc,nvvm,nvcc]==13.0.*' 'msgspec>=0.19' 'numpy>=2.0' || exit 75
    touch "$venv/.ready"
fi
cd "$root"
PYTHONPATH=$root "$venv/bin/python" -W ignore scripts/check_ptx.py

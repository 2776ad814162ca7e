#!/bin/sh
# Compile tests/fixtures/cuda/*.cu to cubins, and write a manifest of what was made from what.
#
# usage: fixtures.sh [FOLDER [ARCHITECTURE...]]      default: tests/fixtures/cubins, 75 80 90 120
# nvcc is taken from PATH; without one, its wheels are installed into a venv of their own (build/nvcc).
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
out=${1:-$root/tests/fixtures/cubins}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- 75 80 90 120

nvcc=$(command -v nvcc || true)
if [ -z "$nvcc" ]; then
    python3 -m venv "$root/build/nvcc"
    "$root/build/nvcc/bin/pip" install -q 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
        'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'
    nvcc=$(find "$root/build/nvcc" -name nvcc -type f | head -n 1)
fi

mkdir -p "$out"
rm -f "$out"/*.cubin "$out"/manifest.csv
{
    printf 'cubin,source,sm,source_sha256,cubin_sha256\n'
    for source in "$root"/tests/fixtures/cuda/*.cu; do
        name=$(basename "$source" .cu)
        for sm in "$@"; do
            cubin=$name.sm_$sm.cubin
            "$nvcc" -cubin -arch="sm_$sm" -O3 -o "$out/$cubin" "$source"
            printf '%s,%s.cu,%s,%s,%s\n' "$cubin" "$name" "$sm" \
                "$(sha256sum < "$source" | cut -d' ' -f1)" "$(sha256sum < "$out/$cubin" | cut -d' ' -f1)"
        done
    done
} > "$out/manifest.csv"
printf '%s cubins, %s bytes\n' "$(ls "$out"/*.cubin | wc -l)" "$(cat "$out"/*.cubin | wc -c)"
"$nvcc" --version | sed -n 's/^Cuda compilation tools, //p'

#!/bin/sh
# Compile tests/fixtures/cuda/*.cu to cubins, and write a manifest of what was made from what. Those in more/ are for
# the matrix alone: models are trained on them, no test reads them.
#
# usage: fixtures.sh [FOLDER [ARCHITECTURE...]]   default: tests/fixtures/cubins, 75 80 90 120, rounds kept as loops
#        fixtures.sh --matrix [FOLDER]            default: build/matrix, every source x architecture x unrolling x flags
# nvcc is taken from PATH; without one, its wheels are installed into a venv of their own (build/nvcc).
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
sources=$root/tests/fixtures/cuda
matrix=
[ "${1:-}" != --matrix ] || { matrix=yes; shift; }
out=${1:-$root/${matrix:+build/matrix}}
[ -n "$matrix$*" ] || out=$root/tests/fixtures/cubins
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- 75 80 90 120

nvcc=$(command -v nvcc || true)
if [ -z "$nvcc" ]; then
    python3 -m venv "$root/build/nvcc"
    "$root/build/nvcc/bin/pip" install -q 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
        'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'
    nvcc=$(find "$root/build/nvcc" -name nvcc -type f | head -n 1)
fi
export nvcc out sources

# What is compiled: a line each of source, architecture, variant and the variant's flags.
jobs() {
    for source in "$sources"/*.cu ${matrix:+"$sources"/more/*.cu}; do
        if [ -z "$matrix" ]; then
            for sm in "$@"; do echo "$source $sm rolled -DROLLED"; done
            continue
        fi
        for sm in 80 90 120; do echo "$source $sm unrolled -O3"; done
        for sm in 75 90; do echo "$source $sm rolled -DROLLED"; done
        echo "$source 90 registers -maxrregcount=48 -use_fast_math"
    done
}

mkdir -p "$out"
rm -f "$out"/*.cubin "$out"/manifest.csv
jobs "$@" | xargs -P 2 -L 1 sh -c '
    source=$0 sm=$1 variant=$2; shift 2
    name=$(basename "$source" .cu).sm_$sm.cubin
    [ -z "'"$matrix"'" ] || name=$(basename "$source" .cu).$variant.sm_$sm.cubin
    "$nvcc" -cubin -arch="sm_$sm" -O3 -I "$sources" "$@" -o "$out/$name" "$source"
    printf "%s,%s,%s,%s,%s,%s\n" "$name" "$(basename "$source")" "$sm" "$variant" \
        "$(cat "$sources"/*.cuh "$source" | sha256sum | cut -d" " -f1)" \
        "$(sha256sum < "$out/$name" | cut -d" " -f1)" > "$out/$name.line"'
{
    printf 'cubin,source,sm,variant,source_sha256,cubin_sha256\n'
    cat "$out"/*.line
} > "$out/manifest.csv"
rm -f "$out"/*.line
printf '%s cubins, %s bytes\n' "$(ls "$out" | grep -c 'cubin$')" "$(cat "$out"/*.cubin | wc -c)"
"$nvcc" --version | sed -n 's/^Cuda compilation tools, //p'

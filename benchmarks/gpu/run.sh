#!/bin/sh
# Measure on a real GPU, in parts that can be repeated: each goes on where it was broken off, and takes 8 minutes at
# most.
#
#   run.sh build           install what was carried, compile the CUDA programs; what cannot be built is a gap
#   run.sh questions       ask the driver what only it can answer
#   run.sh record          record labelled workloads at 10 Hz
#   run.sh bench           kernels, the cost of a launch, the slowdown of training
#   run.sh pack [FOLDER]   all results as one archive, or in FOLDER in parts of 15 MB at most
#   run.sh unpack FILE...  results that were packed, to go on from
#   run.sh keep            what is worth committing into benchmarks/data, with what the guard says of it
#   run.sh all             build, questions, record, bench, pack
#   run.sh lent N FOLDER   the N-th of three commands for a machine that is lent for half an hour: see README.md
#
# Without a GPU the same parts run against the stand-ins of tests/standins; every result says so. See README.md.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)
carried=${GPUGUARD_GPU_CARRIED:-$root/build/gpu}
build=${GPUGUARD_GPU_BUILD:-$root/build/gpu}
out=${GPUGUARD_GPU_OUT:-$build/results}
mkdir -p "$build/programs" "$out"

# The guard gives its rights up: what it reads must lie where anybody may go.
open_to_all() {
    at=$1
    while [ "$at" != / ]; do
        case $(stat -c %A "$at") in *x | *t) ;; *) return 1 ;; esac
        at=$(dirname "$at")
    done
}
work=${GPUGUARD_GPU_WORK:-$build}
if [ "$(id -u)" = 0 ] && ! open_to_all "$build"; then work=${GPUGUARD_GPU_WORK:-/var/tmp/gpuguard-gpu}; fi
export GPUGUARD_GPU_BUILD="$build" GPUGUARD_GPU_OUT="$out" GPUGUARD_GPU_WORK="$work"

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    # A carried package is for the machine's own Python; a checkout that is set up has its own.
    [ -d "$carried/wheels" ] || [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
# Where container runtimes mount a driver's tools.
export PATH="$PATH:/usr/local/nvidia/bin"
nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
# Numba and CuPy look for the toolkit here, and not beside nvcc.
if [ -x "$nvcc" ] && [ -z "${CUDA_HOME:-}" ] && [ -d /usr/local/cuda ]; then export CUDA_HOME=/usr/local/cuda; fi
[ -n "${CUDA_HOME:-}" ] && export CUDA_PATH="${CUDA_PATH:-$CUDA_HOME}"
use_site() { [ ! -d "$work/site" ] || export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"; }
use_site

build_all() {
    mkdir -p "$work/lib"
    if [ -d "$carried/wheels" ] && [ ! -e "$work/site/.done" ]; then
        # A wheel is an archive of what goes there: without pip it is only unpacked.
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
            "$carried"/wheels/*.whl || {
            rm -rf "$work/site"
            for wheel in "$carried"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$work/site"; done
        }
        touch "$work/site/.done"
        use_site
    fi
    for library in "$carried"/lib/*.so.*; do
        [ ! -e "$library" ] || [ "$carried" = "$work" ] || cp "$library" "$work/lib/"
    done
    # Where a toolkit came as wheels, its NVVM is not where Numba looks for it.
    for library in "${CUDA_HOME:-}"/lib/libnvvm.so.4 "${CUDA_HOME:-}"/nvvm/lib64/libnvvm.so.4; do
        [ ! -e "$library" ] || [ -e "$work/lib/libnvvm.so.4" ] || ln -s "$library" "$work/lib/"
    done
    chmod -R a+rX "$work"
    "$PYTHON" "$here/machine.py" > "$out/build.json"
    cat "$out/build.json"
    [ ! -x "$nvcc" ] || grep -q '"device": "stand-in"' "$out/build.json" || compile_all
}

# All at once: there are more cores than programs.
compile_all() {
    compile rate "$here/programs/rate.cu"
    compile negative "$here/programs/negative.cu"
    families='sha256d keccak blake3 heavyhash dagwalk siptrim matmulpow'
    for family in $families; do
        compile "search_$family" "$here/programs/search.cu" "-DFAMILY_$family" \
            "-DKERNELS=\"$root/tests/fixtures/cuda/$family.cu\""
    done
    wait
    for name in rate negative $(printf 'search_%s ' $families); do
        [ -x "$build/programs/$name" ] && continue
        echo "$name: not built" >&2
        tail -n 20 "$build/programs/$name.log" >&2 || :
    done
}

compile() {
    name=$1 source=$2
    shift 2
    [ -x "$build/programs/$name" ] || "$nvcc" -O3 "-arch=${GPUGUARD_GPU_ARCH:-native}" -o "$build/programs/$name" \
        "$source" "$@" > "$build/programs/$name.log" 2>&1 &
}

pack() {
    use_site
    # What cannot be collected, as where the driver hangs, costs only itself.
    timeout -k 5 30 "$PYTHON" "$here/record.py" --collect || echo "collect: status $?" >&2
    cp "$build"/programs/*.log "$out/" 2> /dev/null || :
    packed=$(mktemp)
    tar czf "$packed" --exclude=results.tar.gz -C "$out" .
    if [ $# -gt 0 ]; then
        mkdir -p "$1"
        split -d -b 15000000 "$packed" "$1/results.tar.gz."
        ls -l "$1"
    else
        cp "$packed" "$out/results.tar.gz"
        ls -l "$out/results.tar.gz"
    fi
    rm -f "$packed"
}

# What is worth most comes first, and what is left over is taken up by the next. A part that fails costs only itself.
lent_s=${GPUGUARD_GPU_LENT_S:-540}
lent() {
    begun=$(date +%s) over=
    trap 'over=1' TERM
    run() { [ -n "$over" ] || sh "$0" "$@" || echo "$*: status $?" >&2; }
    left() { echo "$((begun + lent_s - $(date +%s) - 20))"; }
    run build
    case $1 in
        1) run bench --only parity
           run bench --only kernels_cuda --budget-s 150
           run record --budget-s "$(left)" ;;
        2) run record --budget-s 260
           run questions --budget-s "$(left)" ;;
        3) run record --budget-s 140
           run questions --budget-s 90
           run bench --budget-s "$(left)" ;;
        *) echo "lent: 1, 2 or 3" >&2; return 2 ;;
    esac
}

part=${1:-}
[ $# -gt 0 ] && shift
case $part in
    build) build_all ;;
    questions | record | bench) exec "$PYTHON" "$here/$part.py" "$@" ;;
    pack) pack "$@" ;;
    unpack) cat "$@" | tar xzf - -C "$out" ;;
    keep) "$PYTHON" "$here/verdicts.py" --keep "$out" ;;
    lent)
        # Ten minutes are what such a command has, and what it has not packed by then is lost.
        timeout -k 20 "$lent_s" sh "$0" lent-parts "$1" || echo "lent $1: status $?" >&2
        pack "$2"
        ;;
    lent-parts) lent "$@" ;;
    all)
        build_all
        for each in questions record bench; do "$PYTHON" "$here/$each.py" "$@" || echo "$each: status $?" >&2; done
        pack
        ;;
    *) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

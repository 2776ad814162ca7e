#!/bin/sh
# Measure on a real GPU, in parts that can be repeated: each goes on where it was broken off, and takes 8 minutes at
# most.
#
#   run.sh build        install what was carried, compile the extensions and the CUDA programs
#   run.sh questions    ask the driver what only it can answer
#   run.sh record       record labelled workloads at 10 Hz
#   run.sh bench        kernels, the cost of a launch, the slowdown of training
#   run.sh pack         all results as one archive
#   run.sh all          everything, in this order
#
# Without a GPU the same parts run against the stand-ins of tests/standins; every result says so. See README.md.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)
build=${GPUGUARD_GPU_BUILD:-$root/build/gpu}
out=${GPUGUARD_GPU_OUT:-$build/results}
export GPUGUARD_GPU_BUILD="$build" GPUGUARD_GPU_OUT="$out"

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    # A carried package is for the machine's own Python; a checkout that is set up has its own.
    [ -d "$build/wheels" ] || [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
[ -d "$build/site" ] && export PYTHONPATH="$build/site${PYTHONPATH:+:$PYTHONPATH}"

build_all() {
    mkdir -p "$build/programs" "$out"
    if [ -d "$build/wheels" ] && [ ! -e "$build/site/.done" ]; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$build/site" \
            "$build"/wheels/*.whl
        touch "$build/site/.done"
        export PYTHONPATH="$build/site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    # The guard runs as a user without rights: it must be able to read what it is made of.
    chmod -R a+rX "$build"
    if command -v nvcc > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
        compile rate "$here/programs/rate.cu"
        compile negative "$here/programs/negative.cu" -lcufft
        for family in sha256d keccak blake3 heavyhash dagwalk siptrim matmulpow; do
            compile "search_$family" "$here/programs/search.cu" "-DFAMILY_$family" \
                "-DKERNELS=\"$root/tests/fixtures/cuda/$family.cu\""
        done
        wait
        for name in rate negative search_sha256d search_keccak search_blake3 search_heavyhash search_dagwalk \
            search_siptrim search_matmulpow; do
            [ -x "$build/programs/$name" ] && continue
            cat "$build/programs/$name.log" >&2
            echo "$name: not built" >&2
            exit 1
        done
    fi
    "$PYTHON" "$here/machine.py" | tee "$out/build.json"
}

# All at once: there are more cores than programs.
compile() {
    name=$1 source=$2
    shift 2
    [ -x "$build/programs/$name" ] || nvcc -O3 -arch=native -o "$build/programs/$name" "$source" "$@" \
        > "$build/programs/$name.log" 2>&1 &
}

pack() {
    rm -f "$out/results.tar.gz"
    (cd "$out" && tar czf /tmp/gpuguard-results.$$ --exclude=work --exclude=results.tar.gz . &&
        mv /tmp/gpuguard-results.$$ results.tar.gz)
    ls -l "$out/results.tar.gz"
}

part=${1:-}
[ $# -gt 0 ] && shift
case $part in
    build) build_all ;;
    questions | record | bench) "$PYTHON" "$here/$part.py" "$@" ;;
    pack) pack ;;
    all)
        build_all
        for each in questions record bench; do "$PYTHON" "$here/$each.py" "$@" || echo "$each: status $?" >&2; done
        pack
        ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

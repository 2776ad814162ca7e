#!/bin/sh
# Run every fuzz target of its own for a fifth of the time, then every property of the tests over fresh random input,
# again and again, until the time is over or one fails.
#
# usage: fuzz.sh PYTHON SECONDS
set -eu

python=${1:?usage: fuzz.sh PYTHON SECONDS}
seconds=${2:?usage: fuzz.sh PYTHON SECONDS}
end=$(($(date +%s) + seconds))
for target in tests/fuzz/fuzz_*.py; do
    [ -e "$target" ] || continue
    printf '%s\n' "$target"
    GPUGUARD_FUZZ_SEED=$(date +%s) "$python" "$target" "$((seconds / 5))"
done
round=0
while [ "$(date +%s)" -lt "$end" ]; do
    round=$((round + 1))
    left=$((end - $(date +%s)))
    printf 'round %s, %s s left\n' "$round" "$left"
    # What exceeds the time is stopped, not failed: 124 is timeout's own status.
    timeout --signal=INT "$((left + 5))" \
        "$python" -m pytest -q -m hypothesis --hypothesis-profile=fuzz --timeout=0 tests \
        || { status=$?; [ "$status" = 124 ] && break; exit "$status"; }
done
printf 'nothing found in %s s\n' "$seconds"

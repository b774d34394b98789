#!/usr/bin/env bash
# Runs the tests with each kind of kernels that this machine has and with none, on 1 and on 3 threads, then with other
# roundings: of PyTorch's plainest code, and of tests/noise.py. Says at the end which of them failed.
#
#     scripts/test_kinds.sh               # the whole suite each time: an hour or two
#     scripts/test_kinds.sh tests/test_compare.py tests/test_kernels.py
set -uo pipefail
cd "$(dirname "$0")/.."
failed=()

run() { # NAME=VALUE... -- pytest's arguments
    local settings=()
    while [ "$1" != -- ]; do settings+=("$1"); shift; done
    shift
    echo "== ${settings[*]}"
    env OMP_NUM_THREADS=1 "${settings[@]}" .venv/bin/pytest -n 2 "$@" || failed+=("${settings[*]}")
}

kinds=$(.venv/bin/python -c "from bittern import native; print(*native.kinds(), 'none')") || exit 1
for kind in $kinds; do
    for threads in 1 3; do
        run BITTERN_KERNELS="$kind" BITTERN_TEST_THREADS="$threads" -- "$@"
    done
done
run ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 -- "$@"
for seed in 1 2 3; do
    run BITTERN_TEST_NOISE="$seed" -- "$@"
done
printf 'failed: %s\n' "${failed[@]:-nothing}"
[ ${#failed[@]} -eq 0 ]

#!/usr/bin/env bash
# Tests the kernels for arm64 without such a machine: each kind is compiled by GCC and by Clang (as Macs have it) and runs in
# an emulator of a CPU that has no more than it needs. The cases of tests/native/cases.py must give the same integers, and
# random shapes must touch no memory but their own.
# Needs, on Debian: g++-aarch64-linux-gnu qemu-user clang
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ASAN_OPTIONS=detect_leaks=0  # needs ptrace, which the emulator lacks
include="-I src/bittern/native -Werror"

.venv/bin/python tests/native/cases.py "$work"
flags=$(.venv/bin/python -c "import hatch_build; print(hatch_build.FLAGS)")
for pair in neon:cortex-a53 dotprod:neoverse-n1 i8mm:max; do
    kind=${pair%:*} cpu=${pair#*:}
    echo "== $kind on $cpu"
    own=$(.venv/bin/python -c "import hatch_build; print(hatch_build.ARM['$kind'])")
    build() { # COMPILER... SOURCE PROGRAM
        # shellcheck disable=SC2086  # flags are words
        "${@:1:$#-2}" $flags $own $include "tests/native/${*:$#-1:1}" -o "$work/${*:$#}"
    }
    build aarch64-linux-gnu-g++ -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all fuzz.cpp fuzz & first=$!
    build aarch64-linux-gnu-g++ conformance.cpp gcc
    build clang++ --target=aarch64-linux-gnu conformance.cpp clang
    wait $first
    emulate() { qemu-aarch64 -cpu "$cpu" -L /usr/aarch64-linux-gnu "$@"; }
    emulate "$work/gcc" "$work/cases" 1
    emulate "$work/gcc" "$work/cases" 3
    emulate "$work/clang" "$work/cases" 3
    emulate "$work/fuzz" 7 40
done

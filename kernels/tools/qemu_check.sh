#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# qemu_check.sh - the AArch64 kernels under QEMU: pk_check on CPUs with and without dotprod and i8mm, then how
# many instructions a call of each variant takes. Instructions are not time: they say what a kernel does, not
# how fast.
#
#   kernels/tools/qemu_check.sh [build folder] [more options for cmake]
#
# Needs aarch64-linux-gnu-gcc, qemu-aarch64 and cmake; CC, QEMU, SYSROOT and CPUS may name others. With
# -DPK_SANITIZE=ON pk_check runs under the sanitizers and nothing is counted.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
build=${1:-build/aarch64}
[ $# -gt 0 ] && shift
cc=${CC:-aarch64-linux-gnu-gcc}
qemu=${QEMU:-qemu-aarch64}
sysroot=${SYSROOT:-/usr/aarch64-linux-gnu}
cpus=${CPUS:-"cortex-a53 neoverse-n1 max"}  # neither dotprod nor i8mm; dotprod; both

mkdir -p "$build"
cmake -S "$here/../.." -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER="$cc" "$@" >"$build/cmake.log" 2>&1 ||
    { cat "$build/cmake.log"; exit 1; }
cmake --build "$build" --target pk_check

export ASAN_OPTIONS=detect_leaks=0  # the leak check needs ptrace, which QEMU does not have
failed=0
for cpu in $cpus; do
    echo "== $cpu"
    "$qemu" -L "$sysroot" -cpu "$cpu" "$build/pk_check" || failed=1
done
[ "$failed" = 0 ] || { echo "pk_check failed"; exit 1; }

grep -q '^PK_SANITIZE:BOOL=ON' "$build/CMakeCache.txt" && exit 0
if ! "$qemu" -h | grep -q -- -plugin; then
    echo "$qemu takes no plug-ins: nothing counted"
    exit 0
fi
"${HOSTCC:-cc}" -std=gnu11 -O2 -Wall -Wextra -fPIC -shared "$here/qemu_count.c" -o "$build/qemu_count.so"
"$cc" -std=gnu11 -O2 -Wall -Wextra -I"$here/.." "$here/pk_count.c" "$build/libpk_core.a" -lm \
    -o "$build/pk_count"
echo "== instructions on $("$qemu" -version | head -n 1), -cpu max"
# A line: a count that belongs to the preparation, family, what, variant, work, the count. "each" is a
# multiply-add of matmul and attention, a number elsewhere.
"$qemu" -L "$sysroot" -cpu max -plugin "$build/qemu_count.so" "$build/pk_count" | awk '
    { what = $2 " " $3; if (!(what in first)) first[what] = $6
      printf "%-11s %-9s %-12s %9d a call %8.3f each %6.2f x fewer\n",
             $2, $3, $4, $6, $6 / $5, first[what] / $6 }'

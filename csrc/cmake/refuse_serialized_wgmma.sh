#!/bin/sh
# A compiler launcher: runs nvcc, passes on what it says, and fails where ptxas put a wait after
# every WGMMA (C7508, C7510, C7511 and more: function calls in its pipeline, accumulators that are
# touched too early, too few registers). ptxas calls that information: the kernel is right, and
# several times slower.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" >"$log" 2>&1
status=$?
cat "$log"
[ "$status" -eq 0 ] || exit "$status"
grep -Eq '\(C75(08|10|11)\)|wgmma.* serialized' "$log" || exit 0

# Neither make nor Ninja may find the object and take it for done.
while [ $# -gt 1 ]; do
  [ "$1" = "-o" ] && rm -f "$2"
  shift
done
echo "error: ptxas serialized WGMMA instructions (see above)" >&2
exit 1

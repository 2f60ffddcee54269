#!/bin/sh
# Runs fuzz targets one after the other: run.sh FOLDER SECONDS TARGET.. Prints the last lines of each; stops at the first that fails.
set -eu
folder=$1 seconds=$2
shift 2
built=$(echo "$folder"/*/release/seeds)
built=${built%/seeds}

# In memory where there is such a folder: a job waits for the disk after each file that it writes.
files=$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d)
trap 'rm -rf "$files"' EXIT
rm -rf "$folder/seeds"
mkdir -p "$folder/found"
TMPDIR=$files "$built/seeds" "$folder/seeds"
for target in "$@"; do
    echo "== $target: $seconds s"
    mkdir -p "$folder/corpus/$target"
    log=$folder/found/$target.log
    # What was learnt stays in `corpus` from run to run, until `make clean`; what is found lies in `found`, named after the target.
    if ! TMPDIR=$files "$built/$target" "$folder/corpus/$target" "$folder/seeds/$target" -dict="$folder/seeds/words" \
        -max_total_time="$seconds" -timeout=2 -malloc_limit_mb=256 -rss_limit_mb=2048 -max_len=16384 -print_final_stats=1 \
        -artifact_prefix="$folder/found/$target-" >"$log" 2>&1; then
        tail -n 60 "$log"
        echo "$target failed: all of it is in $log" >&2
        exit 1
    fi
    grep -E '^(Done|stat::(number_of_executed_units|average_exec_per_sec|peak_rss_mb))' "$log"
done

#!/usr/bin/env bash
# Trains what is missing of a set of runs within a number of minutes, measures what is trained, and compares all of it.
#
#   scripts/results.sh SET OUT MINUTES [key=value...]
#   scripts/results.sh ladder runs/ladder 45
#
# SET is a folder of configs/; every file in it is a run in OUT, under the file's name. A run that is cut short by the time goes on
# from its folder the next time; finished ones are left alone. With EVAL=files every finished run is evaluated on them (CONTEXT=n
# forgets every n tokens), with AFTER=64,1024,... its decoding is measured. TTT names the program, DEVICE where to compute.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
set_name=$1 out=$2 minutes=$3
shift 3
root=$(cd "$(dirname "$0")/.." && pwd)
ttt=${TTT:-$root/target/release/ttt}
device=(--device "${DEVICE:-auto}")
deadline=$((SECONDS + minutes * 60))
mkdir -p "$out"

left() { echo $((deadline - SECONDS)); }
finished() { [ -e "$1/final/config.json" ]; }

# Ctrl-C to the program when the time is over: it saves and stops.
within() { timeout --preserve-status --signal INT "$(left)s" "$@"; }

late=
for config in "$root/configs/$set_name"/*.toml; do
    run=$out/$(basename "$config" .toml)
    finished "$run" && continue
    if [ "$(left)" -lt 2 ]; then
        late+=" $(basename "$run")"
        continue
    fi
    echo "== $run"
    status=0
    if [ -e "$run/settings.toml" ]; then
        within "$ttt" train --quiet "${device[@]}" --resume "$run" || status=$?
    else
        within "$ttt" train --quiet "${device[@]}" "$config" --out "$run" "$@" || status=$?
    fi
    case $status in
        0) ;;
        130) late+=" $(basename "$run")" ;;
        *) exit "$status" ;;
    esac
done

done_runs=()
for config in "$root/configs/$set_name"/*.toml; do
    run=$out/$(basename "$config" .toml)
    finished "$run" || continue
    done_runs+=("$run")
    if [ -n "${EVAL:-}" ] && [ ! -e "$run/results/eval.json" ]; then
        # shellcheck disable=SC2086
        "$ttt" eval "$run" "${device[@]}" --data $EVAL ${CONTEXT:+--context "$CONTEXT"} --keep > /dev/null
    fi
    if [ -n "${AFTER:-}" ] && [ ! -e "$run/results/decode.json" ]; then
        "$ttt" bench decode "$run" "${device[@]}" --after "$AFTER" --keep > /dev/null
    fi
done
if [ ${#done_runs[@]} -gt 0 ]; then
    "$ttt" compare "${done_runs[@]}" --out "$out/compare"
    "$ttt" report "${done_runs[@]}" --out "$out/report.html" --title "$set_name"
fi
if [ -n "$late" ]; then
    echo "not finished in $minutes minutes:$late; the same command goes on"
fi

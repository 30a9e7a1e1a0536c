#!/usr/bin/env bash
# Associative recall learned from nothing: a model of 0.1 million parameters must be right at least five times as often as a guess
# among the values that it has read, on fresh sequences of 8 key-value pairs.
#
#   ci/recall.sh [path of ttt]
#
# Takes about twenty seconds on two cores. Exits with 1 when the model does not reach it.
set -euo pipefail
cd "$(dirname "$0")/.."
ttt=$(realpath "${1:-target/release/ttt}")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"

"$ttt" task recall --pairs 8 --out recall
"$ttt" train recall/run.toml --out run -q
"$ttt" eval run --task recall --pairs 4,8,16 --sequences 500
"$ttt" eval run --task recall --pairs 8 --sequences 500 --json | python3 -c '
import json, sys
result = json.load(sys.stdin)["results"][0]
accuracy, chance = result["accuracy"] - result["margin"], result["chance"]
print(f"8 pairs: right at least {accuracy:.1%} of the time, {accuracy / chance:.1f} times chance ({chance:.1%})")
sys.exit(0 if accuracy >= 5 * chance else "error: that is less than 5 times chance")
'

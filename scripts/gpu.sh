#!/usr/bin/env bash
# Runs the tests and the tables on a machine with a GPU, where nothing can be built: scripts/gpu.sh FOLDER, FOLDER holding the
# program `ttt` and the test binaries `cuda` and `ttt_batch`. Logs go to $OUT (otherwise ./gpu-results). Under nine minutes.
set -uo pipefail
bin=$(cd "$1" && pwd)
out=${OUT:-$PWD/gpu-results}
mkdir -p "$out"
export TTT_TEST_DEVICE=cuda TTT_KERNEL_CACHE=${TTT_KERNEL_CACHE:-/tmp/ttt-kernels}
ttt=$bin/ttt
status=0
part() {
    local name=$1 start=$SECONDS
    shift
    timeout "${LIMIT:-150}" "$@" >"$out/$name.log" 2>&1
    local code=$?
    [ $code = 0 ] || status=1
    echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - start))}"
    tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
}
part doctor "$ttt" doctor --device cuda
part doctor-again "$ttt" doctor --device cuda --json
for kind in learners training decode attention mixers; do
    part "$kind-tests" "$bin/cuda" "$kind::" --nocapture
done
part ladder-tests "$bin/ttt_batch" a_gpu --nocapture
for shape in "32 2048" "64 2048" "4 32768"; do
    set -- $shape
    part "train-$1x$2" "$ttt" bench train --device cuda --preset 125m --batch "$1" --length "$2" --repeat 5
done
part prefill "$ttt" bench prefill --device cuda --preset 125m --batch 16 --length 2048 --repeat 5
for batch in 1 8 16 64 512; do
    part "decode-$batch" "$ttt" bench decode --device cuda --preset 125m --batch "$batch" --repeat 3
done
for batch in 8 32; do
    part "train-mlp-${batch}x2048" "$ttt" bench train --device cuda --preset 125m --inner mlp --batch "$batch" --length 2048 --repeat 5
done
part train-attention-32x2048 "$ttt" bench train --device cuda --mixer attention --preset 125m --batch 32 --length 2048 --repeat 5
part decode-attention-64 "$ttt" bench decode --device cuda --mixer attention --preset 125m --batch 64 --after 1024 --repeat 3
part "train-mlp-8x2048-inner" "$ttt" bench train --device cuda --preset 125m --inner mlp --batch 8 --length 2048 --repeat 5 --recompute inner
part plan "$ttt" plan --device cuda model.preset=125m model.inner=mlp --batch 8 --length 2048
for batch in 64 512; do
    part "decode-mlp-$batch" "$ttt" bench decode --device cuda --preset 125m --inner mlp --batch "$batch" --repeat 3
done
exit $status

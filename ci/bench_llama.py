#!/usr/bin/env python3
"""Decoding of a Transformer beside Hugging Face's Llama on the same cores, measured in turn; prints the ratio of the medians.

    pip install torch "transformers<5"
    cargo build --release
    python ci/bench_llama.py                        # 125M, both in f32
    python ci/bench_llama.py --preset 350m --rounds 3
    python ci/bench_llama.py --dtype int8           # ours with int8 matrices, Hugging Face in f32

Both sides have random weights, one sequence and all cores, and go on token by token after 64 tokens with their cache; Hugging Face's
loop is `model(token, past_key_values=...)` without the overhead of `generate`.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {
    "125m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "350m": dict(hidden_size=1024, intermediate_size=2736, num_hidden_layers=24, num_attention_heads=16),
}
BEFORE, DECODED = 64, 16


def ours(preset, dtype, repeat):
    command = [ROOT / "target/release/ttt", "bench", "decode", "--mixer", "attention", "--preset", preset, "--device", "cpu"]
    command += ["--dtype", dtype]
    out = subprocess.run([*command, "--repeat", str(repeat), "--json"], check=True, capture_output=True, text=True).stdout
    return json.loads(out)["results"][0]["tokens_per_second"]["median"]


def measure(preset, repeat):
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[preset], vocab_size=32000, tie_word_embeddings=True)).eval()
    rates = []
    with torch.inference_mode():
        for _ in range(repeat + 1):
            cache = DynamicCache()
            model(torch.randint(0, 32000, (1, BEFORE)), past_key_values=cache)
            start = time.perf_counter()
            for _ in range(DECODED):
                model(torch.randint(0, 32000, (1, 1)), past_key_values=cache)
            rates.append(DECODED / (time.perf_counter() - start))
    # The first does not count.
    print(statistics.median(rates[1:]))


def theirs(preset, repeat):
    command = [sys.executable, __file__, "--preset", preset, "--repeat", str(repeat), "--measure"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SIZES, default="125m")
    parser.add_argument("--dtype", choices=["f32", "bf16", "int8"], default="f32", help="how ttt holds its matrices")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        sys.exit(measure(args.preset, args.repeat))
    rounds = [(ours(args.preset, args.dtype, args.repeat), theirs(args.preset, args.repeat)) for _ in range(args.rounds)]
    for here, there in rounds:
        print(f"decode {args.preset}: ttt {args.dtype} {here:.1f} tok/s, Hugging Face {there:.1f} tok/s, ratio {here / there:.2f}")
    print(f"median ratio {statistics.median(here / there for here, there in rounds):.2f}")

#!/usr/bin/env python3
"""Our Mamba beside Hugging Face's on the same processor, measured in turn; prints the median of the ratios.

    pip install torch transformers
    cargo build --release
    python ci/bench_mamba.py                          # decode and prefill of the 130m model
    python ci/bench_mamba.py --rounds 1 --only decode

Both sides have random weights in f32 and use all cores. Decoding goes on from 64 tokens, one sequence, with the cache. Hugging
Face's prefill computes all logits and takes the plain path of its code (its fast one needs a GPU), so ours does all logits too.
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
VOCAB = 32000  # that of our presets
CASES = {
    "decode": ["decode"],
    "prefill": ["prefill", "--length", "512", "--all-logits"],
    "train": ["train", "--length", "512", "--no-optimizer"],
}
SHAPES = {"130m": (768, 24), "370m": (1024, 48)}


def ours(case, preset, repeat):
    """Median tokens a second."""
    command = [str(ROOT / "target/release/ttt"), "bench", *CASES[case], "--mixer", "mamba", "--preset", preset]
    command += ["--repeat", str(repeat), "--json", "--device", "cpu"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["results"][0]["tokens_per_second"]["median"]


def theirs(case, preset, repeat):
    """Median tokens a second, in a process of its own."""
    command = [sys.executable, __file__, "--measure", case, preset, str(repeat)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(case, preset, repeat):
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    hidden, layers = SHAPES[preset]
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers)).eval()
    times, tokens = [], 512
    if case == "train":
        ids = torch.randint(0, VOCAB, (1, 512))
        model.train()
        for _ in range(repeat + 1):
            start = time.perf_counter()
            model(ids, labels=ids).loss.backward()
            times.append(time.perf_counter() - start)
            model.zero_grad()
    elif case == "prefill":
        ids = torch.randint(0, VOCAB, (1, 512))
        with torch.no_grad():
            for _ in range(repeat + 1):
                start = time.perf_counter()
                model(ids, use_cache=False)
                times.append(time.perf_counter() - start)
    else:
        tokens, at = 16, 64
        with torch.no_grad():
            out = model(torch.randint(0, VOCAB, (1, at)), use_cache=True)
            for _ in range(repeat + 1):
                start = time.perf_counter()
                for _ in range(tokens):
                    step = dict(cache_params=out.cache_params, cache_position=torch.tensor([at]), use_cache=True)
                    out = model(out.logits[:, -1:].argmax(-1), **step)
                    at += 1
                times.append(time.perf_counter() - start)
    print(tokens / statistics.median(times[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="130m")
    parser.add_argument("--only", choices=CASES, nargs="+", default=["decode", "prefill"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        case, preset, repeat = args.measure
        return measure(case, preset, int(repeat))
    for case in args.only:
        pairs = [(ours(case, args.preset, args.repeat), theirs(case, args.preset, args.repeat)) for _ in range(args.rounds)]
        ratio = statistics.median(a / b for a, b in pairs)
        rates = ", ".join(f"{a:.0f} and {b:.0f}" for a, b in pairs)
        print(f"{case} {args.preset}: ours {ratio:.2f} times Hugging Face's (tokens a second {rates})", flush=True)


if __name__ == "__main__":
    main()

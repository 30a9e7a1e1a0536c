#!/usr/bin/env python3
"""Our speed beside the official PyTorch code's on the same machine, measured in turn; prints the median of the ratios.

    pip install torch "transformers<5"
    cargo build --release
    python ci/bench_official.py --official ttt.py                # ttt.py of test-time-training/ttt-lm-pytorch
    python ci/bench_official.py --official ttt.py --rounds 1 --only linear-decode

All models have the Mamba backbone (share_qk, use_gate, pre_conv) and random weights; both sides run in f32 on all cores. Training
of the 125M model is forward and backward; that of the small model is a whole step with clipping and AdamW. The official prefill
computes all logits; ours is given with the last position's and with all.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = {
    "prefill": ["prefill", "--preset", "125m", "--length", "512"],
    "prefill-all-logits": ["prefill", "--preset", "125m", "--length", "512", "--all-logits"],
    "decode": ["decode", "--preset", "125m"],
    "train": ["train", "--preset", "125m", "--length", "512", "--no-optimizer"],
    "small-step": ["train", "--preset", "small", "--batch", "8", "--length", "256"],
}


def ours(case, kind, repeat):
    """Median tokens a second."""
    command = [str(ROOT / "target/release/ttt"), "bench", *CASES[case], "--inner", kind, "--repeat", str(repeat), "--json"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["results"][0]["tokens_per_second"]["median"]


def official(case, kind, repeat, path):
    """Median tokens a second, in a process of its own."""
    command = [sys.executable, __file__, "--official", path, "--measure", case, kind, str(repeat)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(case, kind, repeat, path):
    import torch
    import transformers.utils.import_utils as utils

    if not hasattr(utils, "is_causal_conv1d_available"):
        utils.is_causal_conv1d_available = lambda: False
    spec = importlib.util.spec_from_file_location("official", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["official"] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    small = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=256)
    size = small if case == "small-step" else dict(module.TTT_STANDARD_CONFIGS["125m"], vocab_size=32000)
    mamba = dict(share_qk=True, use_gate=True, pre_conv=True)
    config = module.TTTConfig(**size, ttt_layer_type=kind, ttt_base_lr=1.0 if kind == "linear" else 0.1, **mamba)
    model = module.TTTForCausalLM(config)

    def median(work, tokens, warm_up=1):
        for _ in range(warm_up):
            work()
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return tokens / statistics.median(times)

    if case == "small-step":
        ids = torch.randint(0, 256, (8, 256))
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)

        def step():
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return median(step, 2048)
    ids = torch.randint(0, 32000, (1, 512))
    if case == "train":
        model.train()

        def step():
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()

        return median(step, 512)
    model.eval()
    with torch.no_grad():
        if case == "decode":
            cache = model(input_ids=ids[:, :64], use_cache=True).cache_params
            return median(lambda: model(input_ids=ids[:, :1], cache_params=cache, use_cache=True), 1, warm_up=2)
        return median(lambda: model(input_ids=ids), 512)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, metavar="ttt.py", help="the official model file")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of measurements")
    parser.add_argument("--only", metavar="KIND-CASE", help="such as linear-decode or mlp-small-step")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        case, kind, repeat = args.measure
        print(measure(case, kind, int(repeat), args.official))
        return
    print(f"{'':28}{'ours tok/s':>12}{'official':>12}{'ratio':>8}   (medians; ratios pair by pair)")
    for kind in ("linear", "mlp"):
        for case in CASES:
            if args.only and args.only != f"{kind}-{case}":
                continue
            repeat = {"decode": 20, "small-step": 5}.get(case, 3)
            pairs = [(ours(case, kind, repeat), official(case, kind, repeat, args.official)) for _ in range(args.rounds)]
            a, b = (statistics.median(side) for side in zip(*pairs))
            ratios = sorted(x / y for x, y in pairs)
            spread = " ".join(f"{r:.2f}" for r in ratios)
            print(f"{kind + ' ' + case:28}{a:12.1f}{b:12.1f}{statistics.median(ratios):8.2f}   ({spread})", flush=True)


if __name__ == "__main__":
    main()

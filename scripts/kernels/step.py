"""Checks the kernels of a decoding step on the CPU, through emulate/, and times its products on a GPU.

    python scripts/kernels/step.py check [--d 64]   # needs g++ and NumPy
    python scripts/kernels/step.py bench            # beside cuBLAS; needs PyTorch and NVRTC

Products with what stands before and behind them, the convolution before a layer, a token of TTT-Linear made from projections against
`ttt_linear_decode` on what they make, and the sampler against plain loops. Prints a JSON line an item; exit status 1 when one fails.
The same on a GPU, and the sampler against its definition, is `cargo test --test cuda decode::`.
"""
import argparse
import ctypes
import json
import sys

import numpy as np

from devices import Emulator
from ttt_linear import Forward, decode_shared, error, from_bits, struct, to_bits

POINTER, U32, F32 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float


def plain(fields):
    kinds = dict(p=POINTER, u=U32, f=F32)
    return type("Params", (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for k, names in fields for n in names.split()]})


Product = plain([("p", "x w y scale shift gate normed"), ("u", "x_stride y_stride gate_stride rows n k"), ("f", "eps")])
PreConv = plain([("p", "x scale weight bias window segments"), ("u", "cols taps"), ("f", "eps")])
ConvProduct = type("Params", (ctypes.Structure,), {"_fields_": [("product", Product)] + [
    (n, POINTER) for n in "conv_scale weight bias window segments residual now".split()]})
Step = plain([("p", "projected normed rate_weight rate_bias token_idx gamma beta cosine sine k_taps q_taps k_bias q_bias window segments z "
               "weights rows pre_window pre_now"), ("u", "stride heads mini_batch taps pre_taps"), ("f", "rate_scale")])
Sample = plain([("p", "logits draws chosen tokens segments"), ("u", "vocab ring mini_batch read")])
DRAW = np.dtype([("key", "u4", 8), ("stream", "u8"), ("drawn", "u8"), ("top_p", "f8"), ("scale", "f4"), ("top_k", "u4"), ("ends", "u4", 2),
                 ("ended", "u4"), ("first", "u4")])
ok = True


def say(check, errors, limit, **what):
    global ok
    good = all(e < limit for e in errors.values())
    ok &= good
    print(json.dumps(dict(check=check, ok=good, **what, errors={n: float(f"{e:.2g}") for n, e in errors.items()})), flush=True)


def bf16(x):
    return from_bits(to_bits(np.asarray(x, np.float32))).astype(np.float64)


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def gated_norm(x, scale, shift, gate):
    y = bf16((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift)
    return y * 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))


def products(dev, rng):
    a = dev.address
    for name, rows, k, n in [("norm_product", 3, 72, 40), ("norm_product", 8, 520, 16), ("norm_product_swiglu", 5, 264, 24),
                             ("gated_product_add", 2, 768, 48), ("product_bf16_8", 7, 344, 21), ("product_f32_16", 13, 96, 64),
                             ("product_add_8", 5, 72, 19), ("product_add_16", 16, 256, 33),
                             ("product_swiglu_16", 11, 128, 20)]:
        swiglu = "swiglu" in name
        x, w, gate = (bf16(rng.normal(size=s)) for s in ((rows, k), (n * (1 + swiglu), k), (rows, k)))
        x = bf16(x + 0.5)  # a mean that counts
        y = bf16(rng.normal(size=(rows, n)))
        scale, shift = (rng.normal(size=k).astype(np.float32) for _ in range(2))
        wide = dev.upload(to_bits(np.concatenate([x, gate], 1)))
        held = [dev.upload(v) for v in (to_bits(w), scale, shift)]
        out = dev.upload(np.full((rows, n), np.nan, np.float32) if "f32" in name else to_bits(y if "add" in name else np.full((rows, n), np.nan)))
        normed = dev.upload(to_bits(np.full((rows, k), np.nan)))
        p = Product(a(wide), a(held[0]), a(out), a(held[1]), a(held[2]), a(wide) + 2 * k, a(normed), 2 * k, n, 2 * k, rows, n, k, 1e-6)
        tokens = int(name.rsplit("_", 1)[1]) if name[-1].isdigit() else 8
        dev.launch(name, p, 3, 256, 640 * tokens + 64 + rows * (-(-2 * k // 128) * 128 + 64))
        before = bf16(norm(x, scale)) if name.startswith("norm") else bf16(gated_norm(x, scale, shift, gate)) if "gated" in name else x
        want = before @ w.T
        if swiglu:
            g, u = bf16(want[:, :n]), bf16(want[:, n:])
            want = u * g / (1 + np.exp(-g))
        want = want + y if "add" in name else want
        got = out if "f32" in name else from_bits(out)
        errors = dict(y=error(got, want))
        if name.startswith("norm"):
            errors["normed"] = error(from_bits(normed), before)
        say(name, errors, 3e-3, rows=rows, k=k, n=n)


def row_kernels(dev, rng):
    a = dev.address
    for name, rows, k in [("gated_norm", 3, 96), ("gated_norm", 2, 2056), ("rms_norm", 3, 776)]:
        x, gate = bf16(rng.normal(size=(rows, k)) + 0.5), bf16(rng.normal(size=(rows, k)))
        scale, shift = (rng.normal(size=k).astype(np.float32) for _ in range(2))
        held = [dev.upload(v) for v in (to_bits(x), to_bits(np.full((rows, k), np.nan)), scale, shift, to_bits(gate))]
        at = [a(v) for v in held]
        dev.launch(name, Product(at[0], 0, at[1], at[2], at[3], at[4], 0, k, k, k, rows, k, k, 1e-6), rows, 256, 64)
        say(name, dict(y=error(from_bits(held[1]), norm(x, scale) if name == "rms_norm" else gated_norm(x, scale, shift, gate))), 3e-3, rows=rows, k=k)
    for rows, cols, taps in [(3, 96, 4), (2, 264, 8), (2, 64, 1)]:
        x, window = bf16(rng.normal(size=(rows, cols))), bf16(rng.normal(size=(rows + 1, taps - 1, cols)))
        scale, weight, bias = (rng.normal(size=s).astype(np.float32) for s in (cols, (cols, taps), cols))
        table = np.array([[i, int(i != 1), rows - i, i] for i in range(rows)], np.uint32)
        held = [dev.upload(v) for v in (to_bits(x), scale, weight, bias, to_bits(window), table)]
        dev.launch("pre_conv", PreConv(*map(a, held), cols, taps, 1e-6), rows, 256, 32)
        want, moved = x.copy(), window.copy()
        for i in range(rows):
            if i == 1:
                continue
            now = bf16(norm(x[i], scale))
            seen = np.concatenate([window[rows - i], now[None]])
            want[i] = x[i] + bf16((weight.T * seen).sum(0) + bias)
            moved[rows - i] = seen[1:]
        say("pre_conv", dict(x=error(from_bits(held[0]), want), window=error(from_bits(held[4]), moved)), 3e-3, rows=rows, taps=taps)


def conv_product(dev, rng):
    a = dev.address
    for rows, k, n in [(1, 768, 20), (3, 264, 16), (8, 1160, 8)]:
        x, w, window = bf16(rng.normal(size=(rows, k))), bf16(rng.normal(size=(n, k))), bf16(rng.normal(size=(rows + 1, 3, k)))
        first, second, bias = (rng.normal(size=k).astype(np.float32) for _ in range(3))
        weight = rng.normal(size=(k, 4)).astype(np.float32)
        table = np.array([[i, 1, rows - i, i] for i in range(rows)], np.uint32)
        empty = [dev.upload(to_bits(np.full((rows, m), np.nan))) for m in (n, k, k, k)]
        held = [dev.upload(v) for v in (to_bits(x), to_bits(w), second, first, weight, bias, to_bits(window), table)]
        p = ConvProduct(Product(a(held[0]), a(held[1]), a(empty[0]), a(held[2]), 0, 0, a(empty[1]), k, n, 0, rows, n, k, 1e-6), *map(a, held[3:]),
                        a(empty[2]), a(empty[3]))
        dev.launch("conv_norm_product", p, 2, 256, 640 * 8 + 64 + rows * (-(-2 * k // 128) * 128 + 64))
        now = bf16(norm(x, first))
        seen = np.concatenate([window[rows - np.arange(rows)], now[:, None]], 1)
        residual = bf16(x + bf16((weight.T * seen).sum(1) + bias))
        normed = bf16(norm(residual, second))
        want = dict(y=normed @ w.T, normed=normed, residual=residual, now=now)
        say("conv_norm_product", {m: error(from_bits(e), v) for e, (m, v) in zip(empty, want.items())}, 3e-3, rows=rows, k=k)


def token(dev, rng, d):
    """The step's kernel, and the decoding kernel on what the step makes of the projections."""
    a = dev.address
    for K, H, taps in [(16, 2, 4), (5, 1, 2), (16, 3, 0)]:
        B, D, S = 5, H * d, d * d + d
        phases = [0, K - 1, 3, 1, K // 2]
        slots = rng.permutation(B + 1)[:B]
        blocks = 3 if taps else 4
        projected, normed = bf16(rng.normal(size=(B, blocks * D))), bf16(rng.normal(size=(B, D)))
        rate_w, rate_b = bf16(0.1 * rng.normal(size=(H, D))), rng.normal(size=H).astype(np.float32)
        idx = (0.05 * rng.normal(size=K)).astype(np.float32)
        gamma, beta = (1 + 0.2 * rng.normal(size=(H, d))).astype(np.float32), (0.2 * rng.normal(size=(H, d))).astype(np.float32)
        angle = np.arange(K)[:, None] * 10000.0 ** (-(np.arange(d) // 2 * 2) / d)
        cosine, sine = np.cos(angle).astype(np.float32), (np.sin(angle) * np.where(np.arange(d) % 2, 1, -1)).astype(np.float32)
        conv = [(0.5 * rng.normal(size=(D, max(taps, 1)))).astype(np.float32) for _ in range(2)]
        bias = [(0.1 * rng.normal(size=D)).astype(np.float32) for _ in range(2)]
        window = bf16(rng.normal(size=(B + 1, max(taps - 1, 0), D)))
        state = (rng.normal(size=(B + 1, H, S)) / 8).astype(np.float32)
        rows = np.full((B + 1, H, K - 1, 2 * d), np.nan, np.float32)
        for phase, slot in zip(phases, slots):
            rows[slot, :, :phase] = bf16(0.3 * rng.normal(size=(H, phase, 2 * d)))
        four = np.array([[i, int(i != 3), s, p] for i, (s, p) in enumerate(zip(slots, phases))], np.uint32)
        up = [dev.upload(v) for v in (to_bits(projected), to_bits(normed), to_bits(rate_w), rate_b, idx, gamma, beta, cosine, sine, *conv, *bias,
                                      to_bits(window), four, to_bits(np.full((B, D), np.nan)), state, rows)]
        at = [a(v) for v in up]
        if not taps:
            at[9:13] = [0] * 4
        pre, pre_now = bf16(rng.normal(size=(B + 1, 3, D))), bf16(rng.normal(size=(B, D)))
        pre_up, now_up = dev.upload(to_bits(pre)), dev.upload(to_bits(pre_now))
        p = Step(*at, a(pre_up), a(now_up) if taps else 0, blocks * D, H, K, max(taps, 1), 4, 0.7 / d)
        dev.launch("ttt_linear_step", p, B * H, 2 * d, decode_shared(d, K))
        # The same by the operations one after the other.
        q, k = np.empty((B, D)), np.empty((B, D))
        moved = window.copy()
        for i, slot in enumerate(slots):
            for out, side in ((k, 0), (q, 1)):
                if taps:
                    seen = np.concatenate([window[slot], projected[i:i + 1, :D]])
                    y = bf16((conv[side].T * seen).sum(0) + bias[side])
                    if i != 3:
                        moved[slot] = seen[1:]
                else:
                    y = projected[i, (1 - side) * D:(2 - side) * D]
                y = y.reshape(H, d)
                out[i] = bf16(y * cosine[phases[i]] + y.reshape(H, d // 2, 2)[..., ::-1].reshape(H, d) * sine[phases[i]]).ravel()
        lr = (0.7 / d / (1 + np.exp(-(normed @ rate_w.T + rate_b)))).astype(np.float32)
        tok = np.maximum(0, 1 / np.arange(1, K + 1) + idx).astype(np.float32)
        v = projected[:, (1 if taps else 2) * D:][:, :D]
        five = np.concatenate([four, np.zeros((B, 1), np.uint32)], 1)
        want = [dev.upload(x) for x in (to_bits(q), to_bits(k), to_bits(v), lr, tok, gamma, beta, five, to_bits(np.full((B, D), np.nan)), state, rows)]
        f = Forward(**dict(zip("q k v lr tok gamma beta segments z weights rows".split(), map(a, want))))
        f.q_stride = f.k_stride = f.v_stride = f.z_stride = D
        f.lr_stride, f.heads, f.head_dim, f.mini_batch, f.group, f.parts = H, H, d, K, 1, 1
        dev.launch("ttt_linear_decode", f, B * H, 2 * d, decode_shared(d, K))
        open_, slot = [i for i in range(B) if i != 3], slots[3]
        live = [s for s in slots if s != slot]
        errors = dict(z=error(from_bits(up[15])[open_], from_bits(want[8])[open_]), weights=error(up[16][live], want[9][live]))
        errors["rows"] = max(error(up[17][s, :, :p], want[10][s, :, :p]) for s, p in zip(slots, phases) if s != slot)
        if taps > 1:
            errors["window"] = error(from_bits(up[13]), moved)
        for i in open_ if taps else []:
            pre[slots[i]] = np.concatenate([pre[slots[i], 1:], pre_now[i:i + 1]])
        errors["pre_window"] = error(from_bits(pre_up), pre)
        untouched = np.array_equal(up[16][slot], state[slot]) and np.isnan(from_bits(up[15])[3]).all()
        errors["ended"] = 0.0 if untouched else 1.0
        say("ttt_linear_step", errors, 4e-3, d=d, K=K, heads=H, taps=taps)


def sampler(dev, rng):
    a = dev.address
    settings = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (0.8, 20, 0.9)]
    for vocab, fine in ((5, False), (300, False), (2500, False), (300, True)):
        logits = rng.normal(size=(len(settings), vocab)) * 2 if fine else np.floor(rng.random((len(settings), vocab)) * 30) / 4
        logits = logits.astype(np.float32)
        draws = np.zeros(len(settings), DRAW)
        for d, (temperature, k, top_p) in zip(draws, settings):
            d["scale"], d["top_k"], d["top_p"], d["ends"] = (np.log2(np.e) / temperature if temperature else 0), k, top_p, 2**32 - 1
            d["key"] = rng.integers(0, 2**32, 8)
        up = [dev.upload(v) for v in (logits, draws.view(np.uint8), np.zeros((2, len(settings), 2), np.uint32), np.zeros(len(settings), np.uint32))]
        p = Sample(*map(a, up), 0, vocab, 2, 16, 0)
        wrong = {}
        for step in range(20 if fine else 2):
            dev.launch("sample", p, len(settings), 1024, 0)
            for row, (temperature, k, top_p) in enumerate(settings):
                x, token, logprob = logits[row].astype(np.float64), int(up[2][step % 2, row, 0]), float(up[2].view(np.float32)[step % 2, row, 1])
                order = np.lexsort((np.arange(vocab), -x))
                kept = order[:1] if temperature == 0 else order[:k] if k else order
                weights = np.exp((x[kept] - x.max()) / (temperature or 1))
                if top_p < 1:
                    kept = kept[:np.searchsorted(np.cumsum(weights), top_p * weights.sum() - 1e-6) + 1]
                wrong[f"row {row}"] = max(wrong.get(f"row {row}", 0.0), float(token not in kept),
                                          abs(logprob - (x[token] - np.log(np.exp(x - x.max()).sum()) - x.max())))
        say("sample", wrong, 1e-5, vocab=vocab, fine=fine)


def bench():
    """Microseconds of a product in a graph of 20, weights of 20 matrices in turn so that they come from memory: ours and cuBLAS's."""
    from devices import Gpu

    dev = Gpu(["step/product.cu"])
    torch = dev.torch
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for k, n in [(768, 2304), (768, 768), (768, 4096), (2048, 768), (768, 32000), (2048, 11008)]:
        copies = 20 if n < 10000 else 4
        w = torch.randn(copies, n, k, device="cuda", dtype=torch.bfloat16)
        for rows, kernel in [(1, "product_bf16_8"), (8, "product_bf16_8"), (16, "product_bf16_16")]:
            x, y = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16), torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
            tokens, at = int(kernel.rsplit("_", 1)[1]), [0, 0]

            def ours():
                at[0] = (at[0] + 1) % copies
                p = Product(x.data_ptr(), w[at[0]].data_ptr(), y.data_ptr(), 0, 0, 0, 0, k, n, 0, rows, n, k, 0)
                dev.launch(kernel, p, min(-(-n // 16), 3 * processors), 256, 640 * tokens)

            def theirs():
                at[1] = (at[1] + 1) % copies
                torch.matmul(x, w[at[1]].T, out=y)

            ours()
            worst = error(y.float().cpu().numpy(), (x.float() @ w[at[0]].float().T).cpu().numpy())
            times = [dev.milliseconds(dev.graph(f, 20)) / 20 * 1000 for f in (ours, theirs)]
            print(json.dumps(dict(bench="product", rows=rows, k=k, n=n, us=[round(t, 2) for t in times], floor_us=round(2 * n * k / 2.97e6, 2),
                                  error=float(f"{worst:.1g}"))), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="command", required=True)
    check = sub.add_parser("check", help="compare with NumPy")
    check.add_argument("--d", type=int, default=64)
    sub.add_parser("bench", help="time the products")
    args = parser.parse_args()
    if args.command == "bench":
        return bench()
    dev, rng = Emulator(f"HEAD_DIM={args.d}", "step.cpp"), np.random.default_rng(0)
    products(dev, rng)
    row_kernels(dev, rng)
    conv_product(dev, rng)
    token(dev, rng, args.d)
    sampler(dev, rng)
    sys.exit(not ok)


if __name__ == "__main__":
    main()

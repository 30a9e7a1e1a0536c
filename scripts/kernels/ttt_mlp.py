"""Checks and times the TTT-MLP kernels, as ttt_linear.py does TTT-Linear's.

    python scripts/kernels/ttt_mlp.py check --emulate --d 32            # on the CPU, through emulate/ (needs g++)
    python scripts/kernels/ttt_mlp.py check [--plain] [--d 64]          # on the GPU
    python scripts/kernels/ttt_mlp.py bench [--shape 32,2048,12,64 ...]
"""
import argparse
import json
import sys

import numpy as np

import mlp_reference
import reference
from devices import Emulator, Gpu
from ttt_linear import DTOK, F32, INPUTS, LOOSE, TIGHT, Reduce, cases, ceil, error, from_bits, same, struct, to_bits

Forward = struct(INPUTS + " z weights rows ghat sums checkpoints scratch", "q k v z lr", "heads head_dim mini_batch group")
Backward = struct(INPUTS + " ghat sums checkpoints dz dq dk dv dlr dstate partials scratch", "q k v lr dz dq dk dv dlr",
                  "heads head_dim mini_batch group")

SOURCES = ["ttt_mlp/plain.cu", "ttt_mlp/forward.cu", "ttt_mlp/backward.cu", "ttt_mlp/decode.cu"]


# Bytes of dynamic shared memory, `Shared::BYTES` of each source.
def forward_shared(d):
    warps, tile = d // 8, 16 * (2 * d + 16)
    return 3 * (3 * tile + 64) + 3 * tile + 32 * warps * (2 * d + 16) + warps * (128 * (d + 8) + 2048) + 32 * d + 384 + 80


def backward_shared(d):
    warps, tile = d // 8, 16 * (2 * d + 16)
    stage = 5 * tile + 16 * (4 * d + 16) + 64 * d + 64
    return (2 * stage + 4 * tile + 6 * d * (2 * d + 16) + 3 * warps * 64 * (d + 8) + 128 * d + 128 * warps + 12 * d + 16 * d + 384 + 64
            + 16 + 256 + 32 + 64 * d)


def decode_shared(d):
    return 4 * (4 * d * (d + 4) + d // 8 * d + 12 * d + 128)


class Case:
    """A batch of segments (len, phase) with random inputs, packed as the kernels take them, and what must come out."""

    def __init__(self, d, K, heads, segments, group, seed, f32=False):
        self.d, self.f, self.K, self.H, self.group, self.f32 = d, 4 * d, K, heads, group, f32
        rng = np.random.default_rng(seed)
        rnd = (lambda x: x.astype(np.float32).astype(np.float64)) if f32 else reference.bf16
        single = lambda x: np.asarray(x, np.float32).astype(np.float64)
        f = self.f
        self.tokens = sum(n for n, _ in segments)
        T, D = self.tokens, heads * d
        self.q, self.k, self.v, self.dz = (rnd(rng.normal(size=(T, D))) for _ in range(4))
        self.lr = single(0.5 / (1 + np.exp(-rng.normal(size=(T, heads)))) / d)
        self.tok = single(np.maximum(1 / np.arange(1, K + 1) + 0.05 * rng.normal(size=K), 0.01))
        self.gamma = single(1 + 0.2 * rng.normal(size=(heads, d)))
        self.beta = single(0.2 * rng.normal(size=(heads, d)))
        slots = len(segments) + 2
        order = rng.permutation(slots)
        row, before, self.segments = 0, 0, []
        for i, (n, phase) in enumerate(segments):
            self.segments.append((row, n, int(order[i]), phase, before))
            row, before = row + n, before + ceil(ceil(n, K), group)
        self.checkpoints, self.slots = before, slots
        self.shapes = [(d, f), (f,), (f, d), (d,)]
        self.S = sum(int(np.prod(s)) for s in self.shapes)
        self.R = 2 * d + 2 * f
        scales = [0.5 / np.sqrt(d), 0.1, 0.5 / np.sqrt(f), 0.1]
        make = lambda n, scales: [single(s * rng.normal(size=(n, heads, *shape))) for s, shape in zip(scales, self.shapes)]
        self.W = make(slots, scales)
        self.dW = make(len(segments), [0.1] * 4)
        self.rows = np.full((slots, heads, K - 1, self.R), np.nan)
        for _, _, slot, phase, _ in self.segments:
            k = rnd(rng.normal(size=(heads, phase, d)))
            x2 = rnd(mlp_reference.gelu(k @ rnd(self.W[0][slot]) + self.W[1][slot][:, None])[0])
            g1, g2 = (rnd(0.01 * rng.normal(size=(heads, phase, n))) for n in (f, d))
            self.rows[slot, :, :phase] = np.concatenate([k, g1, x2, g2], -1)

    def packed(self, W):
        """[n, H, S]."""
        return np.concatenate([w.reshape(*w.shape[:2], -1) for w in W], -1).astype(np.float32)

    def of(self, x, first, n):
        """Rows of [tokens, H width] as [H, n, width]."""
        return x[first:first + n].reshape(n, self.H, x.shape[1] // self.H).transpose(1, 0, 2)

    def reference(self, rounding, ghat=None, backward=True):
        out = []
        for i, (first, n, slot, phase, _) in enumerate(self.segments):
            q, k, v, dz = (self.of(x, first, n) for x in (self.q, self.k, self.v, self.dz))
            fixed = (q, k, v, self.lr[first:first + n].T, self.tok, self.gamma, self.beta)
            r = mlp_reference.forward(*fixed, [w[slot] for w in self.W], phase, self.rows[slot], rounding)
            if backward and phase == 0:
                g = [r["g1"], r["g2"]] if ghat is None else np.split(self.of(ghat, first, n), [self.f], -1)
                r.update(mlp_reference.backward(*fixed, r["states"], *g, dz, [w[i] for w in self.dW], rounding))
            out.append(r)
        return out


class Runner:
    """Uploads a case and launches one set of kernels on it."""

    def __init__(self, device, case, plain):
        self.dev, self.c, self.plain = device, case, plain
        c = case
        self.suffix = "_plain_f32" if c.f32 else "_plain_bf16"
        self.element = (lambda x: np.asarray(x, np.float32)) if c.f32 else to_bits
        self.back = (lambda x: x) if c.f32 else from_bits
        D = c.H * c.d
        # q, k, v are column blocks of one matrix, as are their gradients.
        wide = np.full((c.tokens, 3 * D + 16), np.nan)
        wide[:, 8:8 + D], wide[:, 8 + D:8 + 2 * D], wide[:, 8 + 2 * D:8 + 3 * D] = c.q, c.k, c.v
        self.item = 4 if c.f32 else 2
        up, f32 = device.upload, lambda x: np.ascontiguousarray(x, np.float32)
        self.qkv, self.dz = up(self.element(wide)), up(self.element(c.dz))
        self.lr, self.tok, self.gamma, self.beta = up(f32(c.lr)), up(f32(c.tok)), up(f32(c.gamma)), up(f32(c.beta))
        self.table = up(np.array(c.segments, np.uint32).reshape(-1, 5))
        self.tasks = len(c.segments) * c.H

    def common(self, p):
        c, a, D = self.c, self.dev.address, self.c.H * self.c.d
        base = a(self.qkv)
        p.q, p.k, p.v = (base + self.item * (8 + i * D) for i in range(3))
        p.q_stride = p.k_stride = p.v_stride = 3 * D + 16
        p.lr, p.tok, p.gamma, p.beta, p.segments = a(self.lr), a(self.tok), a(self.gamma), a(self.beta), a(self.table)
        p.lr_stride = c.H
        p.heads, p.head_dim, p.mini_batch, p.group = c.H, c.d, c.K, c.group
        return p

    def poison(self, *shape, element=False):
        x = np.full(shape, np.nan, np.float32)
        return self.dev.upload(self.element(x) if element else x)

    def forward(self, keep):
        c, up, a = self.c, self.dev.upload, self.dev.address
        D = c.H * c.d
        self.z = self.poison(c.tokens, 2 * D, element=True)
        self.weights, self.rows = up(c.packed(c.W)), up(np.ascontiguousarray(c.rows, np.float32))
        self.ghat, self.sums = self.poison(c.tokens, c.H * 5 * c.d, element=True), self.poison(c.tokens, c.H * 2 * c.d)
        self.saved = self.poison(max(c.checkpoints * c.H, 1), c.S)
        p = self.common(Forward())
        p.z, p.z_stride, p.weights, p.rows = a(self.z) + self.item * D, 2 * D, a(self.weights), a(self.rows)
        if keep:
            p.ghat, p.sums, p.checkpoints = a(self.ghat), a(self.sums), a(self.saved)
        if self.plain:
            scratch = self.poison(self.tasks * (3 * c.K * c.d + 4 * c.K * c.f + 2 * c.K * c.K))
            p.scratch = a(scratch)
            self.dev.launch("ttt_mlp_forward" + self.suffix, p, self.tasks, 256, 0)
        else:
            launch_forward(self.dev, p, self.tasks, not keep and all(n == 1 for _, n, _, _, _ in c.segments))
        down = self.dev.download
        z = self.back(down(self.z))
        assert np.isnan(z[:, :D]).all(), "z was written outside its columns"
        out = dict(z=z[:, D:], weights=down(self.weights), rows=down(self.rows))
        if keep:
            out.update(ghat=self.back(down(self.ghat)), sums=down(self.sums), saved=down(self.saved))
        return out

    def backward(self):
        c, a, down = self.c, self.dev.address, self.dev.download
        D, n, up = c.H * c.d, len(c.segments), self.dev.upload
        dqkv, dlr = self.poison(c.tokens, 3 * D + 16, element=True), self.poison(c.tokens, c.H)
        dstate, partials = up(c.packed(c.dW)), self.poison(n, c.H, c.K + 2 * c.d)
        p = self.common(Backward())
        p.ghat, p.sums, p.checkpoints, p.dz, p.dz_stride = a(self.ghat), a(self.sums), a(self.saved), a(self.dz), D
        p.dq, p.dk, p.dv = (a(dqkv) + self.item * (8 + i * D) for i in range(3))
        p.dq_stride = p.dk_stride = p.dv_stride = 3 * D + 16
        p.dlr, p.dlr_stride, p.dstate, p.partials = a(dlr), c.H, a(dstate), a(partials)
        if self.plain:
            scratch = self.poison(self.tasks * (c.S + 8 * c.K * c.d + 10 * c.K * c.f + 4 * c.K * c.K + 3 * c.K))
            p.scratch = a(scratch)
            self.dev.launch("ttt_mlp_backward" + self.suffix, p, self.tasks, 256, 0)
        else:
            launch_backward(self.dev, p, self.tasks)
        sums = down(partials).sum(0)
        wide, state = self.back(down(dqkv)), down(dstate)
        assert np.isnan(wide[:, :8]).all() and np.isnan(wide[:, 8 + 3 * D:]).all(), "a gradient was written outside its columns"
        dq, dk, dv = (wide[:, 8 + i * D:8 + (i + 1) * D] for i in range(3))
        return dict(dq=dq, dk=dk, dv=dv, dlr=down(dlr), dstate=state, dtok=sums[:, :c.K].sum(0), dgamma=sums[:, c.K:c.K + c.d],
                    dbeta=sums[:, c.K + c.d:])


def launch_forward(device, p, tasks, one_token):
    if one_token:
        device.launch("ttt_mlp_decode", p, tasks, 4 * p.head_dim, decode_shared(p.head_dim))
    else:
        device.launch("ttt_mlp_forward", p, tasks, 4 * p.head_dim, forward_shared(p.head_dim))


def launch_backward(device, p, tasks):
    device.launch("ttt_mlp_backward", p, 2 * tasks, 4 * p.head_dim, backward_shared(p.head_dim))


def compare(case, got, ref, backward):
    """Relative error of every output over the whole batch."""
    c, d, f = case, case.d, case.f
    flat = lambda x: x.transpose(1, 0, 2).reshape(x.shape[1], x.shape[0] * x.shape[2])
    tokens = lambda name: np.concatenate([flat(r[name]) for r in ref])
    parts = lambda x: np.split(x, np.cumsum([d * f, f, f * d]), -1)
    slots, errors = [s[2] for s in c.segments], {}
    names = ("W1", "b1", "W2", "b2")
    if not backward:
        errors["z"] = error(got["z"], tokens("z"))
        for i, (name, out) in enumerate(zip(names, parts(got["weights"][slots]))):
            errors[name] = error(out, np.stack([r["W"][i].reshape(c.H, -1) for r in ref]))
        if all(n == 1 for _, n, _, _, _ in c.segments):
            # A single update of a bias is small beside the bias.
            moved = [s for s, r in zip(slots, ref) if not r["rows"].shape[1]]
            start = c.packed(c.W)[moved]
            for i, name, (out, old) in zip(range(4), names, zip(parts(got["weights"][moved]), parts(start))):
                want = np.stack([r["W"][i].reshape(c.H, -1) for s, r in zip(slots, ref) if s in moved])
                errors[f"{name} moved"] = error(out - old, want - old)
        open_rows = [(got["rows"][s][:, :r["rows"].shape[1]], r["rows"]) for s, r in zip(slots, ref)]
        for i, name in enumerate(("rows_k", "rows_g1", "rows_x2", "rows_g2")):
            cut = slice(*np.cumsum([0, d, f, f, d])[i:i + 2])
            out, want = (np.concatenate([p[j][..., cut].ravel() for p in open_rows]) for j in (0, 1))
            errors[name] = error(out, want)
        if "ghat" in got:
            out = got["ghat"].reshape(c.tokens, c.H, -1)
            errors["g1"] = error(out[..., :f].reshape(c.tokens, -1), tokens("g1"))
            errors["g2"] = error(out[..., f:].reshape(c.tokens, -1), tokens("g2"))
            errors["sums"] = error(got["sums"], tokens("sums"))
    else:
        for name in ("dq", "dk", "dv"):
            errors[name] = error(got[name], tokens(name))
        errors["dlr"] = error(got["dlr"], np.concatenate([r["dlr"].T for r in ref]))
        for i, (name, out) in enumerate(zip(names, parts(got["dstate"]))):
            errors["d" + name] = error(out, np.stack([r["dW"][i].reshape(c.H, -1) for r in ref]))
        errors["dtok"] = error(got["dtok"], sum(r["dtok"].sum(0) for r in ref))
        errors["dgamma"] = error(got["dgamma"], sum(r["dgamma"] for r in ref))
        errors["dbeta"] = error(got["dbeta"], sum(r["dbeta"] for r in ref))
    return errors


def check(device, d, K, heads, segments, group, seed, plain, f32=False, forward_only=False):
    case = Case(d, K, heads, segments, group, seed, f32)
    runner = Runner(device, case, plain)
    training = all(phase == 0 for _, phase in segments)
    rounding = reference.exact if f32 else reference.bf16
    got = runner.forward(keep=training)
    repeat = same(got, runner.forward(keep=training))
    tight = compare(case, got, case.reference(rounding, backward=False), False)
    loose = {} if f32 else compare(case, got, case.reference(reference.exact, backward=False), False)
    if training and not forward_only:
        grads = runner.backward()
        repeat &= same(grads, runner.backward())
        tight.update(compare(case, grads, case.reference(rounding, got["ghat"].astype(np.float64)), True))
        if not f32:
            loose.update(compare(case, grads, case.reference(reference.exact), True))
    limit = F32 if f32 else TIGHT
    ok = repeat and all(e < (max(limit, DTOK) if n == "dtok" and not f32 else limit) for n, e in tight.items())
    ok = ok and all(e < (2 * LOOSE if n == "dtok" else LOOSE) for n, e in loose.items())
    worst = lambda errors: max(errors.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])
    line = dict(check="ttt_mlp", plain=plain, f32=f32, d=d, K=K, heads=heads, segments=segments if len(segments) < 8 else len(segments),
                group=group, seed=seed, ok=bool(ok), bitwise=bool(repeat), tight={n: float(f"{e:.2g}") for n, e in tight.items()})
    if loose:
        line["loose"] = [worst(loose)[0], float(f"{worst(loose)[1]:.2g}")]
    print(json.dumps(line), flush=True)
    return ok


def run_checks(args):
    ok = True
    for d in args.d:
        for K in args.k:
            define = "PLAIN" if args.plain else f"HEAD_DIM={d}"
            sources = SOURCES[:1] if args.plain else SOURCES
            device = Emulator(define, "ttt_mlp.cpp") if args.emulate else Gpu(sources, [define])
            for seed in range(args.seeds):
                for segments, group, split in cases(K, args.emulate):
                    if split:
                        continue
                    if args.emulate and segments[0][0] == 200:
                        segments = [(100, 0)]
                    ok &= check(device, d, K, 2, segments, group, seed, args.plain, args.f32, args.forward_only)
                    if args.stop and not ok:
                        return False
    return ok


class Bench:
    """Kernels on random inputs of a shape, without a reference."""

    def __init__(self, device, B, T, H, d, K=16, group=16, plain=False):
        torch, self.dev, self.plain = device.torch, device, plain
        torch.manual_seed(0)
        n, D, f = B * T, H * d, 4 * d
        S, R = 2 * d * f + f + d, 2 * d + 2 * f
        bf16, f32 = dict(device="cuda", dtype=torch.bfloat16), dict(device="cuda", dtype=torch.float32)
        qkv, dqkv = torch.randn(n, 3 * D, **bf16), torch.empty(n, 3 * D, **bf16)
        dz, z, ghat = torch.randn(n, D, **bf16), torch.empty(n, D, **bf16), torch.empty(n, 5 * D, **bf16)
        sums = torch.empty(n, 2 * D, **f32)
        lr, dlr = 0.1 * torch.sigmoid(torch.randn(n, H, **f32)) / d, torch.empty(n, H, **f32)
        tok = 1 / torch.arange(1, K + 1, **f32)
        gamma, beta = torch.ones(H, d, **f32), torch.zeros(H, d, **f32)
        checkpoints = ceil(ceil(T, K), group)
        weights, saved = 0.02 * torch.randn(B, H, S, **f32), torch.empty(B * H * checkpoints, S, **f32)
        dstate, partials = torch.zeros(B, H, S, **f32), torch.empty(B, H, K + 2 * d, **f32)
        # One token a sequence is decoding: every phase, with rows.
        phases = [b % K if T == 1 else 0 for b in range(B)]
        table = torch.tensor([[b * T, T, b, phases[b], b * checkpoints] for b in range(B)], dtype=torch.int32, device="cuda")
        rows = torch.randn(B, H, K - 1, R, **f32) * 0.01
        self.held = [qkv, dqkv, dz, z, ghat, sums, lr, dlr, tok, gamma, beta, weights, saved, dstate, partials, table, rows]
        self.tasks, self.f, self.b = B * H, Forward(), Backward()
        for p in (self.f, self.b):
            p.q, p.k, p.v = (qkv.data_ptr() + 2 * i * D for i in range(3))
            p.q_stride = p.k_stride = p.v_stride = 3 * D
            p.lr, p.tok, p.gamma, p.beta, p.segments = (x.data_ptr() for x in (lr, tok, gamma, beta, table))
            p.lr_stride, p.heads, p.head_dim, p.mini_batch, p.group = H, H, d, K, group
        self.f.z, self.f.z_stride, self.f.weights = z.data_ptr(), D, weights.data_ptr()
        if T == 1:
            self.f.rows = rows.data_ptr()
        self.kept = (ghat.data_ptr(), sums.data_ptr(), saved.data_ptr())
        b = self.b
        (b.ghat, b.sums, b.checkpoints), b.dz, b.dz_stride = self.kept, dz.data_ptr(), D
        b.dq, b.dk, b.dv = (dqkv.data_ptr() + 2 * i * D for i in range(3))
        b.dq_stride = b.dk_stride = b.dv_stride = 3 * D
        b.dlr, b.dlr_stride, b.dstate, b.partials = dlr.data_ptr(), H, dstate.data_ptr(), partials.data_ptr()
        if plain:
            self.held.append(torch.empty(self.tasks * (S + 8 * K * d + 10 * K * f + 4 * K * K + 3 * K), **f32))
            self.f.scratch = self.b.scratch = self.held[-1].data_ptr()

    def forward(self, keep):
        self.f.ghat, self.f.sums, self.f.checkpoints = self.kept if keep else (0, 0, 0)
        if self.plain:
            self.dev.launch("ttt_mlp_forward_plain_bf16", self.f, self.tasks, 256, 0)
        else:
            launch_forward(self.dev, self.f, self.tasks, False)

    def decode(self):
        launch_forward(self.dev, self.f, self.tasks, True)

    def backward(self):
        if self.plain:
            self.dev.launch("ttt_mlp_backward_plain_bf16", self.b, self.tasks, 256, 0)
        else:
            launch_backward(self.dev, self.b, self.tasks)

    def both(self):
        self.forward(True)
        self.backward()


def run_bench(args):
    for shape in args.shape:
        B, T, H, d = shape
        device = Gpu(SOURCES, [f"HEAD_DIM={d}", *args.defines])
        bench = Bench(device, *shape, plain=args.plain)
        if args.once:
            bench.decode() if T == 1 else (bench.forward(False), bench.both())
            device.torch.cuda.synchronize()
            continue
        if T == 1:
            ms = device.milliseconds(device.graph(bench.decode, 20)) / 20
            print(json.dumps(dict(bench="ttt_mlp", B=B, H=H, d=d, decode_ms=round(ms, 5),
                                  weights_GBps=round(B * H * 4 * (8 * d * d + 5 * d) / ms / 1e6))), flush=True)
            continue
        times = [device.milliseconds(f, args.repeats) for f in (lambda: bench.forward(False), lambda: bench.forward(True), bench.backward, bench.both)]
        names = ("forward", "forward_kept", "backward", "forward_backward")
        line = dict(bench="ttt_mlp", plain=args.plain, defines=args.defines, B=B, T=T, H=H, d=d, device=device.torch.cuda.get_device_name())
        line.update({n + "_ms": round(t, 4) for n, t in zip(names, times)})
        line["registers"] = [device.registers.get(n) for n in ("ttt_mlp_forward", "ttt_mlp_backward")]
        print(json.dumps(line), flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("check", help="compare all outputs and gradients with NumPy")
    p.add_argument("--emulate", action="store_true", help="on the CPU")
    p.add_argument("--plain", action="store_true", help="the plain kernels")
    p.add_argument("--f32", action="store_true", help="f32 elements (plain kernels only)")
    p.add_argument("--forward-only", action="store_true", help="no gradients")
    p.add_argument("--d", type=int, nargs="+", default=[64])
    p.add_argument("--k", type=int, nargs="+", default=[16])
    p.add_argument("--stop", action="store_true", help="at the first failure")
    p.add_argument("--seeds", type=int, default=1)
    p = sub.add_parser("bench", help="time them on random inputs")
    shape = lambda text: tuple(int(x) for x in text.split(","))
    p.add_argument("--shape", type=shape, nargs="+", default=[(32, 2048, 12, 64), (1, 32768, 12, 64)], help="B,T,H,d")
    p.add_argument("--plain", action="store_true", help="the plain kernels")
    p.add_argument("--repeats", type=int, default=30)
    p.add_argument("-D", dest="defines", action="append", default=[])
    p.add_argument("--once", action="store_true", help="one launch of each and no times, for a profiler")
    args = parser.parse_args()
    sys.exit(0 if (run_checks if args.command == "check" else run_bench)(args) else 1)


if __name__ == "__main__":
    main()

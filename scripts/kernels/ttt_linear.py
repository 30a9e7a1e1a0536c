"""Checks and times the TTT-Linear kernels.

    python scripts/kernels/ttt_linear.py check --emulate            # on the CPU, through emulate/ (needs g++)
    python scripts/kernels/ttt_linear.py check [--plain] [--d 64]   # on the GPU
    python scripts/kernels/ttt_linear.py bench [--shape 32,2048,12,64 ...]

Every check compares all outputs and gradients of a batch of sequences with NumPy in f64: with the kernels' rounding points (`tight`)
and without (`loose`), outputs and scratch poisoned with NaN, twice, bit for bit. Prints one JSON line an item; exit status 1 when
one fails. Needs NumPy; on a GPU PyTorch and NVRTC.
"""
import argparse
import ctypes
import json
import sys

import numpy as np

import reference
from devices import Emulator, Gpu

POINTER, U32 = ctypes.c_uint64, ctypes.c_uint32


def struct(pointers, strides, numbers):
    fields = [(n, POINTER) for n in pointers.split()] + [(n + "_stride", U32) for n in strides.split()]
    return type("Params", (ctypes.Structure,), {"_fields_": fields + [(n, U32) for n in numbers.split()]})


INPUTS = "q k v lr tok gamma beta segments"
Forward = struct(INPUTS + " z weights rows ghat checkpoints boundaries opened scratch", "q k v z lr ghat",
                 "heads head_dim mini_batch group split parts")
Backward = struct(INPUTS + " ghat checkpoints dz dq dk dv dlr dstate partials boundaries prepared scratch",
                  "q k v lr ghat dz dq dk dv dlr", "heads head_dim mini_batch group split parts")
Reduce = struct("partials dtok dgamma dbeta", "", "segments heads head_dim mini_batch parts")

# Relative error of a whole tensor: with the rounding points emulated, and without.
# LOOSE is four times the 7e-3 that bf16 operands alone were found to cost; the gradient of tok may differ by twice that.
TIGHT, LOOSE = 6e-3, 2.8e-2
DTOK = 2e-2  # a long sum that cancels
F32 = 2e-5


def to_bits(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def error(out, ref):
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    if ref.size == 0:
        return 0.0
    if not np.isfinite(out).all():
        return float("nan")
    return float(np.linalg.norm(out - ref) / max(np.linalg.norm(ref), 1e-30))


def forward_shared(d):
    return 4 * (3 * 16 * (2 * d + 16) + 64) + d // 16 * (16 * 48 + 1280) + d // 16 * 32 * 32 + 8 * d


def backward_shared(d):
    return (2 * (5 * 16 * (2 * d + 16) + 64) + 2 * d * (2 * d + 16) + 3 * 16 * (2 * d + 16) + d // 16 * 2 * 1280
            + d // 16 * 32 * (2 * 16 + 4) + 72 * d + 64)


def chain_shared(d):
    return 4 * (2 * 16 * (2 * d + 16) + 128 * d + 512) + d // 16 * (16 * 48 + 1280 + 1024)


def decode_shared(d, k):
    return 4 * (20 * d + (2 * d + 1) * k + d // 16)


def ceil(a, b):
    return -(-a // b)


class Case:
    """A batch of segments (len, phase) with random inputs, packed as the kernels take them, and what must come out."""

    def __init__(self, d, K, heads, segments, group, seed, f32=False):
        self.d, self.K, self.H, self.group, self.f32 = d, K, heads, group, f32
        rng = np.random.default_rng(seed)
        rnd = (lambda x: x.astype(np.float32).astype(np.float64)) if f32 else reference.bf16
        f = lambda x: np.asarray(x, np.float32).astype(np.float64)
        self.tokens = sum(n for n, _ in segments)
        T, D = self.tokens, heads * d
        self.q, self.k, self.v, self.dz = (rnd(rng.normal(size=(T, D))) for _ in range(4))
        self.lr = f(1 / (1 + np.exp(-rng.normal(size=(T, heads)))) / d)
        self.tok = f(np.maximum(1 / np.arange(1, K + 1) + 0.05 * rng.normal(size=K), 0.01))
        self.gamma = f(1 + 0.2 * rng.normal(size=(heads, d)))
        self.beta = f(0.2 * rng.normal(size=(heads, d)))
        slots = len(segments) + 2
        order = rng.permutation(slots)
        row, before, self.segments = 0, 0, []
        for i, (n, phase) in enumerate(segments):
            self.segments.append((row, n, int(order[i]), phase, before))
            row, before = row + n, before + ceil(ceil(n, K), group)
        self.checkpoints, self.slots = before, slots
        self.W = f(rng.normal(size=(slots, heads, d, d)) / np.sqrt(d) * 0.5)
        self.b = f(0.1 * rng.normal(size=(slots, heads, d)))
        self.rows = np.full((slots, heads, K - 1, 2 * d), np.nan)
        for _, _, slot, phase, _ in self.segments:
            self.rows[slot, :, :phase, :d] = rnd(rng.normal(size=(heads, phase, d)))
            self.rows[slot, :, :phase, d:] = rnd(0.02 * rng.normal(size=(heads, phase, d)))
        self.dstate = f(0.1 * rng.normal(size=(len(segments), heads, d * d + d)))

    def of(self, x, first, n):
        """Rows of [tokens, H d] as [H, n, d]."""
        return x[first:first + n].reshape(n, self.H, self.d).transpose(1, 0, 2)

    def reference(self, rounding, ghat=None, backward=True):
        d, H, out = self.d, self.H, []
        for i, (first, n, slot, phase, _) in enumerate(self.segments):
            q, k, v, dz = (self.of(x, first, n) for x in (self.q, self.k, self.v, self.dz))
            lr = self.lr[first:first + n].T
            fixed = (q, k, v, lr, self.tok, self.gamma, self.beta)
            r = reference.forward(*fixed, self.W[slot], self.b[slot], phase, self.rows[slot], rounding)
            if backward and phase == 0:
                dW, db = self.dstate[i, :, :d * d].reshape(H, d, d), self.dstate[i, :, d * d:]
                gh = r["ghat"] if ghat is None else self.of(ghat, first, n)
                r.update(reference.backward(*fixed, r["states"], gh, dz, dW, db, rounding))
            out.append(r)
        return out


class Runner:
    """Uploads a case and launches one set of kernels on it."""

    def __init__(self, device, case, plain, split=0):
        self.dev, self.c, self.plain, self.split = device, case, plain, split
        c = case
        self.suffix = ("_plain_f32" if c.f32 else "_plain_bf16") if plain else ""
        self.threads = 256 if plain else 2 * c.d
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
        self.parts = max(1, max(ceil(ceil(n + ph, c.K), split) for _, n, _, ph, _ in c.segments)) if split else 1
        self.blocks = self.tasks * self.parts

    def common(self, p):
        c, a, D = self.c, self.dev.address, self.c.H * self.c.d
        base = a(self.qkv)
        p.q, p.k, p.v = (base + self.item * (8 + i * D) for i in range(3))
        p.q_stride = p.k_stride = p.v_stride = 3 * D + 16
        p.lr, p.tok, p.gamma, p.beta, p.segments = a(self.lr), a(self.tok), a(self.gamma), a(self.beta), a(self.table)
        p.lr_stride, p.ghat_stride = c.H, D
        p.heads, p.head_dim, p.mini_batch, p.group, p.split, p.parts = c.H, c.d, c.K, c.group, self.split, self.parts
        self.boundaries = self.poison(self.blocks, c.d * c.d + c.d)
        p.boundaries = a(self.boundaries)
        return p

    def poison(self, *shape, element=False):
        x = np.full(shape, np.nan, np.float32)
        return self.dev.upload(self.element(x) if element else x)

    def forward(self, keep, rows=True):
        c, up, a = self.c, self.dev.upload, self.dev.address
        D, S = c.H * c.d, c.d * c.d + c.d
        state = np.concatenate([c.W.reshape(c.slots, c.H, -1), c.b], -1).astype(np.float32)
        self.z = self.poison(c.tokens, 2 * D, element=True)
        self.weights, self.rows = up(state), up(np.ascontiguousarray(c.rows, np.float32))
        self.ghat = self.poison(c.tokens, D, element=True)
        self.saved = self.poison(max(c.checkpoints * c.H, 1), S)
        scratch = self.poison(self.blocks * (3 * c.K * c.d + c.K * c.K)) if self.plain else None
        p = self.common(Forward())
        p.z, p.z_stride, p.weights = a(self.z) + self.item * D, 2 * D, a(self.weights)
        p.rows = a(self.rows) if rows else 0
        self.opened = self.poison(self.tasks, c.K - 1, 2 * c.d)
        p.opened = a(self.opened)
        if keep:
            p.ghat, p.checkpoints = a(self.ghat), a(self.saved)
        if scratch is not None:
            p.scratch = a(scratch)
        if self.split:
            self.dev.launch("ttt_linear_forward_chain", p, self.tasks, self.threads, forward_shared(c.d))
        if not keep and not self.plain and all(n == 1 for _, n, _, _, _ in c.segments):
            self.dev.launch("ttt_linear_decode", p, self.blocks, self.threads, decode_shared(c.d, c.K))
        else:
            self.dev.launch("ttt_linear_forward" + self.suffix, p, self.blocks, self.threads, 0 if self.plain else forward_shared(c.d))
        down = self.dev.download
        z = self.back(down(self.z))
        assert np.isnan(z[:, :D]).all(), "z was written outside its columns"
        weights = down(self.weights)
        out = dict(z=z[:, D:], W=weights[..., :c.d * c.d].reshape(c.slots, c.H, c.d, c.d), b=weights[..., c.d * c.d:],
                   rows=down(self.rows))
        if keep:
            out.update(ghat=self.back(down(self.ghat)), saved=down(self.saved))
        return out

    def backward(self):
        c, a, down = self.c, self.dev.address, self.dev.download
        D, n, up = c.H * c.d, len(c.segments), self.dev.upload
        dqkv, dlr = self.poison(c.tokens, 3 * D + 16, element=True), self.poison(c.tokens, c.H)
        dstate, partials = up(c.dstate.astype(np.float32)), self.poison(n, c.H, self.parts, c.K + 2 * c.d)
        dtok, dgamma, dbeta = (up(np.ones(s, np.float32)) for s in ((c.K,), (c.H, c.d), (c.H, c.d)))
        size = c.d * c.d + c.d + 9 * c.K * c.d + 2 * c.K * c.K + 4 * c.K
        scratch = self.poison(self.blocks * size) if self.plain else None
        p = self.common(Backward())
        p.ghat, p.checkpoints, p.dz, p.dz_stride = a(self.ghat), a(self.saved), a(self.dz), D
        p.dq, p.dk, p.dv = (a(dqkv) + self.item * (8 + i * D) for i in range(3))
        p.dq_stride = p.dk_stride = p.dv_stride = 3 * D + 16
        p.dlr, p.dlr_stride, p.dstate, p.partials = a(dlr), c.H, a(dstate), a(partials)
        if scratch is not None:
            p.scratch = a(scratch)
        shared = 0 if self.plain else backward_shared(c.d)
        if self.split:
            prepared = self.poison(self.blocks * self.split * (128 * c.d + 512) // 4)
            p.prepared = a(prepared)
            self.dev.launch("ttt_linear_backward_prepare", p, self.blocks, self.threads, shared)
            self.dev.launch("ttt_linear_backward_chain", p, self.tasks, self.threads, chain_shared(c.d))
        self.dev.launch("ttt_linear_backward" + self.suffix, p, self.blocks, self.threads, shared)
        out = {}
        if self.dev.kind == "gpu" or self.plain:
            r = Reduce(a(partials), a(dtok), a(dgamma), a(dbeta), n, c.H, c.d, c.K, self.parts)
            self.dev.launch("ttt_linear_reduce", r, ceil(c.H * 2 * c.d + c.K, 8), 256, 0)
            out.update(dtok=down(dtok) - 1, dgamma=down(dgamma) - 1, dbeta=down(dbeta) - 1)
        else:
            sums = down(partials).sum((0, 2))
            out.update(dtok=sums[:, :c.K].sum(0), dgamma=sums[:, c.K:c.K + c.d], dbeta=sums[:, c.K + c.d:])
        wide, state = self.back(down(dqkv)), down(dstate)
        assert np.isnan(wide[:, :8]).all() and np.isnan(wide[:, 8 + 3 * D:]).all(), "a gradient was written outside its columns"
        dq, dk, dv = (wide[:, 8 + i * D:8 + (i + 1) * D] for i in range(3))
        out.update(dq=dq, dk=dk, dv=dv, dlr=down(dlr), dstate=state)
        return out


def compare(case, got, ref, backward):
    """Relative error of every output over the whole batch."""
    c, d = case, case.d
    errors, tokens = {}, lambda name: np.concatenate([case_ref[name] for case_ref in by_row]) if by_row else np.zeros((0, c.H * d))
    flat = lambda x: x.transpose(1, 0, 2).reshape(x.shape[1], x.shape[0] * x.shape[2])
    by_row = []
    for r in ref:
        by_row.append({n: flat(r[n]) for n in ("z", "ghat", "dq", "dk", "dv") if n in r})
        if "dlr" in r:
            by_row[-1]["dlr"] = r["dlr"].T
    slots = [s[2] for s in c.segments]
    if not backward:
        errors["z"] = error(got["z"], tokens("z"))
        errors["W"] = error(got["W"][slots], np.stack([r["W"] for r in ref]))
        errors["b"] = error(got["b"][slots], np.stack([r["b"] for r in ref]))
        parts = [(got["rows"][s][:, :r["rows"].shape[1]], r["rows"]) for s, r in zip(slots, ref)]
        for name, cut in (("rows_k", slice(0, d)), ("rows_g", slice(d, 2 * d))):
            out, want = (np.concatenate([p[i][..., cut].ravel() for p in parts]) for i in (0, 1))
            errors[name] = error(out, want)
        if "ghat" in got:
            errors["ghat"] = error(got["ghat"], tokens("ghat"))
    else:
        for name in ("dq", "dk", "dv", "dlr"):
            errors[name] = error(got[name], tokens(name))
        errors["dW"] = error(got["dstate"][..., :d * d], np.stack([r["dW"].reshape(c.H, -1) for r in ref]))
        errors["db"] = error(got["dstate"][..., d * d:], np.stack([r["db"] for r in ref]))
        errors["dtok"] = error(got["dtok"], sum(r["dtok"].sum(0) for r in ref))
        errors["dgamma"] = error(got["dgamma"], sum(r["dgamma"] for r in ref))
        errors["dbeta"] = error(got["dbeta"], sum(r["dbeta"] for r in ref))
    return errors


def same(a, b):
    return all(np.array_equal(a[n].view(np.uint32), b[n].view(np.uint32)) for n in a)


def check(device, d, K, heads, segments, group, seed, plain, f32=False, split=0):
    case = Case(d, K, heads, segments, group, seed, f32)
    runner = Runner(device, case, plain, split)
    training = all(phase == 0 for _, phase in segments)
    rounding = reference.exact if f32 else reference.bf16
    got = runner.forward(keep=training)
    repeat = same(got, runner.forward(keep=training))
    ghat = got.get("ghat")
    tight = compare(case, got, case.reference(rounding, backward=False), False)
    loose = {} if f32 else compare(case, got, case.reference(reference.exact, backward=False), False)
    if training:
        grads = runner.backward()
        repeat &= same(grads, runner.backward())
        tight.update(compare(case, grads, case.reference(rounding, ghat.astype(np.float64)), True))
        if not f32:
            loose.update(compare(case, grads, case.reference(reference.exact), True))
    limit = F32 if f32 else TIGHT
    ok = repeat and all(e < (max(limit, DTOK) if n == "dtok" and not f32 else limit) for n, e in tight.items())
    ok = ok and all(e < (2 * LOOSE if n == "dtok" else LOOSE) for n, e in loose.items())
    worst = lambda errors: max(errors.items(), key=lambda item: -1 if item[1] < 0 else float("inf") if item[1] != item[1] else item[1])
    line = dict(check="ttt_linear", plain=plain, f32=f32, d=d, K=K, heads=heads, segments=segments if len(segments) < 8 else len(segments),
                group=group, split=split, seed=seed, ok=bool(ok), bitwise=bool(repeat), tight={n: float(f"{e:.2g}") for n, e in tight.items()})
    if loose:
        line["loose"] = [worst(loose)[0], float(f"{worst(loose)[1]:.2g}")]
    print(json.dumps(line), flush=True)
    return ok


def cases(K, quick):
    """(segments, group, split): lengths around a mini-batch and phases, alone and side by side, whole and decoupled."""
    yield [(1, 0), (K - 1, 0), (K, 0), (K + 1, 0), (63, 0)], 2, 0
    yield [(1, 0), (1, 5 % K), (1, K - 1), (0, 3 % K), (K + 1, 5 % K), (63, K - 1), (5, 2 % K), (2 * K, 0)], 1, 0
    yield [(1, phase) for phase in range(1, K)] + [(1, 0)], 1, 0
    yield [(200 if quick else 1040, 0)], 16, 0
    yield [(1, 0), (0, 0), (K, 0), (5 * K + 3, 0), (8 * K, 0)], 2, 4
    yield [(7, 5 % K), (6 * K, K - 1)], 1, 2
    if not quick:
        yield [(1040, K - 1), (1040, 5 % K)], 16, 0
        yield [(1040, 0), (2000, 0)], 16, 16


def run_checks(args):
    ok = True
    for plain in [True] if args.plain else [False]:
        for d in args.d:
            for K in args.k:
                define = "PLAIN" if plain else f"HEAD_DIM={d}"
                if args.emulate:
                    device = Emulator(define)
                else:
                    device = Gpu(["plain.cu"] if plain else ["plain.cu", "forward.cu", "backward.cu", "backward_chain.cu", "decode.cu"], [define])
                for seed in range(args.seeds):
                    for segments, group, split in cases(K, args.emulate):
                        if plain and split:
                            continue
                        ok &= check(device, d, K, 2 if args.emulate else 3, segments, group, seed, plain, args.f32, split)
                        if args.stop and not ok:
                            return False
    return ok


class Bench:
    """Kernels on random inputs of a shape, without a reference."""

    def __init__(self, device, B, T, H, d, K=16, group=16, plain=False, split=0):
        torch, self.dev, self.shape, self.plain, self.split = device.torch, device, (B, T, H, d), plain, split
        torch.manual_seed(0)
        n, D, S = B * T, H * d, d * d + d
        bf16, f32 = dict(device="cuda", dtype=torch.bfloat16), dict(device="cuda", dtype=torch.float32)
        qkv, dqkv = torch.randn(n, 3 * D, **bf16), torch.empty(n, 3 * D, **bf16)
        dz, z, ghat = torch.randn(n, D, **bf16), torch.empty(n, D, **bf16), torch.empty(n, D, **bf16)
        lr, dlr = torch.sigmoid(torch.randn(n, H, **f32)) / d, torch.empty(n, H, **f32)
        tok = 1 / torch.arange(1, K + 1, **f32)
        gamma, beta = torch.ones(H, d, **f32), torch.zeros(H, d, **f32)
        checkpoints, parts = ceil(ceil(T, K), group), ceil(ceil(T, K), split) if split else 1
        weights, saved = 0.02 * torch.randn(B, H, S, **f32), torch.empty(B * H * checkpoints, S, **f32)
        dstate, partials = torch.zeros(B, H, S, **f32), torch.empty(B, H, parts, K + 2 * d, **f32)
        boundaries = torch.empty(B, H, parts, S, **f32)
        # One token a sequence is decoding: every phase, with rows.
        phases = [b % K if T == 1 else 0 for b in range(B)]
        table = torch.tensor([[b * T, T, b, phases[b], b * checkpoints] for b in range(B)], dtype=torch.int32, device="cuda")
        rows = torch.randn(B, H, K - 1, 2 * d, **f32)
        self.sums = [torch.zeros(K, **f32), torch.zeros(H, d, **f32), torch.zeros(H, d, **f32)]
        self.held = [qkv, dqkv, dz, z, ghat, lr, dlr, tok, gamma, beta, weights, saved, dstate, partials, table, boundaries, rows]
        self.tasks, self.blocks, self.threads = B * H, B * H * parts, 256 if plain else 2 * d
        self.f, self.b = Forward(), Backward()
        for p in (self.f, self.b):
            p.q, p.k, p.v = (qkv.data_ptr() + 2 * i * D for i in range(3))
            p.q_stride = p.k_stride = p.v_stride = 3 * D
            p.lr, p.tok, p.gamma, p.beta, p.segments = (x.data_ptr() for x in (lr, tok, gamma, beta, table))
            p.lr_stride, p.ghat_stride, p.heads, p.head_dim, p.mini_batch, p.group = H, D, H, d, K, group
            p.split, p.parts, p.boundaries = split, parts, boundaries.data_ptr()
        self.f.z, self.f.z_stride, self.f.weights = z.data_ptr(), D, weights.data_ptr()
        if T == 1:
            self.f.rows = rows.data_ptr()
        self.kept = (ghat.data_ptr(), saved.data_ptr())
        b = self.b
        (b.ghat, b.checkpoints), b.dz, b.dz_stride = self.kept, dz.data_ptr(), D
        b.dq, b.dk, b.dv = (dqkv.data_ptr() + 2 * i * D for i in range(3))
        b.dq_stride = b.dk_stride = b.dv_stride = 3 * D
        b.dlr, b.dlr_stride, b.dstate, b.partials = dlr.data_ptr(), H, dstate.data_ptr(), partials.data_ptr()
        if split:
            self.held.append(torch.empty(B * H * parts * split * (128 * d + 512), dtype=torch.uint8, device="cuda"))
            b.prepared = self.held[-1].data_ptr()
        self.r = Reduce(partials.data_ptr(), *(x.data_ptr() for x in self.sums), B, H, d, K, parts)
        if plain:
            self.held.append(torch.empty(self.blocks * (S + 9 * K * d + 2 * K * K + 4 * K), **f32))
            self.f.scratch = self.b.scratch = self.held[-1].data_ptr()

    def forward(self, keep):
        self.f.ghat, self.f.checkpoints = self.kept if keep else (0, 0)
        shared = 0 if self.plain else forward_shared(self.shape[3])
        if self.split:
            self.dev.launch("ttt_linear_forward_chain", self.f, self.tasks, self.threads, shared)
        self.dev.launch("ttt_linear_forward" + "_plain_bf16" * self.plain, self.f, self.blocks, self.threads, shared)

    def decode(self):
        self.dev.launch("ttt_linear_decode", self.f, self.blocks, self.threads, decode_shared(self.shape[3], self.f.mini_batch))

    def backward(self):
        shared = 0 if self.plain else backward_shared(self.shape[3])
        if self.split:
            self.dev.launch("ttt_linear_backward_prepare", self.b, self.blocks, self.threads, shared)
            self.dev.launch("ttt_linear_backward_chain", self.b, self.tasks, self.threads, chain_shared(self.shape[3]))
        self.dev.launch("ttt_linear_backward" + "_plain_bf16" * self.plain, self.b, self.blocks, self.threads, shared)
        B, T, H, d = self.shape
        self.dev.launch("ttt_linear_reduce", self.r, ceil(H * 2 * d + self.b.mini_batch, 8), 256, 0)

    def both(self):
        self.forward(True)
        self.backward()


def run_bench(args):
    for shape in args.shape:
        B, T, H, d = shape
        device = Gpu(["plain.cu", args.forward, args.backward, "backward_chain.cu", "decode.cu"], [f"HEAD_DIM={d}", *args.defines])
        bench = Bench(device, *shape, plain=args.plain, split=args.split)
        if args.once:
            bench.decode() if T == 1 else (bench.forward(False), bench.both())
            device.torch.cuda.synchronize()
            continue
        if T == 1:
            ms = device.milliseconds(device.graph(bench.decode, 20)) / 20
            print(json.dumps(dict(bench="ttt_linear", plain=args.plain, B=B, H=H, d=d, decode_ms=round(ms, 5),
                                  weights_GBps=round(B * H * 4 * (d * d + d) / ms / 1e6))), flush=True)
            continue
        times = [device.milliseconds(f) for f in (lambda: bench.forward(False), lambda: bench.forward(True), bench.backward, bench.both)]
        names = ("forward", "forward_kept", "backward", "forward_backward")
        line = dict(bench="ttt_linear", plain=args.plain, split=args.split, defines=args.defines, B=B, T=T, H=H, d=d, device=device.torch.cuda.get_device_name())
        line.update({n + "_ms": round(t, 4) for n, t in zip(names, times)})
        line["registers"] = [device.registers.get(n) for n in ("ttt_linear_forward", "ttt_linear_backward")]
        print(json.dumps(line), flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("check", help="compare all outputs and gradients with NumPy")
    p.add_argument("--emulate", action="store_true", help="on the CPU")
    p.add_argument("--plain", action="store_true", help="the plain kernels")
    p.add_argument("--f32", action="store_true", help="f32 elements (plain kernels only)")
    p.add_argument("--d", type=int, nargs="+", default=[64])
    p.add_argument("--k", type=int, nargs="+", default=[16])
    p.add_argument("--stop", action="store_true", help="at the first failure")
    p.add_argument("--seeds", type=int, default=1)
    p = sub.add_parser("bench", help="time them on random inputs")
    shape = lambda text: tuple(int(x) for x in text.split(","))
    p.add_argument("--shape", type=shape, nargs="+", default=[(32, 2048, 12, 64), (1, 32768, 12, 64)], help="B,T,H,d")
    p.add_argument("--plain", action="store_true", help="the plain kernels")
    p.add_argument("--forward", default="forward.cu", help="another source of the forward kernel")
    p.add_argument("--backward", default="backward.cu", help="another source of the backward kernel")
    p.add_argument("--split", type=int, default=0, help="decoupled: mini-batches of a part")
    p.add_argument("-D", dest="defines", action="append", default=[], help="for example BLOCKS_PER_SM=1")
    p.add_argument("--once", action="store_true", help="one launch of each and no times, for a profiler")
    args = parser.parse_args()
    sys.exit(0 if (run_checks if args.command == "check" else run_bench)(args) else 1)


if __name__ == "__main__":
    main()

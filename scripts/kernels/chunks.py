"""Checks the kernels of linear attention and batch descent against NumPy in f64, on the CPU through emulate/ (needs g++).

    python scripts/kernels/chunks.py check [--stop]    # --stop: at the first failure, as mutate.py wants it

Launches what ops/linear_attention/cuda.rs and ops/ttt_batch/cuda.rs launch, on sequences of 1 to 130 tokens, packed, from states, in
f32 and bf16; outputs, final states, every gradient, and two runs bit for bit. Outputs and scratch memory are NaN before. Prints a
JSON line an item; exit status 1 when one fails. The same on a GPU is `cargo test --test ttt_batch a_gpu`.
"""
import argparse
import ctypes
import json
import sys

import numpy as np

from devices import Emulator
from ttt_linear import error, from_bits, to_bits

U64, U32, F32 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float
CHUNK = 64
LIMITS = dict(bf16=2**-8, f32=5e-6, dlr=2e-5)  # dlr: a sum over columns that cancels
ROWS, ROWS_F32, CHUNKS, SLOTS, SEGMENTS = range(5)


def struct(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": [(n, t) for names, t in fields for n in names.split()]})


Layout = struct("Layout", ("segments", U64), ("chunks heads width", U32))
Operand = struct("Operand", ("base", U64), ("kind stride size offset transposed unused", U32))
Pair = struct("Pair", ("a b", Operand))
Product = struct("Product", ("layout", Layout), ("pairs", Pair * 3), ("y add columns", Operand), ("rows", U64), ("count m n", U32), ("k", U32 * 3),
                 ("masked", U32), ("one", F32))
Sum = struct("Sum", ("layout", Layout), ("x", Operand * 2), ("y", Operand), ("weights", U64), ("count", U32))
Running = struct("Running", ("layout", Layout), ("chunks state", Operand), ("numbers reverse", U32))
Features = struct("Features", ("q k q_features k_features", U64), ("q_stride k_stride rows columns", U32))
Normalise = struct("Normalise", ("layout", Layout), ("numerators q_features", U64), ("sums weights", Operand), ("y dy dnumerators dtotals", U64),
                   ("dy_stride", U32), ("eps", F32))
FeatureGrad = struct("FeatureGrad", ("layout", Layout), ("q_features k_features dq_features dk_features dtotals", U64), ("sums", Operand),
                     ("dq dk", U64), ("dq_stride dk_stride", U32))
Descent = struct("Descent", ("layout", Layout), ("q k v dz lr gamma beta", U64), ("bias", Operand),
                 ("z_inner z_bar sums ghat dghat dz_bar d_sums dq dk dlr z dv parameters", U64),
                 ("q_stride k_stride v_stride dz_stride lr_stride dv_stride dlr_stride layer_norm residual mean", U32))
TOKENS, WIDTH = 0, 1


def t(x):
    return Operand(x.base, x.kind, x.stride, x.size, x.offset, 1 - x.transposed)


def at(x, offset):
    return Operand(x.base, x.kind, x.stride, x.size, x.offset + offset, x.transposed)


class Batch:
    """Sequences on a device, and the launches of cuda.rs."""

    def __init__(self, dev, kind, lengths, heads, d, rng):
        self.dev, self.kind, self.lengths, self.heads, self.d, self.rng = dev, kind, lengths, heads, d, rng
        self.n, self.wide = sum(lengths), heads * d
        self.slots = len(lengths) + 1
        firsts = np.cumsum([0, *lengths])
        self.table = [(int(f), l, self.slots - 1 - i, 5) for i, (f, l) in enumerate(zip(firsts, lengths))]
        self.segments = dev.upload(np.array(self.table, np.uint32).reshape(-1, 4))
        self.longest = max(-(-l // CHUNK) for l in lengths)
        self.places = self.n // CHUNK + len(lengths) + 1
        self.layout = Layout(dev.address(self.segments), self.longest, heads, d)
        self.held = []

    def up(self, array):
        self.held.append(self.dev.upload(array))
        return self.held[-1]

    def hold(self, x):
        return to_bits(np.asarray(x, np.float32)) if self.kind == "bf16" else np.asarray(x, np.float32)

    def see(self, x):
        return from_bits(x) if x.dtype == np.uint16 else x

    def random(self, *shape, scale=1.0):
        return self.see(self.hold(scale * self.rng.normal(size=shape))).astype(np.float64)

    def empty(self, *shape, f32=True):
        return self.up(np.full(shape, np.nan, np.float32) if f32 else self.hold(np.full(shape, np.nan)))

    def rows(self, x, stride=None):
        return Operand(self.dev.address(x), ROWS if x.dtype == np.uint16 else ROWS_F32, stride or self.wide)

    def matrices(self, x, kind=CHUNKS, stride=None):
        return Operand(self.dev.address(x), kind, stride or self.d, x.shape[-1])

    def square(self, x):
        return self.matrices(x, stride=CHUNK)

    def blocks(self, inner=1):
        return len(self.lengths) * self.longest * self.heads * inner

    def product(self, y, m, n, *pairs, add=None, columns=None, rows=None, one=0.0, masked=0):
        p = Product(self.layout, (Pair * 3)(*(Pair(a, b) for a, b, _ in pairs)), y, add or Operand(), columns or Operand(),
                    self.dev.address(rows) if rows is not None else 0, len(pairs), m, n, (U32 * 3)(*(k for *_, k in pairs)), masked, one)
        tiles = lambda e: -(-self.d // 64) if e == WIDTH else 1
        self.dev.launch("chunk_product", p, self.blocks(tiles(m) * tiles(n)), 256, 0)

    def sum(self, y, *x, weights=None):
        both = (Operand * 2)(x[0], x[-1])
        self.dev.launch("chunk_sum", Sum(self.layout, both, y, self.dev.address(weights) if weights is not None else 0, len(x)), self.blocks(), 128, 0)

    def running(self, chunks, state, numbers, reverse):
        p = Running(self.layout, chunks, state, numbers, reverse)
        self.dev.launch("running_sum", p, len(self.lengths) * self.heads * -(-numbers // 256), 256, 0)


class Attended:
    def __init__(self, b, kind, q, k, v, state):
        d = b.d
        self.b, self.kind, self.q, self.k, self.v = b, kind, q, k, v
        states, weights = b.empty(b.places, b.heads, d * d + d), b.empty(b.places, b.heads, CHUNK * CHUNK)
        self.s, self.p = b.matrices(states), b.square(weights)
        self.numbers = d * d if kind == "plain" else d * d + d
        b.product(self.s, WIDTH, WIDTH, (t(k), v, TOKENS))
        if kind != "plain":
            b.sum(at(self.s, d * d), v if kind == "biased" else k)
        b.running(self.s, state, self.numbers, 0)
        b.product(self.p, TOKENS, TOKENS, (q, t(k), WIDTH), one=float(kind == "biased"), masked=1)

    def columns(self, x, kind="biased"):
        return at(x, self.b.d**2) if self.kind == kind else None

    def read(self, o):
        self.b.product(o, TOKENS, WIDTH, (self.q, self.s, WIDTH), (self.p, self.v, TOKENS), columns=self.columns(self.s))

    def backward(self, d_o, dtotals, dstate):
        b, d = self.b, self.b.d
        self.ds, self.dp = b.matrices(b.empty(b.places, b.heads, d * d + d)), b.square(b.empty(b.places, b.heads, CHUNK * CHUNK))
        b.product(self.ds, WIDTH, WIDTH, (t(self.q), d_o, TOKENS))
        if self.kind == "biased":
            b.sum(at(self.ds, d * d), d_o)
        elif self.kind == "normalised":
            b.sum(at(self.ds, d * d), self.q, weights=dtotals)
        b.running(self.ds, dstate, self.numbers, 1)
        b.product(self.dp, TOKENS, TOKENS, (d_o, t(self.v), WIDTH), rows=dtotals, masked=1)
        self.dq = [(self.dp, self.k, TOKENS), (d_o, t(self.s), WIDTH)]
        self.dk = [(t(self.dp), self.q, TOKENS), (self.v, t(self.ds), WIDTH)]

    def dvalues(self, d_o, dv):
        self.b.product(dv, TOKENS, WIDTH, (t(self.p), d_o, TOKENS), (self.k, self.ds, WIDTH), columns=self.columns(self.ds))


def heads_of(b, x, segment, h):
    first, length = segment[:2]
    return x[first:first + length, h * b.d:(h + 1) * b.d]


def attention_reference(kind, q, k, v, s0, dout, dend):
    """One head of one sequence, all at once. -> o, end, dq, dk, dv, dstart"""
    n, d = q.shape
    phi = (lambda x: np.where(x > 0, x + 1, np.exp(x))) if kind == "normalised" else (lambda x: x)
    fq, fk, one = phi(q), phi(k), float(kind == "biased")
    S, s, dS, ds = s0[:d * d].reshape(d, d), s0[d * d:], dend[:d * d].reshape(d, d), dend[d * d:]
    p = np.tril(fq @ fk.T + one)
    num = fq @ S + p @ v + one * s
    total = fq @ s + p.sum(1) + 1e-6 if kind == "normalised" else np.ones(n)
    o = num / total[:, None]
    dnum = dout / total[:, None]
    dtotal = -(dout * o).sum(1) / total if kind == "normalised" else np.zeros(n)
    dp = np.tril(dnum @ v.T + dtotal[:, None])
    dq, dk = dp @ fk + dnum @ S.T + np.outer(dtotal, s), dp.T @ fq + v @ dS.T + (ds if kind == "normalised" else 0)
    dv = p.T @ dnum + fk @ dS + one * ds
    slope = (lambda f: np.minimum(f, 1)) if kind == "normalised" else (lambda f: 1)
    added = dict(plain=0 * s, biased=v.sum(0), normalised=fk.sum(0))[kind]
    dadded = dict(plain=0 * s, biased=dnum.sum(0), normalised=dtotal @ fq)[kind]
    end = np.concatenate([(S + fk.T @ v).ravel(), s + added])
    return o, end, dq * slope(fq), dk * slope(fk), dv, np.concatenate([(dS + fq.T @ dnum).ravel(), ds + dadded])


def attention(check, kind, b):
    d, n, a = b.d, b.n, b.dev.address
    q, k, v, dout = (b.random(n, b.wide, scale=s) for s in (0.4, 0.4, 1, 1))
    state = (0.3 * np.abs(b.rng.normal(size=(b.slots, b.heads, d * d + d)))).astype(np.float32)
    dstate = b.rng.normal(size=(len(b.lengths), b.heads, d * d + d)).astype(np.float32)
    wide = b.up(b.hold(np.concatenate([q, k, v], 1)))
    part = lambda i: Operand(a(wide) + i * b.wide * wide.itemsize, ROWS if b.kind == "bf16" else ROWS_F32, 3 * b.wide)
    up_dout = b.up(b.hold(dout))

    def run():
        live, dlive = b.up(state), b.up(dstate)
        o, dq, dk, dv = (b.empty(n, b.wide, f32=False) for _ in range(4))
        Q, K = part(0), part(1)
        if kind == "normalised":
            fq, fk, num = b.empty(n, b.wide), b.empty(n, b.wide), b.empty(n, b.wide)
            b.dev.launch("features", Features(a(wide), a(wide) + b.wide * wide.itemsize, a(fq), a(fk), 3 * b.wide, 3 * b.wide, n, b.wide),
                         -(-n * b.wide // 256), 256, 0)
            Q, K = b.rows(fq), b.rows(fk)
        x = Attended(b, kind, Q, K, part(2), b.matrices(live, SLOTS))
        d_o, dtotals = b.rows(up_dout), None
        if kind == "normalised":
            x.read(b.rows(num))
            dnum, dtotals = b.empty(n, b.wide), b.empty(n, b.heads)
            p = Normalise(b.layout, a(num), a(fq), at(x.s, d * d), x.p, a(o), 0, 0, 0, 0, 1e-6)
            b.dev.launch("normalise", p, b.blocks(CHUNK // 8), 256, 0)
            p = Normalise(b.layout, a(num), a(fq), at(x.s, d * d), x.p, 0, a(up_dout), a(dnum), a(dtotals), b.wide, 1e-6)
            b.dev.launch("normalise", p, b.blocks(CHUNK // 8), 256, 0)
            d_o = b.rows(dnum)
        else:
            x.read(b.rows(o))
        x.backward(d_o, dtotals, b.matrices(dlive, SEGMENTS))
        x.dvalues(d_o, b.rows(dv))
        if kind == "normalised":
            dfq, dfk = b.empty(n, b.wide), b.empty(n, b.wide)
            b.product(b.rows(dfq), TOKENS, WIDTH, *x.dq)
            b.product(b.rows(dfk), TOKENS, WIDTH, *x.dk, columns=at(x.ds, d * d))
            p = FeatureGrad(b.layout, a(fq), a(fk), a(dfq), a(dfk), a(dtotals), at(x.s, d * d), a(dq), a(dk), b.wide, b.wide)
            b.dev.launch("feature_gradients", p, b.blocks(CHUNK // 8), 256, 0)
        else:
            b.product(b.rows(dq), TOKENS, WIDTH, *x.dq)
            b.product(b.rows(dk), TOKENS, WIDTH, *x.dk)
        return dict(o=b.see(o), end=live, dq=b.see(dq), dk=b.see(dk), dv=b.see(dv), dstart=dlive)

    got, again = run(), run()
    want = dict(o=np.zeros((n, b.wide)), end=state.astype(np.float64), dq=np.zeros((n, b.wide)), dk=np.zeros((n, b.wide)), dv=np.zeros((n, b.wide)),
                dstart=dstate.astype(np.float64))
    for i, segment in enumerate(b.table):
        for h in range(b.heads):
            own = [heads_of(b, x, segment, h) for x in (q, k, v)]
            out = attention_reference(kind, *own, state[segment[2], h].astype(np.float64), heads_of(b, dout, segment, h), dstate[i, h].astype(np.float64))
            for name, x in zip("o dq dk dv".split(), (out[0], *out[2:5])):
                heads_of(b, want[name], segment, h)[...] = x
            want["end"][segment[2], h], want["dstart"][i, h] = out[1], out[5]
    errors = {name: error(got[name], want[name]) for name in want}
    errors["again"] = 0.0 if all(np.array_equal(got[m], again[m]) for m in want) else 1.0
    check.say(kind, errors, b)


def norm(z):
    x = z - z.mean(-1, keepdims=True)
    rs = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return x * rs, rs


def norm_backward(p, x, rs):
    return rs * (p - p.mean(-1, keepdims=True) - x * (p * x).mean(-1, keepdims=True))


def descent_reference(variant, q, k, v, lr, gamma, beta, s0, dz, dend, position):
    """One head of one sequence (ops/ttt_batch/reference.rs, all tokens at once)."""
    layer_norm, residual, mean, bias = variant
    n, d = q.shape
    half = d * d + d
    W, b, SW, Sb = s0[:d * d].reshape(d, d), s0[d * d:half], s0[half:half + d * d].reshape(d, d), s0[half + d * d:]
    dSW, dSb = dend[half:half + d * d].reshape(d, d), dend[half + d * d:]
    tau = (1 / (position + np.arange(n) + 1) if mean else np.ones(n))[:, None]
    Z, one = k @ W + b, float(bias)
    target = v - k if residual else v
    xhat, rs = norm(Z)
    e = (gamma * xhat + beta if layer_norm else Z) - target
    ge = gamma * e
    m = (ge * xhat).mean(-1, keepdims=True)
    G = rs * (ge - ge.mean(-1, keepdims=True) - m * xhat) if layer_norm else e
    ghat = lr[:, None] * G
    p = np.tril(q @ k.T + one)
    O = q @ SW + one * Sb + p @ ghat
    zbar = q @ W + b - tau * O
    xo, ro = norm(zbar)
    z = (gamma * xo + beta if layer_norm else zbar) + (q if residual else 0)
    dgamma, dbeta = ((dz * xo).sum(0), dz.sum(0)) if layer_norm else (0 * gamma, 0 * beta)
    dzbar = norm_backward(dz * gamma, xo, ro) if layer_norm else dz
    d_o = -tau * dzbar
    dp = np.tril(d_o @ ghat.T)
    dq = (dz if residual else 0) + dzbar @ W.T + d_o @ SW.T + dp @ k
    dk = dp.T @ q + ghat @ dSW.T
    dghat = p.T @ d_o + k @ dSW + one * dSb
    dlr = (dghat * G).sum(1)
    dg = lr[:, None] * dghat
    if layer_norm:
        a1, a2, a3 = dg.mean(-1, keepdims=True), (dg * xhat).mean(-1, keepdims=True), (dg * G).mean(-1, keepdims=True)
        u = rs * (dg - a1 - a2 * xhat)
        de = gamma * u
        dx = gamma * de - rs * (m * dg + a2 * ge)
        dgamma, dbeta = dgamma + (u * e + de * xhat).sum(0), dbeta + de.sum(0)
        dZ = rs * (dx - dx.mean(-1, keepdims=True) - xhat * ((dx * xhat).mean(-1, keepdims=True) + a3))
    else:
        de = dZ = dg
    dk = dk + dZ @ W.T + (de if residual else 0)
    dstart = np.concatenate([(dend[:d * d].reshape(d, d) + q.T @ dzbar + k.T @ dZ).ravel(), dend[d * d:half] + dzbar.sum(0) + dZ.sum(0),
                             (dSW + q.T @ d_o).ravel(), dSb + one * d_o.sum(0)])
    end = np.concatenate([s0[:half], (SW + k.T @ ghat).ravel(), Sb + one * ghat.sum(0)])
    return z, end, dq, dk, -de, dlr, dgamma, dbeta, dstart


def descent(check, variant, b):
    d, n, a = b.d, b.n, b.dev.address
    layer_norm, residual, mean, bias = variant
    half = d * d + d
    q, k, v, dz = (b.random(n, b.wide, scale=s) for s in (0.4, 0.4, 1, 1))
    lr = (0.3 + 0.1 * b.rng.normal(size=(n, b.heads))).astype(np.float32)
    gamma, beta = (1 + 0.2 * b.rng.normal(size=(b.heads, d))).astype(np.float32), (0.2 * b.rng.normal(size=(b.heads, d))).astype(np.float32)
    state = (0.3 * b.rng.normal(size=(b.slots, b.heads, 2 * half))).astype(np.float32)
    dstate = b.rng.normal(size=(len(b.lengths), b.heads, 2 * half)).astype(np.float32)
    up = [b.up(b.hold(x)) for x in (q, k, v, dz)] + [b.up(x) for x in (lr, gamma, beta)]
    kind = "biased" if bias else "plain"

    def begin(weight):
        rows = [b.empty(n, b.wide) for _ in range(4)]
        p = Descent(b.layout, *(a(x) for x in up), at(weight, d * d), a(rows[0]), a(rows[3]), a(rows[2]), a(rows[1]))
        for name in "q_stride k_stride v_stride dz_stride".split():
            setattr(p, name, b.wide)
        p.lr_stride, p.layer_norm, p.residual, p.mean = b.heads, layer_norm, residual, mean
        Q, K = b.rows(up[0]), b.rows(up[1])
        b.product(b.rows(rows[0]), TOKENS, WIDTH, (K, weight, WIDTH))
        b.dev.launch("descent_gradients", p, b.blocks(), 256, 0)
        b.product(b.rows(rows[3]), TOKENS, WIDTH, (Q, weight, WIDTH))
        x = Attended(b, kind, Q, K, b.rows(rows[1]), at(weight, half))
        x.read(b.rows(rows[2]))
        return p, x

    def run():
        live, dlive, z = b.up(state), b.up(dstate), b.empty(n, b.wide, f32=False)
        p, _ = begin(b.matrices(live, SLOTS))
        p.z = a(z)
        b.dev.launch("descent_output", p, b.blocks(), 256, 0)
        start = b.up(np.stack([state[s[2]] for s in b.table]))
        weight = b.matrices(start, SEGMENTS)
        p, x = begin(weight)
        dghat, dz_bar, d_sums, dq0, dk0 = (b.empty(n, b.wide) for _ in range(5))
        dq, dk, dv = (b.empty(n, b.wide, f32=False) for _ in range(3))
        dlr, parameters = b.empty(n, b.heads), b.up(np.zeros((b.places, b.heads, 2 * d), np.float32))
        for name, value in dict(dghat=dghat, dz_bar=dz_bar, d_sums=d_sums, dq=dq0, dk=dk0, dlr=dlr, dv=dv, parameters=parameters).items():
            setattr(p, name, a(value))
        p.dlr_stride, p.dv_stride = b.heads, b.wide
        b.dev.launch("descent_output_backward", p, b.blocks(), 256, 0)
        back, d_o, dzb, dzi = b.matrices(dlive, SEGMENTS), b.rows(d_sums), b.rows(dz_bar), b.rows(dghat)
        x.backward(d_o, None, at(back, half))
        x.dvalues(d_o, dzi)
        b.dev.launch("descent_gradients_backward", p, b.blocks(), 256, 0)
        b.product(b.rows(dq), TOKENS, WIDTH, *x.dq, (dzb, t(weight), WIDTH), add=b.rows(dq0))
        b.product(b.rows(dk), TOKENS, WIDTH, *x.dk, (dzi, t(weight), WIDTH), add=b.rows(dk0))
        b.product(x.ds, WIDTH, WIDTH, (t(x.q), dzb, TOKENS), (t(x.k), dzi, TOKENS))
        b.sum(at(x.ds, d * d), dzb, dzi)
        b.running(x.ds, back, half, 1)
        total = parameters.astype(np.float64).sum(0)
        return dict(z=b.see(z), end=live, dq=b.see(dq), dk=b.see(dk), dv=b.see(dv), dlr=dlr, dgamma=total[:, :d], dbeta=total[:, d:], dstart=dlive)

    got, again = run(), run()
    zeros = lambda *shape: np.zeros(shape)
    want = dict(z=zeros(n, b.wide), end=state.astype(np.float64), dq=zeros(n, b.wide), dk=zeros(n, b.wide), dv=zeros(n, b.wide), dlr=zeros(n, b.heads),
                dgamma=zeros(b.heads, d), dbeta=zeros(b.heads, d), dstart=dstate.astype(np.float64))
    for i, segment in enumerate(b.table):
        rows = slice(segment[0], segment[0] + segment[1])
        for h in range(b.heads):
            own = [heads_of(b, x, segment, h) for x in (q, k, v)]
            out = descent_reference(variant, *own, lr[rows, h].astype(np.float64), gamma[h].astype(np.float64), beta[h].astype(np.float64),
                                    state[segment[2], h].astype(np.float64), heads_of(b, dz, segment, h), dstate[i, h].astype(np.float64), segment[3])
            for name, x in zip("z dq dk dv".split(), (out[0], *out[2:5])):
                heads_of(b, want[name], segment, h)[...] = x
            want["dlr"][rows, h] = out[5]
            want["dgamma"][h] += out[6]
            want["dbeta"][h] += out[7]
            want["end"][segment[2], h], want["dstart"][i, h] = out[1], out[8]
    if not layer_norm:
        del want["dgamma"], want["dbeta"]
    errors = {name: error(got[name], want[name]) for name in want}
    errors["again"] = 0.0 if all(np.array_equal(got[m], again[m]) for m in want) else 1.0
    check.say("descent", errors, b, variant=variant)


class Check:
    def __init__(self, stop):
        self.ok, self.stop = True, stop

    def say(self, name, errors, b, **what):
        limits = {m: LIMITS.get(m, LIMITS["f32"]) if m in ("end", "dstart", "dlr", "dgamma", "dbeta", "again") else LIMITS[b.kind] for m in errors}
        good = all(errors[m] < limits[m] for m in errors)
        self.ok &= good
        print(json.dumps(dict(check=name, ok=good, kind=b.kind, t=b.lengths, heads=b.heads, d=b.d, **what,
                              errors={n: float(f"{e:.2g}") for n, e in errors.items()})), flush=True)
        if self.stop and not good:
            sys.exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["check"])
    parser.add_argument("--stop", action="store_true")
    check = Check(parser.parse_args().stop)
    devices = {"f32": Emulator("TTT_F32", "chunks.cpp"), "bf16": Emulator("TTT_BF16", "chunks.cpp")}
    cases = [([1], 1, 8), ([63], 1, 6), ([130, 0, 17, 1], 2, 20), ([65, 3], 1, 80)]
    variants = [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 1, 1)]
    for seed, (lengths, heads, d) in enumerate(cases):
        for kind, dev in devices.items():
            make = lambda i: Batch(dev, kind, lengths, heads, d, np.random.default_rng(100 * seed + i))
            for i, attended in enumerate(("plain", "biased", "normalised")):
                attention(check, attended, make(i))
            for i, variant in enumerate(variants):
                descent(check, variant, make(10 + i))
    sys.exit(not check.ok)


if __name__ == "__main__":
    main()

"""Checks the kernels of the selective scan against NumPy in f64, on the CPU through emulate/ (needs g++).

    python scripts/kernels/scan.py check [--stop]    # --stop: at the first failure, as mutate.py wants it

Outputs, final states and every gradient, at t = 1, 15, 16, 17, 63, 1040 and packed, from states and without, in f32 and bf16, a
block with one group of channels and with several; a few tokens of many sequences by the other kernel; two launches bit for bit.
Outputs and scratch memory are NaN before. Prints a JSON line an item; exit status 1 when one fails. The same on a GPU is
`cargo test --test cuda mixers::`, times are `ttt bench ops --device cuda --preset 130m --mixer mamba`.
"""
import argparse
import ctypes
import json
import sys

import numpy as np

from devices import Emulator
from ttt_linear import error, from_bits, to_bits

POINTER, U32 = ctypes.c_uint64, ctypes.c_uint32
SPAN, WARPS = 256, 12  # of the backward kernel on Hopper; other numbers of warps are other sizes of the same code
LIMITS = dict(bf16=2**-8, f32=2e-6)  # outputs in bf16 are off by at most half a unit in the last place
GROUP, PITCH, THREADS = 2 * WARPS, SPAN + 4, 32 * WARPS


def params(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": [f if isinstance(f, tuple) else (f, POINTER) for f in fields]})


def u32s(names):
    return [(n, U32) for n in names.split()]


Scan = params("Scan", *"x dt b c a_log d dt_bias segments state kept y".split(), *u32s("x_stride dt_stride b_stride c_stride a_stride channels states"))
Grad = params("Grad", ("scan", Scan), *"dy dx ddt selected parameters".split(), *u32s("dy_stride dx_stride ddt_stride rows groups"))
Reduce = params("Reduce", *"selected db dc".split(), *u32s("db_stride dc_stride blocks states rows"))


def forward_shared(n):
    return 4 * ((2 * n + 2 * GROUP) * PITCH + 2 * n * GROUP)


def backward_shared(n, groups):
    sums = 2 * n if groups > 1 else 0
    return 4 * ((2 * n + 3 * GROUP + 4 * WARPS + sums) * PITCH + (2 + 2 * groups) * n * GROUP + 2 * groups * GROUP)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def reference(x, dt, b, c, a_log, d, bias, segments, state, dy, dstate):
    """-> y, final states, gradients by name; states [slots, N, channels]."""
    a, step = -np.exp(a_log).T, dt + bias
    delta = softplus(step)
    y, state, dstate = np.empty_like(x), state.copy(), dstate.copy()
    g = {name: np.zeros_like(v) for name, v in dict(x=x, dt=dt, b=b, c=c, a_log=a_log, d=d, bias=bias).items()}
    for first, length, slot, _ in segments:
        hs = [state[slot].copy()]
        for t in range(first, first + length):
            hs.append(np.exp(delta[t] * a) * hs[-1] + b[t][:, None] * (delta[t] * x[t]))
            y[t] = c[t] @ hs[-1] + d * x[t]
        state[slot] = hs[-1]
        dh = dstate[slot].copy()
        for i in reversed(range(length)):
            t = first + i
            decay = np.exp(delta[t] * a)
            dh = dh + np.outer(c[t], dy[t])
            dinput = b[t] @ dh
            w = dh * decay * hs[i]
            g["c"][t], g["b"][t] = hs[i + 1] @ dy[t], dh @ (delta[t] * x[t])
            g["dt"][t] = ((w * a).sum(0) + x[t] * dinput) / (1 + np.exp(-step[t]))
            g["x"][t] = delta[t] * dinput + d * dy[t]
            g["a_log"] += (w * delta[t] * a).T
            g["d"] += dy[t] * x[t]
            g["bias"] += g["dt"][t]
            dh = dh * decay
        dstate[slot] = dh
    return y, state, g, dstate


class Check:
    def __init__(self, stop):
        self.ok, self.stop = True, stop
        self.devices = {"bf16": Emulator("TTT_BF16", "scan.cpp"), "f32": Emulator("TTT_F32", "scan.cpp")}

    def say(self, name, errors, limit, **what):
        good = all(e < limit for e in errors.values())
        self.ok &= good
        print(json.dumps(dict(check=name, ok=good, **what, errors={n: float(f"{e:.2g}") for n, e in errors.items()})), flush=True)
        if self.stop and not good:
            sys.exit(1)

    def case(self, kind, lengths, channels, n, groups, seed, with_states):
        dev, rng, rows = self.devices[kind], np.random.default_rng(seed), sum(lengths)
        a = dev.address
        hold = (lambda v: to_bits(np.asarray(v, np.float32))) if kind == "bf16" else (lambda v: np.asarray(v, np.float32))
        see = from_bits if kind == "bf16" else (lambda v: v)
        rounded = lambda shape, scale=1.0: see(hold(scale * rng.normal(size=shape))).astype(np.float64)
        wide = rounded((rows, 3 + 2 * n))  # B and C are columns of a wider matrix
        x, dt, dy, b, c = rounded((rows, channels)), rounded((rows, channels), 0.5), rounded((rows, channels)), wide[:, 3:3 + n], wide[:, 3 + n:]
        a_log, d = (np.log(1 + np.arange(n)) + 0.3 * rng.normal(size=(channels, n))).astype(np.float32), rng.normal(size=channels).astype(np.float32)
        bias = (rng.uniform(-5, 0.5, size=channels)).astype(np.float32)
        slots = len(lengths) + 1
        table, first = [], 0
        for i, length in enumerate(lengths):
            table.append([first, length, slots - 1 - i, i])
            first += length
        state, dstate = (with_states * rng.normal(size=(slots, n, channels)).astype(np.float32) for _ in range(2))
        want_y, want_state, want, want_dstate = reference(x, dt, b, c, a_log.astype(np.float64), d, bias, table, state.astype(np.float64), dy,
                                                          dstate.astype(np.float64))
        nan = lambda *shape: dev.upload(hold(np.full(shape, np.nan)))
        nan32 = lambda *shape: dev.upload(np.full(shape, np.nan, np.float32))
        up = [dev.upload(v) for v in (hold(x), hold(dt), hold(wide), a_log, d, bias, np.array(table, np.uint32).reshape(-1, 4), hold(dy))]
        blocks = -(-channels // GROUP)
        bytes_ = up[2].itemsize

        def run():
            live, dlive, y, kept = dev.upload(state), dev.upload(dstate), nan(rows, channels), nan32(rows // SPAN + len(lengths) + 1, n, channels)
            states = (a(live), a(dlive)) if with_states else (0, 0)
            p = Scan(a(up[0]), a(up[1]), a(up[2]) + 3 * bytes_, a(up[2]) + (3 + n) * bytes_, *(a(v) for v in up[3:7]), states[0], a(kept), a(y),
                     channels, channels, 3 + 2 * n, 3 + 2 * n, n, channels, n)
            dev.launch("scan_forward", p, blocks * len(lengths), THREADS, forward_shared(n))
            wide_blocks = -(-channels // (GROUP * groups))
            dx, ddt, dwide = nan(rows, channels), nan(rows, channels), nan(rows, 3 + 2 * n)
            selected, parameters = nan32(wide_blocks, 2 * n, rows), nan32(len(lengths), channels * (n + 2))
            p.state = states[1]
            q = Grad(p, a(up[7]), a(dx), a(ddt), a(selected), a(parameters), channels, channels, channels, rows, groups)
            dev.launch("scan_backward", q, wide_blocks * len(lengths), THREADS, backward_shared(n, groups))
            r = Reduce(a(selected), a(dwide) + 3 * bytes_, a(dwide) + (3 + n) * bytes_, 3 + 2 * n, 3 + 2 * n, wide_blocks, n, rows)
            dev.launch("scan_reduce", r, -(-2 * n * rows // 256), 256, 0)
            total = parameters.astype(np.float64).sum(0)
            got = dict(y=see(y), state=live, dx=see(dx), ddt=see(ddt), db=see(dwide)[:, 3:3 + n], dc=see(dwide)[:, 3 + n:], dstate=dlive,
                       da_log=total[:channels * n].reshape(channels, n), dd=total[channels * n:channels * (n + 1)], dbias=total[channels * (n + 1):])
            return got, np.array_equal(see(dwide)[:, :3], see(dwide)[:, :3], equal_nan=True) and np.isnan(see(dwide)[:, :3]).all()

        got, untouched = run()
        again, _ = run()
        wants = dict(y=want_y, state=want_state, dstate=want_dstate, dx=want["x"], ddt=want["dt"], db=want["b"], dc=want["c"], da_log=want["a_log"],
                     dd=want["d"], dbias=want["bias"])
        if not with_states:
            del wants["state"], wants["dstate"]
        errors = {name: error(got[name], wants[name]) for name in wants}
        errors["again"] = 0.0 if all(np.array_equal(got[m], again[m]) for m in wants) and untouched else 1.0
        self.say("scan", errors, LIMITS[kind], kind=kind, t=lengths, channels=channels, N=n, groups=groups, seed=seed,
                 states=with_states)
        if max(lengths) > 17:
            return
        live, y = dev.upload(state), nan(rows, channels)
        p = Scan(a(up[0]), a(up[1]), a(up[2]) + 3 * bytes_, a(up[2]) + (3 + n) * bytes_, *(a(v) for v in up[3:7]), a(live) if with_states else 0, 0, a(y),
                 channels, channels, 3 + 2 * n, 3 + 2 * n, n, channels, n)
        dev.launch("scan_step", p, -(-channels // 128) * len(lengths), 128, 0)
        errors = dict(y=error(see(y), want_y))
        if with_states:
            errors["state"] = error(live, want_state)
        self.say("scan_step", errors, LIMITS[kind], kind=kind, t=lengths, channels=channels, N=n)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["check"])
    parser.add_argument("--stop", action="store_true")
    args = parser.parse_args()
    check = Check(args.stop)
    cases = [([1], 5, 3), ([15], 16, 16), ([16, 1, 0, 17], 33, 16), ([63], 20, 4), ([1040], 17, 2), ([300, 0, 5, 257], 40, 3)]
    for seed, (lengths, channels, n) in enumerate(cases):
        for kind in ("f32", "bf16"):
            for groups, states in ((1, True), (2, False), (3, True)):
                check.case(kind, lengths, channels, n, groups, seed, states)
    sys.exit(not check.ok)


if __name__ == "__main__":
    main()

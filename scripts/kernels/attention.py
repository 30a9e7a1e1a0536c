"""Checks and times the attention kernels.

    python scripts/kernels/attention.py check --emulate [--d 64]   # on the CPU, through emulate/ (needs g++)
    python scripts/kernels/attention.py check [--d 64 96 128]      # on the GPU
    python scripts/kernels/attention.py bench [--shape 8,2048,12,12,64 ...] [--decode 64,1024,12,12,64 ...]

Every check compares outputs and gradients of a batch of sequences, each after a number of tokens in a cache, with NumPy in f64;
outputs are poisoned with NaN, and everything runs twice, bit for bit. Prints one JSON line an item; exit status 1 when one fails.
Needs NumPy; on a GPU PyTorch and NVRTC.
"""
import argparse
import ctypes
import json
import sys

import numpy as np

from devices import Emulator, Gpu
from ttt_linear import ceil, error, from_bits, to_bits

POINTERS = "q k v keys values segments of_row o log_sum dout delta dq dk dv dkeys dvalues parts"
NUMBERS = ("q_stride k_stride v_stride o_stride dout_stride dq_stride dk_stride dv_stride cache_stride capacity dcapacity heads kv_heads "
           "head_dim count rows blocks together splits")


class Params(ctypes.Structure):
    _fields_ = ([(n, ctypes.c_uint64) for n in POINTERS.split()] + [(n, ctypes.c_uint32) for n in NUMBERS.split()]
                + [("scale", ctypes.c_float)])


STEP = 64
# Relative error of a whole tensor: outputs are bf16, and so are weights and their gradients as operands.
LIMIT, PLAIN, F32 = 5e-3, 3e-3, 2e-5


def rows_of_block(d):
    return 128 if d <= 64 else 64


def shared_bytes(d):
    """Of the forward, of the backward over queries and over keys."""
    tile, rows = STEP * 2 * d, rows_of_block(d) * 2 * d
    return 4 * tile + rows, 4 * tile + 2 * rows, 2 * (2 * tile + 8 * STEP) + 2 * rows


def bf16(x):
    return from_bits(to_bits(np.asarray(x, np.float32))).astype(np.float64)


class Case:
    """Segments (len, phase) with random inputs, and what must come out. `large` scores are those of a model that has settled."""

    def __init__(self, d, heads, kv_heads, segments, seed, f32=False, large=1.0):
        self.d, self.h, self.g, self.f32 = d, heads, kv_heads, f32
        rng = np.random.default_rng(seed)
        rnd = (lambda x: x.astype(np.float32).astype(np.float64)) if f32 else bf16
        self.n = sum(n for n, _ in segments)
        draw = lambda *shape: rnd(rng.normal(size=shape))
        self.q, self.dout = rnd(large * draw(self.n, heads * d)), draw(self.n, heads * d)
        self.k, self.v = draw(self.n, kv_heads * d), draw(self.n, kv_heads * d)
        self.slots, self.capacity = len(segments) + 1, max(n + p for n, p in segments) + 3
        self.keys, self.values, self.dkeys, self.dvalues = (draw(self.slots, self.capacity, kv_heads * d) for _ in range(4))
        order, row, self.segments = rng.permutation(self.slots), 0, []
        for i, (n, phase) in enumerate(segments):
            self.segments.append((row, n, int(order[i]), phase))
            row += n

    def reference(self):
        d, group = self.d, self.h // self.g
        out = dict(o=np.zeros_like(self.q), log_sum=np.zeros((self.n, self.h)), dq=np.zeros_like(self.q), dk=np.zeros_like(self.k),
                   dv=np.zeros_like(self.v), dkeys=self.dkeys.copy(), dvalues=self.dvalues.copy())
        for first, n, slot, phase in self.segments:
            rows = slice(first, first + n)
            seen = np.tril(np.ones((n, phase + n), bool), phase)
            for head in range(self.h):
                own, kv = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
                k = np.concatenate([self.keys[slot, :phase, kv], self.k[rows, kv]])
                v = np.concatenate([self.values[slot, :phase, kv], self.v[rows, kv]])
                q, dout = self.q[rows, own], self.dout[rows, own]
                x = np.where(seen, q @ k.T / np.sqrt(d), -np.inf)
                top = x.max(-1, keepdims=True, initial=-1e300)
                w = np.exp(x - top)
                total = w.sum(-1, keepdims=True)
                w /= total
                o = w @ v
                out["o"][rows, own], out["log_sum"][rows, head] = o, (top + np.log(total))[:, 0]
                dx = w * (dout @ v.T - (dout * o).sum(-1, keepdims=True)) / np.sqrt(d)
                out["dq"][rows, own] = dx @ k
                for name, past, sums in (("dk", "dkeys", dx.T @ q), ("dv", "dvalues", w.T @ dout)):
                    out[past][slot, :phase + n, kv] += sums
        for first, n, slot, phase in self.segments:
            for name, past in (("dk", "dkeys"), ("dv", "dvalues")):
                out[name][first:first + n] = out[past][slot, phase:phase + n]
                out[past][slot, phase:phase + n] = 0
        return out


class Runner:
    def __init__(self, device, case, plain, splits=1, past=True):
        self.dev, self.c, self.plain, self.splits, self.past = device, case, plain, splits, past
        c, up = case, device.upload
        self.element = (lambda x: np.asarray(x, np.float32)) if c.f32 else to_bits
        self.back = (lambda x: x) if c.f32 else from_bits
        self.item, self.kind = (4, "f32") if c.f32 else (2, "bf16")
        # q, k and v are column blocks of one matrix, as are their gradients.
        self.widths = [c.h * c.d, c.g * c.d, c.g * c.d]
        self.width = sum(self.widths) + 16
        wide = np.full((c.n, self.width), np.nan)
        at = 8
        for x, w in zip((c.q, c.k, c.v), self.widths):
            wide[:, at:at + w] = x
            at += w
        self.held = [up(self.element(x)) for x in (wide, c.dout, c.keys, c.values)]
        of_row = np.concatenate([np.full(n, i, np.uint32) for i, (_, n, _, _) in enumerate(c.segments)] + [np.zeros(0, np.uint32)])
        self.tables = [up(np.array(c.segments, np.uint32).reshape(-1, 4)), up(of_row if len(of_row) else np.zeros(1, np.uint32))]

    def params(self):
        c, a, p = self.c, self.dev.address, Params()
        starts = [a(self.held[0]) + self.item * x for x in np.cumsum([8] + self.widths[:2]).tolist()]
        p.q, p.k, p.v = starts
        p.q_stride = p.k_stride = p.v_stride = self.width
        p.dout, p.dout_stride, p.keys, p.values = a(self.held[1]), c.h * c.d, a(self.held[2]), a(self.held[3])
        p.segments, p.of_row = map(a, self.tables)
        p.cache_stride, p.capacity, p.dcapacity = c.g * c.d, c.capacity, c.capacity
        p.heads, p.kv_heads, p.head_dim, p.count, p.rows = c.h, c.g, c.d, len(c.segments), c.n
        p.together, p.splits, p.scale = 3, self.splits, 1 / np.sqrt(c.d)
        return p

    def poison(self, *shape, element=True):
        x = np.full(shape, np.nan, np.float32)
        return self.dev.upload(self.element(x) if element else x)

    def launch(self, name, p, blocks, threads, shared):
        if blocks:
            self.dev.launch(name, p, blocks, threads, shared)

    def run(self, backward):
        c, a, down = self.c, self.dev.address, self.dev.download
        n, block = len(c.segments), rows_of_block(c.d)
        longest, forward, queries, keys = max(n for _, n, _, _ in c.segments), *shared_bytes(c.d)
        o, log_sum, delta = self.poison(c.n, c.h * c.d + 8), self.poison(c.n, c.h, element=False), self.poison(c.n, c.h, element=False)
        p = self.params()
        p.o, p.o_stride, p.log_sum, p.delta = a(o), c.h * c.d + 8, a(log_sum), a(delta)
        if self.plain:
            self.launch(f"attention_forward_plain_{self.kind}", p, ceil(c.n * c.h, 4), 128, 4 * 1024)
        elif self.splits or longest == 1:
            parts = self.poison(c.n * c.h * max(self.splits, 1), c.d + 2, element=False)
            p.parts, p.splits = a(parts), max(self.splits, 1)
            self.launch("attention_decode", p, n * c.h * p.splits, 128, 16 * (c.d + 2))
            if p.splits > 1:
                self.launch("attention_join", p, n * c.h, 128, 0)
        else:
            p.blocks = ceil(longest, block)
            self.launch("attention_forward", p, n * c.h * p.blocks, 128, forward)
        got = self.back(down(o))
        assert np.isnan(got[:, c.h * c.d:]).all(), "o was written outside its columns"
        out = dict(o=got[:, :c.h * c.d], log_sum=down(log_sum))
        if not backward:
            return out
        dwide = self.poison(c.n, self.width)
        dpast = [self.dev.upload(self.element(x)) for x in (c.dkeys, c.dvalues)]
        p.dq, p.dk, p.dv = (a(dwide) + self.item * x for x in np.cumsum([8] + self.widths[:2]).tolist())
        p.dq_stride = p.dk_stride = p.dv_stride = self.width
        if self.past:
            p.dkeys, p.dvalues = map(a, dpast)
        span = max(n + (phase if self.past else 0) for _, n, _, phase in c.segments)
        if self.plain:
            self.launch(f"attention_queries_plain_{self.kind}", p, ceil(c.n * c.h, 4), 128, 8 * 1024)
            p.blocks = ceil(span, 4)
            self.launch(f"attention_keys_plain_{self.kind}", p, n * c.g * p.blocks, 128, 8 * 1024)
        else:
            p.blocks = ceil(longest, block)
            self.launch("attention_backward_queries", p, n * c.h * p.blocks, 128, queries)
            p.blocks = ceil(span, block)
            self.launch("attention_backward_keys", p, n * c.g * p.blocks, 128, keys)
        wide = self.back(down(dwide))
        assert np.isnan(wide[:, :8]).all() and np.isnan(wide[:, self.width - 8:]).all(), "a gradient was written outside its columns"
        at = 8
        for name, w in zip(("dq", "dk", "dv"), self.widths):
            out[name] = wide[:, at:at + w]
            at += w
        out.update(dkeys=self.back(down(dpast[0])), dvalues=self.back(down(dpast[1])))
        return out


def check(device, d, heads, kv_heads, segments, seed, plain=False, f32=False, splits=0, past=True, large=1.0):
    case = Case(d, heads, kv_heads, segments, seed, f32, large)
    runner, backward = Runner(device, case, plain, splits, past), splits == 0
    got, again, want = runner.run(backward), runner.run(backward), case.reference()
    bitwise = all(np.array_equal(got[n].view(np.uint32), again[n].view(np.uint32)) for n in got)
    if not past:  # nothing follows: without what later passes say, and what came before gets nothing
        for first, n, slot, phase in case.segments:
            for name, given in (("dk", case.dkeys), ("dv", case.dvalues)):
                want[name][first:first + n] -= given[slot, phase:phase + n]
        want.update(dkeys=case.dkeys, dvalues=case.dvalues)
    errors = {n: error(got[n], want[n]) for n in got}
    limit = F32 if f32 else PLAIN if plain else LIMIT * max(1.0, large**0.5)
    ok = bitwise and all(e < (1e-5 * max(large, 1) if n == "log_sum" else limit) for n, e in errors.items())
    print(json.dumps(dict(check="attention", d=d, heads=[heads, kv_heads], segments=segments, plain=plain, f32=f32, splits=splits, past=past,
                          large=large, ok=bool(ok), bitwise=bool(bitwise), errors={n: float(f"{e:.2g}") for n, e in errors.items()})), flush=True)
    return ok


def run_checks(args):
    ok = True
    for d in args.d:
        defines = [f"HEAD_DIM={d}"]
        device = Emulator(defines[0], "attention.cpp") if args.emulate else Gpu(
            [f"attention/{name}.cu" for name in ("forward", "backward", "decode", "plain")], defines)
        short = [(1, 0), (15, 0), (16, 3), (17, 0), (63, 70), (0, 5), (130, 61)]
        long = [(200, 0)] if args.emulate else [(1040, 0), (1040, 1000), (5, 3000)]
        cases = [
            (3, 3, short, {}), (4, 2, [(70, 0), (65, 129)], {}), (3, 1, [(129, 64)], dict(past=False)), (2, 2, long, {}),
            (2, 1, [(80, 0)], dict(large=30.0)), (2, 2, short, dict(plain=True)), (3, 1, short[:5], dict(plain=True, f32=True, past=False)),
            (4, 2, [(1, 0), (1, 5), (1, 63), (1, 64), (1, 300)], dict(splits=1)), (2, 2, [(1, 0), (1, 17), (1, 333)], dict(splits=4)),
        ]
        for heads, kv_heads, segments, how in cases:
            ok &= check(device, d, heads, kv_heads, segments, 1, **how)
            if args.stop and not ok:
                return False
    return ok


class Bench:
    """Kernels on random inputs: sequences of one length, or one token of each after `T` tokens."""

    def __init__(self, device, B, T, H, G, d, decode):
        torch, self.dev, self.decode, self.shape = device.torch, device, decode, (B, T, H, G, d)
        torch.manual_seed(0)
        kinds, n = dict(device="cuda", dtype=torch.bfloat16), B if decode else B * T
        wide = (H + 2 * G) * d
        x, dx, dout, o = torch.randn(n, wide, **kinds), torch.empty(n, wide, **kinds), torch.randn(n, H * d, **kinds), torch.empty(n, H * d, **kinds)
        sums = torch.empty(2, n, H, device="cuda")
        cache = torch.randn(2, B, T + 64 if decode else 1, G * d, **kinds)
        rows = 1 if decode else T
        table = torch.tensor([[b * rows, rows, b, T if decode else 0] for b in range(B)], dtype=torch.int32, device="cuda")
        p = self.p = Params()
        p.q, p.k, p.v = (x.data_ptr() + 2 * i for i in (0, H * d, (H + G) * d))
        p.dq, p.dk, p.dv = (dx.data_ptr() + 2 * i for i in (0, H * d, (H + G) * d))
        p.q_stride = p.k_stride = p.v_stride = p.dq_stride = p.dk_stride = p.dv_stride = wide
        p.o, p.o_stride, p.dout, p.dout_stride, p.log_sum, p.delta = o.data_ptr(), H * d, dout.data_ptr(), H * d, sums[0].data_ptr(), sums[1].data_ptr()
        p.keys, p.values, p.cache_stride, p.capacity, p.segments = cache[0].data_ptr(), cache[1].data_ptr(), G * d, cache.shape[2], table.data_ptr()
        p.heads, p.kv_heads, p.head_dim, p.count, p.rows, p.blocks, p.scale = H, G, d, B, n, ceil(rows, rows_of_block(d)), d**-0.5
        # As cuda.rs chooses.
        p.together = min(max((24 << 20) // (4 * d * max(T, 1)), 1), B * H)
        p.splits = min(max(ceil(4 * torch.cuda.get_device_properties(0).multi_processor_count, B * H), 1), ceil(p.capacity, 128), 64)
        parts = torch.empty(n * H * p.splits, d + 2, device="cuda")
        p.parts = parts.data_ptr()
        self.held = [x, dx, dout, o, sums, cache, table, parts]

    def forward(self):
        B, T, H, G, d = self.shape
        if self.decode:
            self.dev.launch("attention_decode", self.p, B * H * self.p.splits, 128, 16 * (d + 2))
            if self.p.splits > 1:
                self.dev.launch("attention_join", self.p, B * H, 128, 0)
        else:
            self.dev.launch("attention_forward", self.p, B * H * self.p.blocks, 128, shared_bytes(d)[0])

    def queries(self):
        B, T, H, G, d = self.shape
        self.dev.launch("attention_backward_queries", self.p, B * H * self.p.blocks, 128, shared_bytes(d)[1])

    def keys(self):
        B, T, H, G, d = self.shape
        self.dev.launch("attention_backward_keys", self.p, B * G * self.p.blocks, 128, shared_bytes(d)[2])

    def backward(self):
        self.queries()
        self.keys()


def run_bench(args):
    for shape, decode in [(s, False) for s in args.shape] + [(s, True) for s in args.decode]:
        B, T, H, G, d = shape
        device = Gpu([f"attention/{name}.cu" for name in ("forward", "backward", "decode")], [f"HEAD_DIM={d}", *args.defines])
        bench = Bench(device, *shape, decode)
        line = dict(bench="attention", B=B, T=T, heads=[H, G], d=d, defines=args.defines, device=device.torch.cuda.get_device_name())
        if decode:
            ms = device.milliseconds(device.graph(bench.forward, 20)) / 20
            line.update(decode_ms=round(ms, 5), splits=bench.p.splits, GBps=round(4 * B * G * d * T / ms / 1e6))
        else:
            flops = 4 * B * H * d * T * (T + 1) / 2
            bench.forward()
            for name, call, products in (("forward", bench.forward, 1), ("queries", bench.queries, 1.5), ("keys", bench.keys, 2), ("backward", bench.backward, 2.5)):
                ms = device.milliseconds(call)
                line.update({f"{name}_ms": round(ms, 4), f"{name}_tflops": round(products * flops / ms / 1e9)})
        line["registers"] = {n.removeprefix("attention_"): r for n, r in device.registers.items()}
        print(json.dumps(line), flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="command", required=True)
    p = sub.add_parser("check", help="compare all outputs and gradients with NumPy")
    p.add_argument("--emulate", action="store_true", help="on the CPU")
    p.add_argument("--d", type=int, nargs="+", default=[64])
    p.add_argument("--stop", action="store_true", help="at the first failure")
    p = sub.add_parser("bench", help="time them on random inputs")
    shape = lambda text: tuple(int(x) for x in text.split(","))
    p.add_argument("--shape", type=shape, nargs="*", default=[(8, 2048, 12, 12, 64)], help="B,T,heads,kv heads,d")
    p.add_argument("--decode", type=shape, nargs="*", default=[], help="the same: a token of each sequence after T")
    p.add_argument("-D", dest="defines", action="append", default=[], help="for example HELD=4")
    args = parser.parse_args()
    sys.exit(0 if (run_checks if args.command == "check" else run_bench)(args) else 1)


if __name__ == "__main__":
    main()

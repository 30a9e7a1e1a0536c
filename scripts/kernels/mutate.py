"""Shows that the checks see a wrong kernel: plants one error at a time in a copy of the sources and expects the emulator's check to
fail.

    python scripts/kernels/mutate.py [--jobs N] [FILE ...]     # forward.cu, ttt_mlp/forward.cu, tiles.cuh, ...; all by default
"""
import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = os.path.join(HERE, "..", "..", "crates", "ttt", "src")

# file, text, replacement: a dropped term, a swapped index, a missing barrier or wait.
MUTATIONS = [
    ("forward.cu", "scale * ((gamma[i] * gamma[i] - mean_gx) * xhat", "scale * (gamma[i] * gamma[i] * xhat"),
    ("forward.cu", "+ (wr[i] - mean_g))", "+ wr[i])"),
    ("forward.cu", "fold(l.half, sums[1], sums[4])", "fold(l.half, sums[4], sums[1])"),
    ("forward.cu", "rs * lr;", "rs;"),
    ("forward.cu", "neg_tau[i / 4 * 2 + i % 2] * y", "neg_tau[i % 4] * y"),
    ("forward.cu", "const float neg_tau_last = -p.tok[K - 1]", "const float neg_tau_last = -p.tok[0]"),
    ("forward.cu", "out[i] = q[i] + (", "out[i] = ("),
    ("forward.cu", "if (m == 0 && position < phase)", "if (false)"),
    ("forward.cu", "if (!restored) copy", "copy"),
    ("forward.cu", "phase * 2 * D; i", "phase * D; i"),
    ("forward.cu", "if (CHAIN) copy_async_wait<Shared::STAGES - 3>();", "if (CHAIN) copy_async_wait<Shared::STAGES - 2>();"),
    ("tiles.cuh", "mma_k16(w[2 * s + 1], x, r[2], r[3]);", "mma_k16(w[2 * s + 1], x, r[3], r[2]);"),
    ("tiles.cuh", "mma_k16(b, x, ONES, ONES);", ""),
    ("tiles.cuh", "low = pack_bf16(left[0], left[1]) & mask", "low = pack_bf16(left[0], left[1])"),
    ("tiles.cuh", "mma_k8(y[0], ghat[0], ghat[1], low)", "mma_k8(y[0], ghat[1], ghat[0], low)"),
    ("backward.cu", "scale_columns(update, ghat, tau_last)", "scale_columns(update, ghat, 0.0f)"),
    ("backward.cu", "PREPARE ? 0.0f : dg[i / 4][i % 4] * -tau_last", "0.0f"),
    ("backward.cu", "dtok_last -=", "dtok_last +="),
    ("backward.cu", "by_1 = -rs_out * mean_p - mu_out * by_z", "by_1 = -mu_out * by_z"),
    ("backward.cu", "(by_z * zb[i] + by_1)", "by_1"),
    ("backward.cu", "mma_k16(dg[0], dzbar, m00, m10);", "mma_k16(dg[0], dzbar, m10, m00);"),
    ("backward.cu", "dgamma[i] = dz[i] * (zb[i] * rs_out - mu_out * rs_out)", "dgamma[i] = 0.0f"),
    ("backward.cu", "a2 = r * mean[1], a3 = r * mean_dgg", "a2 = r * mean[1], a3 = 0.0f"),
    ("backward.cu", "- mean_gx * a1 - a2 * mean_g)", ")"),
    ("backward.cu", "- 2.0f * mean_gx * a2)", "- mean_gx * a2)"),
    ("backward.cu", "(z_e * (gamma[i] * e[i]) +", "("),
    ("backward.cu", "dgamma[i] = u * (gamma[i] * x[i] + e[i])", "dgamma[i] = u * e[i]"),
    ("backward.cu", "dk[i / 4][i % 4] *= -tau_last; // (3)", "dk[i / 4][i % 4] *= 0.0f;"),
    ("backward.cu", "mma_k16(dk[1], dmt, q[2], q[3]);", ""),
    ("backward.cu", "mma_k16(dq[0], dm, k[0], k[1]);", ""),
    ("backward.cu", "add_outer(dw, db, dzin, tile_k, l);", "add_outer(dw, db, dzin, tile_q, l);"),
    ("backward.cu", "mma_k16(dbeta, columns, ONES, ONES);", ""),
    ("backward.cu", "checkpoint *= p.group;", ""),
    ("backward_chain.cu", "if (--until_boundary == 0)", "if (until_boundary-- == 0)"),
    ("backward_chain.cu", "d[i] = rest[i] - tau_last * d[i];", "d[i] = rest[i];"),
    ("backward_chain.cu", "add_outer(dw, db, dzbar, stage + Shared::Q, l);", ""),
    ("backward_chain.cu", "copy_async_wait<Shared::STAGES - 3>();", "copy_async_wait<Shared::STAGES - 2>();"),
    ("decode.cu", "sum += m[j] * keys[j * 2 * D + D + c]", "sum += m[j] * keys[j * 2 * D + c]"),
    ("decode.cu", "w[r][i] -= kj * u[i]", "w[r][i] += kj * u[i]"),
    ("decode.cu", "copy_async_wait<0>();", ""),
    ("ttt_mlp/mlp_tiles.cuh", "t[1] = movmatrix(a[2]), t[2] = movmatrix(a[1])", "t[1] = movmatrix(a[1]), t[2] = movmatrix(a[2])"),
    ("ttt_mlp/mlp_tiles.cuh", "- x * th * (kappa * kappa)", ""),
    ("ttt_mlp/mlp_tiles.cuh", "mma_k16(w[2 * s + 1], x, y[2], y[3]);", "mma_k16(w[2 * s + 1], x, y[3], y[2]);"),
    ("ttt_mlp/forward.cu", "slope[t][i / 4][i % 4] *= lr[i / 4][i % 2];", "slope[t][i / 4][i % 4] *= lr[0][i % 2];"),
    ("ttt_mlp/forward.cu", "l.warp == 0 ? 1.0f : 0.0f", "1.0f"),
    ("ttt_mlp/forward.cu", "mma_step(0, y[0], m2, g[0], g[1]);", "mma_step(0, y[0], m2, 0, 0);"),
    ("ttt_mlp/forward.cu", "if (complete) b2 = 2", "if (false) b2 = 2"),
    ("ttt_mlp/forward.cu", "            put_w2();\n", ""),
    ("ttt_mlp/forward.cu", "if (m == 0 && phase > 0) {", "if (false) {"),
    ("ttt_mlp/forward.cu", "scale_columns(ghat1[t], ghat1[t], neg_tau_last);", ""),
    ("ttt_mlp/backward.cu", "add_product(w1[0], update, tile_k, l);", ""),
    ("ttt_mlp/backward.cu", "if (commits) add_product(w2[0], x2, shared + Shared::UPDATE2, l);", ""),
    ("ttt_mlp/backward.cu", "mma_k16(dx[1], x2, cross, high);", "mma_k16(dx[1], x2, high, cross);"),
    ("ttt_mlp/backward.cu", "mma_k16(dx2[0], xbar, movmatrix(low), movmatrix(cross));", ""),
    ("ttt_mlp/backward.cu", "dtok_last -= db2[0]", "dtok_last += db2[0]"),
    ("ttt_mlp/backward.cu", "add_other(duw, 1);", "add_other(duw, 0);"),
    ("ttt_mlp/backward.cu", "add_product(dw2[0], du, shared + Shared::G2, l);", ""),
    ("ttt_mlp/backward.cu", "dghat2[i] += neg_tau_last * db2[i];", ""),
    ("ttt_mlp/backward.cu", "dx2[i / 4][i % 4] * d1[i / 4][i % 4] + curve", "dx2[i / 4][i % 4] * d1[i / 4][i % 4]"),
    ("ttt_mlp/backward.cu", "    cluster_sync(); // the last parts", "    // the last parts"),
    ("ttt_mlp/backward.cu", "        barrier_sleep(barrier(SUMS_OF_UNITS), parity);\n", ""),
    ("ttt_mlp/decode.cu", "sum += m2[j] * rows[j * ROW + D + 2 * F + c]", "sum += m1[j] * rows[j * ROW + D + 2 * F + c]"),
    ("ttt_mlp/decode.cu", "w[i][c] -= xj[i] * by[c]", "w[i][c] += xj[i] * by[c]"),
    ("ttt_mlp/decode.cu", "if (first == 0) db += by;", ""),
    ("step/product.cu", "mma_k16(sum[t], a[1], x[t][2], x[t][3]);", ""),
    ("step/product.cu", "if (BEHIND == ADD) x += bf16_f32(*y);", ""),
    ("step/product.cu", "up * (gate / (1.0f + __expf(-gate)))", "up * gate"),
    ("step/product.cu", "if (BEFORE == GATED_NORM) {\n#pragma unroll\n                for (u32 i = 0; i < 8; i++) v[i] += shift[i];", "if (BEFORE == GATED_NORM) {"),
    ("step/product.cu", "round_bf16(v[i]) * gelu(a[i])", "round_bf16(v[i]) * a[i]"),
    ("step/product.cu", "sum += (v[i] - mean) * (v[i] - mean);", "sum += v[i] * v[i];"),
    ("step/product.cu", "y[j] += taps[j][3] * now[j];", ""),
    ("step/product.cu", "v[i] *= r2 * norm.scale[i];", "v[i] *= r * norm.scale[i];"),
    ("step/product.cu", "if (at < p.k) {", "if (true) {"),
    ("step/rows.cu", "y[j] += w[3] * now[j];", ""),
    ("step/rows.cu", "store_global4(window + (i - 1) * p.cols + c, old[i]);", "store_global4(window + (i - 1) * p.cols + c, old[i - 1]);"),
    ("step/rows.cu", "if (GATED) v[i] += shift[i];", ""),
    ("step/rows.cu", "if (len == 0) return;", ""),
    ("step:decode.cu", "round_bf16(y * cosine + other * sine)", "round_bf16(y * cosine - other * sine)"),
    ("step:decode.cu", "logit += parts[i];", "logit = parts[i];"),
    ("step:decode.cu", "own[(i - 1) * width] = own[i * width];", ""),
    ("step:decode.cu", "own[(taps - 2) * width] = next;", ""),
    ("step:decode.cu", "p.taps_of[0] ? 1 : 2", "p.taps_of[0] ? 2 : 1"),
    ("sample/kernel.cu", "if (known && key >> (32 - known) != prefix) continue;", ""),
    ("sample/kernel.cu", "for (u32 w = 0; w < WARPS; w++) best = s.of_warp[w] > best ? s.of_warp[w] : best;", ""),
    ("sample/kernel.cu", "bound -= above;\n    for", "for"),
    ("sample/kernel.cu", "- logf(exponentials)", ""),
    ("sample/kernel.cu", "d.drawn = drawn + 1;", ""),
]


def place(file):
    """Folder and file of a source, and the check that sees it: `step:` is TTT-Linear's kernel for a token seen by the step's check."""
    if file.startswith("step:"):
        return "ttt_linear", file[5:], "step"
    folder, name = file.split("/") if "/" in file else ("ttt_linear", file)
    return folder, name, "step" if folder in ("step", "sample") else folder


class Copy:
    """Sources and checks that may be changed."""

    def __init__(self):
        self.root = tempfile.TemporaryDirectory()
        root = self.root.name
        for folder in ("device/cuda", "ops/ttt_linear", "ops/ttt_mlp", "ops/step", "ops/sample"):
            shutil.copytree(os.path.join(SOURCES, folder), os.path.join(root, "crates", "ttt", "src", folder))
        shutil.copytree(HERE, os.path.join(root, "scripts", "kernels"))

    def fails(self, check, *more):
        command = [sys.executable, os.path.join(self.root.name, "scripts", "kernels", f"{check}.py"), "check"]
        command += ["--d", "64"] if check == "step" else ["--emulate", "--d", "32", *more]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0

    def path(self, folder, name):
        return os.path.join(self.root.name, "crates", "ttt", "src", "ops", folder, name)


def plant(mutation):
    """Whether a check sees an error."""
    file, old, new = mutation
    folder, name, check = place(file)
    copy = Copy()
    path = copy.path(folder, name)
    text = open(path).read()
    assert old in text, f"{file} no longer has {old!r}"
    open(path, "w").write(text.replace(old, new, 1))
    return copy.fails(check, "--stop")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="errors planted at once")
    parser.add_argument("files", nargs="*")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.files or m[0] in args.files]
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        checks = sorted({place(file)[2] for file, _, _ in chosen})
        unchanged = [pool.submit(Copy().fails, check) for check in checks]
        planted = [pool.submit(plant, m) for m in chosen]
        for check, failed in zip(checks, unchanged):
            if failed.result():
                print(f"the unchanged kernels of {check} fail", flush=True)
                survivors += 1
        for (file, old, new), seen in zip(chosen, planted):
            survivors += not seen.result()
            print(f"{'seen' if seen.result() else 'NOT SEEN'}  {file}: {old!r} -> {new!r}", flush=True)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()

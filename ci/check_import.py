"""Checks `ttt import` on files in the official JAX format, made by flax and msgpack themselves.

    python ci/check_import.py TTT GOLDEN_DIR                needs `pip install flax msgpack numpy safetensors`
    python ci/check_import.py --fixture FILE GOLDEN_DIR     writes the fixture of crates/ttt/tests/import.rs

GOLDEN_DIR is crates/ttt/tests/fixtures/golden: parameters and results of the official JAX code under the official PyTorch names. The
parameters are put back into the JAX code's tree and written as its StreamingCheckpointer writes them (pairs of key path and
`flax.serialization.to_bytes`, float32 and bfloat16, with and without the optimizer's state, large arrays in chunks); the program TTT
imports each file and verifies the result against the golden logits, loss and gradients.
"""

import argparse
import pathlib
import subprocess
import tempfile

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
from safetensors.numpy import load_file

BLOCK = {
    "seq_norm.weight": ("seq_norm", "kernel"),
    "ffn_norm.weight": ("ffn_norm", "kernel"),
    "mlp.gate_proj.weight": ("feed_forward", "w1", "kernel"),
    "mlp.up_proj.weight": ("feed_forward", "w3", "kernel"),
    "mlp.down_proj.weight": ("feed_forward", "w2", "kernel"),
    "conv.norm.weight": ("conv", "conv_norm", "kernel"),
    "conv.conv.weight": ("conv", "conv1", "kernel"),
    "conv.conv.bias": ("conv", "conv1", "bias"),
}
LAYER = {
    **{f"{c}_proj.weight": (f"w{c}", "kernel") for c in "qkvog"},
    **{f"conv_{c}.weight": (f"conv_{c}", "kernel") for c in "qk"},
    **{f"conv_{c}.bias": (f"conv_{c}", "bias") for c in "qk"},
    "learnable_token_idx": ("learnable_token_idx",),
    # Single names that hold a slash.
    "learnable_ttt_lr_weight": ("learnable_ttt_lr/kernel",),
    "learnable_ttt_lr_bias": ("learnable_ttt_lr/bias",),
    "ttt_norm_weight": ("ttt_norm/scale",),
    "ttt_norm_bias": ("ttt_norm/bias",),
    "post_norm.weight": ("post_norm", "scale"),
    "post_norm.bias": ("post_norm", "bias"),
    "W1": ("ttt_dense_0",),
    "b1": ("ttt_bias_0",),
    "W2": ("ttt_dense_1",),
    "b2": ("ttt_bias_1",),
}


def jax_entry(name, x):
    """Path and array of the JAX tree for an official PyTorch name."""
    if name == "model.embed_tokens.weight":
        return ("model", "wte", "embedding"), x
    if name == "model.norm.weight":
        return ("model", "ln_f", "kernel"), x
    if name == "lm_head.weight":
        return ("lm_head", "kernel"), x.T
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    inside = rest.removeprefix("seq_modeling_block.")
    path = BLOCK[rest] if inside == rest else ("seq_modeling_block", *LAYER[inside])
    if inside == "learnable_ttt_lr_weight":
        x = x.transpose(0, 2, 1)
    elif x.ndim == 3 and inside.endswith(".weight"):
        x = x.transpose(2, 1, 0)
    elif x.ndim == 2 and inside.endswith("_proj.weight"):
        x = x.T
    return ("model", "h", layer, *path), np.ascontiguousarray(x)


def write(path, params, train_state, dtype):
    """As StreamingCheckpointer.save_train_state_to_file."""
    packer = msgpack.Packer()
    entries = [jax_entry(name, x.astype(dtype)) for name, x in params.items()]
    if train_state:
        moments = [(("opt_state", "1", "0", kind, "params", *key), x) for kind in ("mu", "nu") for key, x in entries]
        count = (("opt_state", "1", "0", "count"), np.asarray(7, np.int32))
        entries = [(("step",), np.asarray(7, np.int32)), *((("params", "params", *key), x) for key, x in entries), count, *moments]
    with open(path, "wb") as out:
        for key, x in entries:
            out.write(packer.pack((key, flax.serialization.to_bytes(x))))


def golden(path):
    params = {k.removeprefix("param."): v for k, v in load_file(path).items() if k.startswith("param.")}
    return {k: v for k, v in params.items() if k != "lm_head.weight"}


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--fixture", help="write one small file and stop")
    args.add_argument("paths", nargs="+", help="TTT GOLDEN_DIR")
    args = args.parse_args()
    folder = pathlib.Path(args.paths[-1])
    if args.fixture:
        write(args.fixture, golden(folder / "linear_mamba_preconv.safetensors"), False, np.float32)
        return
    ttt = args.paths[0]
    checked = 0
    for reference in sorted(folder.glob("*.safetensors")):
        params = golden(reference)
        for train_state in (False, True):
            for dtype in (np.float32, ml_dtypes.bfloat16):
                # Every array above 4 KiB in chunks, and none.
                for chunk in (4096, 2**30):
                    flax.serialization.MAX_CHUNK_SIZE = chunk
                    with tempfile.TemporaryDirectory() as dir:
                        file = f"{dir}/{'streaming_train_state' if train_state else 'streaming_params'}"
                        write(file, params, train_state, dtype)
                        subprocess.run([ttt, "import", dir, f"{dir}/model"], check=True, stdout=subprocess.DEVNULL)
                        ours = load_file(f"{dir}/model/model.safetensors")
                        assert ours.keys() == params.keys(), ours.keys() ^ params.keys()
                        for name, x in params.items():
                            want = x.astype(dtype).astype(np.float32)
                            assert np.array_equal(ours[name], want), f"{reference.name}: {name}"
                        # The golden results are those of float32 weights.
                        if dtype == np.float32:
                            subprocess.run([ttt, "verify", f"{dir}/model", reference], check=True, stdout=subprocess.DEVNULL)
                    checked += 1
    print(f"{checked} files imported, every tensor equal; those in float32 give the official logits, loss and gradients")


if __name__ == "__main__":
    main()

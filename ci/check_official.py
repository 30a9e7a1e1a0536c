"""Checks model folders from outside: by the safetensors library and, where it is at hand, by the official PyTorch code.

    python ci/check_official.py FOLDER...                       needs `pip install numpy safetensors`
    python ci/check_official.py --official ttt.py FOLDER...     also `torch` and `transformers==4.41.2`

Without --official: names, shapes, types and shards are those of the official TTTForCausalLM, and all numbers are finite.
With --official (the file `ttt.py` of test-time-training/ttt-lm-pytorch): that code loads the folder without a missing or
unexpected tensor, computes finite logits, saves it again to FOLDER-official, and every tensor of that copy is the same.
"""

import argparse
import importlib.util
import json
import pathlib
import sys

import numpy as np
from safetensors import safe_open

# What TTTConfig takes for a field that config.json lacks.
DEFAULTS = dict(tie_word_embeddings=True, use_gate=False, share_qk=False, ttt_layer_type="linear", mini_batch_size=16, pre_conv=False, conv_kernel=4)


def official_shapes(config):
    """Name -> shape of the official state dict, the tied head left out."""
    c = {**DEFAULTS, **config}
    v, d, i, h = c["vocab_size"], c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    k, taps, hd = c["mini_batch_size"], c["conv_kernel"], c["hidden_size"] // c["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": [v, d], "model.norm.weight": [d]}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [v, d]
    for layer in range(c["num_hidden_layers"]):
        block = {
            "seq_norm.weight": [d],
            "ffn_norm.weight": [d],
            "mlp.gate_proj.weight": [i, d],
            "mlp.up_proj.weight": [i, d],
            "mlp.down_proj.weight": [d, i],
        }
        if c["pre_conv"]:
            block |= {"conv.norm.weight": [d], "conv.conv.weight": [d, 1, taps], "conv.conv.bias": [d]}
        ttt = {f"{name}_proj.weight": [d, d] for name in "qvo"}
        if c["use_gate"]:
            ttt["g_proj.weight"] = [d, d]
        if c["share_qk"]:
            for name in ("conv_q", "conv_k"):
                ttt |= {f"{name}.weight": [d, 1, taps], f"{name}.bias": [d]}
        else:
            ttt["k_proj.weight"] = [d, d]
        ttt |= {
            "learnable_token_idx": [k],
            "learnable_ttt_lr_weight": [h, 1, d],
            "learnable_ttt_lr_bias": [h, 1],
            "ttt_norm_weight": [h, hd],
            "ttt_norm_bias": [h, hd],
            "post_norm.weight": [d],
            "post_norm.bias": [d],
        }
        if c["ttt_layer_type"] == "mlp":
            ttt |= {"W1": [h, hd, 4 * hd], "b1": [h, 1, 4 * hd], "W2": [h, 4 * hd, hd], "b2": [h, 1, hd]}
        else:
            ttt |= {"W1": [h, hd, hd], "b1": [h, 1, hd]}
        block |= {f"seq_modeling_block.{name}": shape for name, shape in ttt.items()}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def weight_files(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = json.loads(index.read_text())["weight_map"]
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        with safe_open(file, framework="np") as f:
            expected = {name for name, at in weight_map.items() if at == file.name}
            assert set(f.keys()) == expected, f"{file}: other tensors than the index says"
    return files


def check_files(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "ttt" and config["architectures"] == ["TTTForCausalLM"], f"{folder}: {config}"
    stored = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[config["torch_dtype"]]
    shapes = {}
    for file in weight_files(folder):
        with safe_open(file, framework="np") as f:
            assert f.metadata() == {"format": "pt"}, f"{file}: {f.metadata()}"
            for name in f.keys():
                tensor = f.get_slice(name)
                assert tensor.get_dtype() == stored, f"{file}: {name} is {tensor.get_dtype()}, config.json says {stored}"
                assert name not in shapes, f"{folder}: {name} is there twice"
                shapes[name] = list(tensor.get_shape())
                # NumPy has no bf16.
                assert stored == "BF16" or np.isfinite(f.get_tensor(name)).all(), f"{file}: {name} is not finite"
    expected = official_shapes(config)
    for name in sorted(expected.keys() | shapes.keys()):
        assert shapes.get(name) == expected.get(name), f"{folder}: {name} is {shapes.get(name)}, not {expected.get(name)}"
    generation = json.loads((folder / "generation_config.json").read_text())
    for token in ("bos_token_id", "eos_token_id"):
        assert generation.get(token) == config[token], f"{folder}: {token} differs in generation_config.json"
    print(f"{folder}: {len(shapes)} tensors, {stored}, names and shapes are the official ones")


def check_official(folder, ttt):
    import torch
    from safetensors.torch import load_file

    model, report = ttt.TTTForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype="auto", local_files_only=True)
    wrong = {kind: names for kind, names in report.items() if names}
    assert not wrong, f"{folder}: the official code finds {wrong}"
    ids = torch.arange(40)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model.float()(input_ids=ids).logits
    assert logits.isfinite().all(), f"{folder}: the official logits are not finite"
    copy = folder.with_name(folder.name + "-official")
    model.to(getattr(torch, json.loads((folder / "config.json").read_text())["torch_dtype"]))
    model.save_pretrained(copy)
    ours, theirs = ({n: t for file in weight_files(at) for n, t in load_file(file).items()} for at in (folder, copy))
    assert ours.keys() == theirs.keys(), f"{folder}: names differ: {ours.keys() ^ theirs.keys()}"
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), f"{folder}: {name} differs"
    print(f"{folder}: loaded by the official code, saved again to {copy}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=pathlib.Path, metavar="ttt.py")
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    ttt = None
    if args.official:
        # Its dataclasses look themselves up by module name.
        spec = importlib.util.spec_from_file_location("official_ttt", args.official)
        ttt = sys.modules["official_ttt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ttt)
    for folder in args.folders:
        check_files(folder)
        if ttt:
            check_official(folder, ttt)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Checks a Transformer folder from outside: Hugging Face's Llama loads it without a missing or unexpected tensor, and computes the
same logits, loss and gradients as `ttt verify`.

    pip install torch "transformers<5" safetensors
    target/release/ttt train model.mixer=attention --out runs/transformer train.tokens=50k eval.tokens=4k
    python ci/check_llama.py target/release/ttt runs/transformer/final
"""

import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

program, folder = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
assert isinstance(model, LlamaForCausalLM), type(model)
wrong = {key: value for key, value in report.items() if value}
assert not wrong, f"not loaded as it is: {wrong}"

torch.manual_seed(0)
input_ids = torch.randint(0, model.config.vocab_size, (2, 75))
out = model(input_ids=input_ids, labels=input_ids)
out.loss.backward()
reference = {"input_ids": input_ids.to(torch.int32), "logits": out.logits.detach(), "loss": out.loss.detach()}
for name, parameter in model.named_parameters():
    reference[f"grad.{name}"] = parameter.grad.contiguous()
with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place) / "reference.safetensors"
    save_file(reference, path)
    subprocess.run([program, "verify", folder, path], check=True)

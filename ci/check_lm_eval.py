"""lm_eval's `local-completions` against `ttt serve`: likelihoods are those of `ttt eval`, generations those of `ttt generate`.

    pip install 'lm_eval[api]' transformers
    python ci/check_lm_eval.py target/release/ttt
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from server import serving

SMALL = """model.hidden_size=32 model.intermediate_size=48 model.num_hidden_layers=2 model.num_attention_heads=2 model.vocab_size=300
train.sequence_length=32 train.batch_tokens=128 train.tokens=8k eval.tokens=512""".split()
PAIRS = [("7 green bottles", " hanging on the wall"), ("12 green", " bottles hanging"), ("12 green", " zebras"), ("3", " green")]


def main(ttt):
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)

        def run(*args):
            return subprocess.run([ttt, *args], cwd=place, check=True, capture_output=True, text=True).stdout

        ttt = str(pathlib.Path(ttt).resolve())
        (place / "text.txt").write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(400)))
        run("tokenizer", "train", "--data", "text.txt", "--vocab-size", "300", "--out", "bpe")
        run("train", "--data", "text.txt", "--tokenizer", "bpe", "--out", "m", "-q", *SMALL)
        with serving(ttt, place / "m", store=place) as (url, _):
            lm = LocalCompletionsAPI(
                base_url=url + "/v1/completions", model="m", tokenizer=str(place / "m" / "final"), tokenizer_backend="huggingface", batch_size=2
            )
            bos = [lm.tokenizer.convert_tokens_to_ids("<s>")]
            ids = [[bos + lm.tok_encode(a), lm.tok_encode(b)] for a, b in PAIRS]
            scores = lm._loglikelihood_tokens([(pair, *tokens) for pair, tokens in zip(PAIRS, ids)])
            for (prompt, completion), (score, _) in zip(PAIRS, scores):
                (place / "one.jsonl").write_text(json.dumps({"prompt": prompt, "completion": completion}))
                judged = json.loads(run("eval", "m", "--data", "one.jsonl", "--json", "--no-inner"))
                assert abs(score + judged["loss"] * judged["tokens"]) < 1e-3, (prompt, completion, score, judged)

            # The likeliest continuation is known to be that, and has the likelihood that it was written with.
            prompt = bos + lm.tok_encode("20 green")
            written = json.loads(run("generate", "m", "--json", "-n", "12", "--no-eos", "--temperature", "0", "--prompt-tokens", ",".join(map(str, prompt))))
            ((score, greedy),) = lm._loglikelihood_tokens([(("", ""), prompt, written["tokens"])])
            assert greedy and abs(score - sum(written["logprobs"])) < 1e-3, (score, written["logprobs"])
            other = written["tokens"][:5] + [written["tokens"][5] ^ 1] + written["tokens"][6:]
            ((worse, greedy),) = lm._loglikelihood_tokens([(("", ""), prompt, other)])
            assert not greedy and worse < score

            ask = lambda kind, i, *arguments: Instance(kind, {}, arguments, i)
            pairs = lm.loglikelihood([ask("loglikelihood", i, *pair) for i, pair in enumerate(PAIRS)])
            assert len(pairs) == len(PAIRS) and pairs[1][0] > pairs[2][0], "bottles are likelier than zebras"
            (rolling,) = lm.loglikelihood_rolling([ask("loglikelihood_rolling", 0, "5 green bottles hanging on the wall\n")])
            assert rolling < 0
            texts = lm.generate_until([ask("generate_until", i, a, {"until": ["\n"], "max_gen_toks": 8}) for i, (a, _) in enumerate(PAIRS)])
            for (prompt, _), text in zip(PAIRS, texts):
                wanted = run("generate", "m", "-n", "8", "--temperature", "0", "--prompt-tokens", ",".join(map(str, lm.tok_encode(prompt))), "--json")
                assert text == json.loads(wanted)["text"].split("\n")[0], (prompt, text, wanted)
    print("lm_eval works against ttt serve")


if __name__ == "__main__":
    main(*sys.argv[1:])

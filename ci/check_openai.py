"""The official `openai` package against `ttt serve`.

    pip install openai
    python ci/check_openai.py target/release/ttt runs/tiny
"""

import json
import pathlib
import shutil
import sys
import tempfile

import openai

from server import serving

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def with_template(model, place):
    """The model in a folder that has a chat template."""
    model = pathlib.Path(model)
    folder = model / "final" if (model / "final").is_dir() else model
    copy = shutil.copytree(folder, place / "chat")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return copy


def main(ttt, model):
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        with serving(ttt, with_template(model, place), "--slots", "4", store=place, env={"TTT_API_KEY": "secret"}) as (url, _):
            client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
            name = client.models.list().data[0].id
            assert client.models.retrieve(name).owned_by == "ttt"

            greedy = dict(model=name, prompt="fn main() {", max_tokens=20, temperature=0)
            whole = client.completions.create(**greedy, logprobs=2)
            assert whole.usage.completion_tokens == 20 and whole.choices[0].finish_reason == "length", whole
            assert len(whole.choices[0].logprobs.token_logprobs) == 20
            streamed = list(client.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
            assert "".join(piece.choices[0].text for piece in streamed[:-1]) == whole.choices[0].text
            assert streamed[-1].usage.completion_tokens == 20
            again = client.completions.create(**greedy)
            assert again.usage.prompt_tokens_details.cached_tokens == 0, "eleven tokens are not worth a snapshot"
            several = client.completions.create(model=name, prompt=["a", "b"], n=2, max_tokens=3, seed=1)
            assert [choice.index for choice in several.choices] == [0, 1, 2, 3]

            messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
            chat = client.chat.completions.create(
                model=name, messages=messages, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=2
            )
            message = chat.choices[0].message
            assert message.role == "assistant" and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2, chat
            pieces = client.chat.completions.create(
                model=name, messages=messages, max_completion_tokens=12, temperature=0, stream=True
            )
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == message.content
            longer = messages + [{"role": "assistant", "content": message.content}, {"role": "user", "content": "And then?"}]
            second = client.chat.completions.create(model=name, messages=longer, max_completion_tokens=2)
            assert second.usage.prompt_tokens_details.cached_tokens >= 38, second.usage

            kept = client.completions.create(**greedy, extra_body={"save_state": "main"})
            rest = client.completions.create(
                model=name, prompt="", max_tokens=5, temperature=0, extra_body={"state_id": kept.choices[0].state_id}
            )
            together = client.completions.create(**{**greedy, "max_tokens": 25})
            assert kept.choices[0].text + rest.choices[0].text == together.choices[0].text

            for wrong, error in [
                (dict(model="gpt-4", prompt="a"), openai.NotFoundError),
                (dict(model=name, prompt="a", temperature=-1), openai.BadRequestError),
                (dict(model=name, prompt="a", logit_bias={"1": 2}), openai.BadRequestError),
            ]:
                try:
                    client.completions.create(**wrong)
                    raise SystemExit(f"{wrong} was accepted")
                except error as refused:
                    assert refused.body["message"], refused
            try:
                openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()
                raise SystemExit("a wrong key was accepted")
            except openai.AuthenticationError:
                pass
    print("the openai package works against ttt serve")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`ttt serve` with its states in an S3 store: two servers continue one conversation, and one that is killed loses nothing.

    pip install 'moto[s3,server]'
    python ci/check_s3.py target/release/ttt runs/tiny
"""

import pathlib
import sys
import tempfile

import boto3
from moto.server import ThreadedMotoServer

from server import call, serving

SAID = ["fn main() {", "\n    let x = ", ";\n    for i in ", "}\n"]


def turn(url, state, said):
    body = {"prompt": said, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "save_state": True}
    choice = call(url, "/v1/completions", {**body, **({"state_id": state} if state else {})})["choices"][0]
    return choice["text"], choice["state_id"]


def main(ttt, model):
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    s3.start()
    host, port = s3.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    client.create_bucket(Bucket="states")
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        options = dict(env=env)
        address = "s3://states/some/prefix"
        with serving(ttt, model, "--store", address, store=place / "1", **options) as (one, first):
            with serving(ttt, model, "--store", address, store=place / "2", **options) as (two, _):
                alone, state = [], None
                for said in SAID:
                    text, state = turn(one, state, said)
                    alone.append(text)
                between, state = [], None
                for i, said in enumerate(SAID):
                    text, state = turn([one, two][i % 2], state, said)
                    between.append(text)
                assert alone == between, (alone, between)
                listed = call(two, "/v1/states")["data"]
                assert len(listed) == 8 and listed == call(one, "/v1/states")["data"]
                first.kill()
                first.wait()
                # What the dead one kept, the other goes on from; what it deletes is gone.
                assert turn(two, state, "x")[0] == turn(two, state, "x")[0]
                call(two, f"/v1/states/{state}", method="DELETE")
                assert len(call(two, "/v1/states")["data"]) == 9
        names = [o["Key"] for o in client.list_objects_v2(Bucket="states")["Contents"]]
        assert len(names) == 18 and all(name.startswith("some/prefix/open/") for name in names), names
        assert not any(s["id"] in name for s in listed for name in names), "ids are in no name"
    s3.stop()
    print("two servers continued one conversation through an S3 store")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A running `ttt serve`, for the checks in this folder."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import urllib.request


@contextlib.contextmanager
def serving(ttt, model, *args, store, env=None):
    """Starts a server on a free port with all its files in `store`; gives its address and process."""
    store = pathlib.Path(store)
    line = [ttt, "serve", model, "--port", "0", "--snapshot-dir", store / "snapshots", *args]
    if "--store" not in args:
        line += ["--store", store / "states"]
    process = subprocess.Popen([str(a) for a in line], stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    try:
        for text in process.stdout:
            if "listening on" in text:
                break
        else:
            raise SystemExit(f"the server did not start: {line}")
        yield text.split()[-1], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def call(url, path, body=None, method=None):
    """A JSON request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())

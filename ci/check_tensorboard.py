#!/usr/bin/env python3
"""Reads the event files of a run with TensorBoard's own reader and compares them with the run's metrics.jsonl.

    pip install tensorboard
    cargo test -p ttt --test run_files                  # writes target/tmp/run_files
    python ci/check_tensorboard.py target/tmp/run_files

A run folder has metrics.jsonl and events/. Exits with 1 and the first difference.
"""

import collections
import json
import math
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event


def expected(lines):
    """{tag: [(step, value)]} that the lines of metrics.jsonl stand for."""
    tags = collections.defaultdict(list)
    for line in lines:
        record = json.loads(line)
        split = record["split"]
        speed = "speed" if split == "train" else "speed_validation"
        names = {
            "loss": f"loss/{split}",
            "bits_per_byte": f"bits_per_byte/{split}",
            "lr": "optimizer/lr",
            "grad_norm": "optimizer/grad_norm",
            "tokens_per_second": f"{speed}/tokens_per_second",
            "mfu": f"{speed}/mfu",
            "memory_bytes": "memory/bytes",
        }
        for key, tag in names.items():
            if key in record:
                tags[tag].append((record["step"], record[key]))
        for layer, losses in enumerate(record.get("inner", [])):
            for key, value in losses.items():
                tags[f"inner/{key}/layer_{layer:02}"].append((record["step"], value))
    return dict(tags)


def same(read, written):
    """Whether a float32 of an event file is the number of a line; what is not finite is null there."""
    if written is None:
        return not math.isfinite(read)
    return read == struct.unpack("f", struct.pack("f", written))[0]


def main(folder):
    for path in sorted((folder / "events").iterdir()):
        # The raw loader checks both checksums of every record.
        events = [Event.FromString(data) for data in RawEventFileLoader(str(path)).Load()]
        assert events[0].file_version == "brain.Event:2", f"{path}: no file version"
        assert events[0].wall_time > 1.5e9, f"{path}: wall time {events[0].wall_time}"
        print(f"{path.name}: {len(events)} events")

    accumulator = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = expected((folder / "metrics.jsonl").read_text().splitlines())
    # The reader turns simple values into tensors when it migrates old events, or leaves them scalars, by version.
    as_scalars = bool(accumulator.Tags()["scalars"])
    found = accumulator.Tags()["scalars" if as_scalars else "tensors"]
    assert sorted(found) == sorted(tags), f"tags {sorted(found)}\nare not {sorted(tags)}"
    values = 0
    for tag, written in tags.items():
        if as_scalars:
            read = [(event.step, event.value) for event in accumulator.Scalars(tag)]
        else:
            read = [(event.step, event.tensor_proto.float_val[0]) for event in accumulator.Tensors(tag)]
        assert [step for step, _ in read] == [step for step, _ in written], f"{tag}: steps {read}\nare not {written}"
        for (step, value), (_, number) in zip(read, written):
            assert same(value, number), f"{tag} at step {step}: {value} is not {number}"
        values += len(read)
    print(f"{len(tags)} tags with {values} values are as in metrics.jsonl")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(pathlib.Path(sys.argv[1]))
    except AssertionError as difference:
        sys.exit(f"error: {difference}")

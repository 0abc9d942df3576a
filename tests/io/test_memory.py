"""What loading costs: one copy of the weights and one shard, measured as the peak of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers import published

SHARDS = 6
MEASURE = """
import json, sys
from pathlib import Path
from mmdiff.io.folder import load_model

def peak():
    # Not ru_maxrss, which begins at the resident memory of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

load_model(sys.argv[1])  # everything that is imported late has been imported now
before = peak()
model = load_model(sys.argv[2])
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps({"extra": peak() - before, "weights": weights}))
"""


def sharded(folder: Path) -> int:
    """A published checkpoint in several shards of one size; returns the bytes of the largest."""
    tree = published.LLAMA | {"hidden_size": 384, "intermediate_size": 3072, "num_hidden_layers": 12}
    shapes = published.shapes("llama", tree | {"num_key_value_heads": 4})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree | {"num_key_value_heads": 4}))
    names = list(shapes)
    size = -(-len(names) // SHARDS)
    where, largest = {}, 0
    for number in range(SHARDS):
        part = {k: torch.zeros(shapes[k]) for k in names[number * size : (number + 1) * size]}
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
        largest = max(largest, sum(t.nbytes for t in part.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return largest


def test_loading_takes_one_copy_of_the_weights_and_one_shard(tmp_path):
    published.publish(tmp_path / "small", "llama")
    shard = sharded(tmp_path / "large")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["weights"] > 5 * shard, "the test needs weights that are much larger than a shard"
    slack = 16 << 20
    assert found["extra"] <= found["weights"] + shard + slack

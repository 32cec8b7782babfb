"""Loading and export where no process sees all of the params: two processes, two devices each."""

import os
import socket
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

from tests.environment import environment
from tests.tiny_models import checkpoint

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
port, rank, source, target = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jaxft.errors import JaxftError
from jaxft.hub import load_model, load_pretrained, save_pretrained

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
shardings = jax.tree.map(
    lambda axes: NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == "embed" else None for axis in axes))),
    load_model(source).logical_axes(),
    is_leaf=lambda x: isinstance(x, tuple),
)
model, params = load_pretrained(source, dtype=jnp.float32, sharding=shardings)
kernel = params["layers"]["mlp"]["up"]["kernel"]
assert not kernel.is_fully_addressable and len(kernel.addressable_shards) == 2
save_pretrained(target, model, params, max_shard_bytes=40_000)
try:
    save_pretrained(target, model, params)
except JaxftError:
    print("refused", rank)
"""


def test_export_of_params_sharded_over_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    source, target = checkpoint("qwen3"), tmp_path / "out"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(rank), str(source), str(target)],
            env=environment(2) | path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"refused {rank}" in output
    written = {}
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        assert not written.keys() & tensors.keys()
        written |= tensors
    expected = load_file(source / "model.safetensors")
    assert written.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(written[name], expected[name])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

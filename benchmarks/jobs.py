"""One training step, timed in a process of its own: what benchmarks/cpu.py and benchmarks/gpu.py are made of.

`Worker(job)` starts the process, which builds model and step, says `ready`, and then makes as many steps as it is asked
for: workers of several frameworks and methods take turns, and whatever else the machine does falls on all of them.
"""

import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process trains. `model`: the name of a preset, or the sizes of a Llama.

    threads: how many cores the process may use, 0 for all. compile: `torch.compile`. dtype: weights, activations and
    moments; LoRA's factors are float32 in both frameworks.
    """

    framework: str  # "jax" or "torch"
    model: str | dict[str, int]
    method: str
    batch: int
    seq_len: int
    device: str = "cpu"
    dtype: str = "float32"
    remat: str = "none"
    threads: int = 0
    compile: bool = False
    rank: int = 16
    options: dict[str, Any] | None = None  # of the method


def decoder_config(model: str | dict[str, int]) -> Any:
    """The DecoderConfig of a job's model."""
    from jaxft.models import DecoderConfig
    from jaxft.models.presets import preset

    return preset(model) if isinstance(model, str) else DecoderConfig("llama", **model)


def method_of(job: Job) -> Any:
    """The method of a job, with its options."""
    from jaxft.methods import build

    options = job.options or ({"rank": job.rank} if job.method == "lora" else {})
    return build({"name": job.method, **options})


def model_flops_of(job: Job) -> float:
    """The least FLOPs of a step, in any framework: from shapes alone, so nothing is computed."""
    import jax

    from jaxft.distributed.flops import model_flops
    from jaxft.methods import Probe
    from jaxft.models import LanguageModel

    model, method, rng = LanguageModel(decoder_config(job.model)), method_of(job), jax.random.key(0)
    tuned = jax.eval_shape(lambda params: method.init(rng, params, Probe()), model.abstract())
    return model_flops(model.config, tuned, job.batch, job.seq_len, "none")


# --- the process that is measured -------------------------------------------------------------------------------------


def parts_of(job: Job) -> dict[str, Any]:
    """The model, the method, the optimizer, the precision and the loss of a job."""
    import jax.numpy as jnp
    import optax

    from jaxft.models import LanguageModel
    from jaxft.training.loss import language_model_loss
    from jaxft.training.precision import Precision

    model, dtype = LanguageModel(decoder_config(job.model)), jnp.dtype(job.dtype)
    return {
        "model": model,
        "method": method_of(job),
        "optimizer": optax.adamw(1e-4),
        # The factors of LoRA are float32 masters, as in peft; what trains of the model itself has the model's dtype.
        "precision": Precision("float32" if job.method == "lora" else job.dtype, job.dtype, job.dtype),
        "loss": language_model_loss(model, remat=job.remat, compute_dtype=dtype),
    }


def compiled_step(parts: dict[str, Any], state: Any, frozen: Any, batch: Any, mesh: Any) -> tuple[Any, dict[str, Any]]:
    """The very train step that `jaxft train` runs, for these shapes, and what is known of it."""
    import jax

    from jaxft.distributed.topology import assumed_cudnn
    from jaxft.training.state import shardings_of
    from jaxft.training.step import make_train_step

    step = make_train_step(
        parts["loss"], parts["method"], parts["optimizer"], clip_norm=1.0, shardings=shardings_of(state)
    )
    begin = time.perf_counter()
    with jax.set_mesh(mesh), assumed_cudnn(mesh.devices.flat):
        compiled = step.lower(state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    return compiled, {
        "attention": "cudnn" if "__cudnn$fmha" in compiled.as_text() else "xla",
        "compile_seconds": time.perf_counter() - begin,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def compile_for(job: Job, gpu: str) -> dict[str, Any]:
    """What is known of a job's step compiled for a GPU that is not here, by name ("h200"): nothing runs."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxft.distributed import MeshConfig, hlo, make_mesh
    from jaxft.distributed.flops import kernel_flops, trained_share
    from jaxft.distributed.topology import parse_topology, topology_devices
    from jaxft.partition import combine
    from jaxft.training.state import abstract_state, tuned_of

    parts = parts_of(job)
    model, mesh = parts["model"], make_mesh(MeshConfig(), topology_devices(parse_topology(gpu)))
    state, frozen = abstract_state(
        parts["method"], model.abstract(jnp.dtype(job.dtype)), parts["optimizer"], jax.random.key(1), mesh,
        logical_axes=model.logical_axes(), precision=parts["precision"],
    )  # fmt: skip
    place = NamedSharding(mesh, PartitionSpec())
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct((job.batch, job.seq_len), kind, sharding=place) for k, kind in kinds.items()}
    compiled, facts = compiled_step(parts, state, frozen, batch, mesh)
    kernels = kernel_flops(model.config, job.batch, job.seq_len, mesh)
    taken = trained_share(combine(tuned_of(state, frozen)))
    flops = hlo.costs(hlo.parse(compiled.as_text()), taken=taken, kernels=kernels).flops
    return facts | {"flops": flops, "model_flops": model_flops_of(job)}


def prepare(job: Job) -> tuple[Callable[[], float], dict[str, Any]]:
    """As `torch_peer.prepare`, for jaxft."""
    import jax
    import numpy as np

    from jaxft.distributed import MeshConfig, make_mesh, shard_batch
    from jaxft.training.state import abstract, init_state

    if jax.default_backend() != job.device:
        raise RuntimeError(f"JAX runs on {jax.default_backend()}, not on {job.device}")
    parts = parts_of(job)
    model, mesh = parts["model"], make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.jit(lambda: model.init(jax.random.key(0), np.dtype(job.dtype)))()
    state, frozen = init_state(
        parts["method"], params, parts["optimizer"], jax.random.key(1), mesh,
        logical_axes=model.logical_axes(), precision=parts["precision"], donate=True,
    )  # fmt: skip
    del params
    rows = np.random.default_rng(0).integers(0, model.config.vocab_size, (job.batch, job.seq_len + 1), np.int32)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": np.ones(rows[:, 1:].shape, np.float32)}
    batch = shard_batch(batch, mesh)
    compiled, facts = compiled_step(parts, abstract(state), abstract(frozen), abstract(batch), mesh)
    held = [state]

    def one() -> float:
        held[0], metrics = compiled(held[0], frozen, batch)
        return float(metrics["loss"])  # waits for the device

    device = jax.devices()[0]
    facts |= {
        "parameters": sum(a.size for a in jax.tree.leaves(model.abstract())),
        "trained_parameters": sum(a.size for a in jax.tree.leaves(state.trainable)),
        "gradient_bytes": sum(a.nbytes for a in jax.tree.leaves(state.trainable)),
        "optimizer_bytes": sum(a.nbytes for a in jax.tree.leaves(state.opt_state)),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
        "peak_bytes": (lambda: device.memory_stats()["peak_bytes_in_use"]) if job.device == "gpu" else None,
    }
    if path := os.environ.get("BENCHMARK_HLO"):  # to see what was compiled
        Path(path).write_text(compiled.as_text())
    return one, facts


def serve(job: Job) -> None:
    """Read a number of steps a line from standard input; answer with their seconds (wall clock, processor), one JSON
    object a line. The first line, before any step: what is known of the job, or `{"error": ...}`."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not end up between the answers

    def answer(**found: Any) -> None:
        out.write(json.dumps(found) + "\n")
        out.flush()

    try:
        step, facts = (importlib.import_module("torch_peer").prepare if job.framework == "torch" else prepare)(job)
        peak_bytes = facts.pop("peak_bytes")
        answer(**facts)
        for line in sys.stdin:
            wall, processor, losses = [], [], []
            for _ in range(int(line)):
                begin, worked = time.perf_counter(), time.process_time()
                losses.append(step())
                wall.append(time.perf_counter() - begin)
                processor.append(time.process_time() - worked)
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak_bytes is None else peak_bytes()
            answer(wall=wall, processor=processor, losses=losses, peak_bytes=peak)
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the result of this job
        answer(error=f"{type(error).__name__}: {error}".split("\n")[0][:500])
        raise


# --- the process that measures ----------------------------------------------------------------------------------------


class JobFailed(Exception):
    """A job that ended without its figures; the message says why."""


class Worker:
    """A process that trains `job`. `facts` are known once it is ready; `step(n)` makes steps."""

    def __init__(self, job: Job, *, environment: dict[str, str] | None = None, log: Path | None = None) -> None:
        self.job = job
        command = [sys.executable, str(FOLDER / "jobs.py"), json.dumps(dataclasses.asdict(job))]
        self._log = open(log, "w") if log else subprocess.DEVNULL  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | environment_of(job) | (environment or {}),
        )  # fmt: skip
        self.facts: dict[str, Any] = {}

    def ready(self, timeout: float) -> dict[str, Any]:
        """Wait until the step is built."""
        self.facts = self._answer(timeout)
        return self.facts

    def step(self, count: int, timeout: float) -> dict[str, Any]:
        """Make `count` steps; seconds of each (`wall`, `processor`), `losses`, and the peak of memory so far."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise JobFailed(f"the process ended with status {self._process.wait()}") from None
        return self._answer(timeout)

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        in_time = timer.is_alive()
        timer.cancel()
        if not line:
            status = self._process.wait()
            raise JobFailed(f"the process ended with status {status}" if in_time else f"no answer in {timeout:.0f} s")
        found = json.loads(line)
        if "error" in found:
            raise JobFailed(found["error"])
        return found

    def close(self) -> None:
        """End the process and give its memory back."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        if not isinstance(self._log, int):
            self._log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def environment_of(job: Job) -> dict[str, str]:
    """The environment of a job's process: a platform, and as many threads as it may use."""
    found = {"JAX_PLATFORMS": "cpu" if job.device == "cpu" or job.framework == "torch" else "cuda,cpu"}
    if job.threads:
        found |= {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return found


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    if job.threads:  # before anything makes a pool: XLA has as many threads as the process has cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    serve(job)


if __name__ == "__main__":
    main()

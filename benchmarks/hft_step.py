"""Step time and memory of full tuning, HFT and LoRA, in one run: `python benchmarks/hft_step.py`.

One process builds the same decoder three times and alternates their steps, so that whatever else the machine does
falls on all of them. Printed are median step times (wall clock, and processor time of the process, which on a shared
CPU is the one to trust), ratios to full tuning, and the bytes of what training adds to the model: gradients and
optimizer state, and XLA's own count of temporary memory.

HFT saves the weight gradients, their storage and the optimizer's pass over the frozen half; forward pass and gradients
of activations cost the same. With so many tokens a step that only matmuls count the bound is 6/5 (8/7 with remat); with
few it is 2. `--tokens` moves between the two.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.distributed import MeshConfig, make_mesh, shard_batch
from jaxft.methods import full, hft, lora
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.training.loss import language_model_loss
from jaxft.training.state import abstract, init_state, shardings_of
from jaxft.training.step import make_train_step


def bytes_of(tree: object) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="tokens a step, in rows of 64")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each method")
    parser.add_argument("--remat", default="none", choices=("none", "block", "dots"))
    parser.add_argument("--compute-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", help="write the figures here too")
    options = parser.parse_args()

    heads = options.dim // 64
    config = DecoderConfig("llama", options.vocab, options.dim, 3 * options.dim, options.layers, heads, heads, 64)
    model, seq_len = LanguageModel(config), 64
    params = model.init(jax.random.key(0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(0, options.vocab, (options.tokens // seq_len, seq_len + 1), np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones(tokens[:, 1:].shape, np.float32)}
    batch = shard_batch(batch, mesh)
    loss = language_model_loss(model, remat=options.remat, compute_dtype=jnp.dtype(options.compute_dtype))

    runs, figures = {}, {}
    for name, method in (("full", full()), ("hft", hft()), ("lora", lora(rank=16))):
        optimizer = optax.adamw(1e-4)
        state, frozen = init_state(
            method, params, optimizer, jax.random.key(1), mesh, logical_axes=model.logical_axes()
        )
        step = make_train_step(loss, method, optimizer, clip_norm=1.0, shardings=shardings_of(state))
        compiled = step.lower(abstract(state), abstract(frozen), abstract(batch)).compile()
        figures[name] = {
            "trained_parameters": sum(a.size for a in jax.tree.leaves(state.trainable)),
            "gradient_bytes": 4 * sum(a.size for a in jax.tree.leaves(state.trainable)),
            "optimizer_bytes": bytes_of(state.opt_state),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }
        runs[name] = [compiled, state, frozen, []]

    for i in range(options.steps + 2):
        for run in runs.values():
            compiled, state, frozen, times = run
            begin, worked = time.perf_counter(), time.process_time()
            run[1], metrics = jax.block_until_ready(compiled(state, frozen, batch))
            if i >= 2:
                times.append((time.perf_counter() - begin, time.process_time() - worked))
        assert np.isfinite(metrics["loss"])

    base = figures["full"]
    kind = jax.devices()[0].device_kind
    print(f"{kind}: dim {options.dim}, {options.layers} layers, {options.tokens} tokens a step, "
          f"remat {options.remat}, {options.compute_dtype}, AdamW")  # fmt: skip
    print(f"{'method':8}{'trained':>10}{'step ms':>10}{'speed':>8}{'cpu ms':>10}{'speed':>8}{'grad+opt MiB':>14}"
          f"{'share':>8}{'temp MiB':>10}")  # fmt: skip
    for name, run in runs.items():
        found = figures[name]
        for i, clock in enumerate(("wall", "cpu")):
            ratios = [a[i] / b[i] for a, b in zip(runs["full"][3], run[3], strict=True)]
            found[f"{clock}_seconds"] = statistics.median(t[i] for t in run[3])
            found[f"{clock}_speed_to_full"] = statistics.median(ratios)
        memory = found["gradient_bytes"] + found["optimizer_bytes"]
        share = memory / (base["gradient_bytes"] + base["optimizer_bytes"])
        print(
            f"{name:8}{found['trained_parameters'] / 1e6:9.2f}M{1e3 * found['wall_seconds']:10.1f}"
            f"{found['wall_speed_to_full']:7.2f}x{1e3 * found['cpu_seconds']:10.1f}{found['cpu_speed_to_full']:7.2f}x"
            f"{memory / 2**20:14.1f}{share:8.3f}{found['temporary_bytes'] / 2**20:10.1f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()

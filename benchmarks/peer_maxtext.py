"""MaxText's train step compiled ahead of time by its own `train_compile`:
`python benchmarks/peer_maxtext.py full|lora`. Run by benchmarks/peers.py.

MaxText 0.2.5 trains adapters where `lora.enable_lora` says so, but only its fine-tuning trainer, which is tunix's, adds
them to the model; with `train_compile` alone there are none. So they are added here, as that trainer does: by
`lora_utils.apply_lora_to_model`.
"""

import contextlib
import sys
import tempfile
from typing import Any

import peer_job as job

job.prepare()

import jax  # noqa: E402
from flax import nnx  # noqa: E402
from maxtext.trainers.pre_train import train_compile  # noqa: E402
from maxtext.utils import lora_utils, model_creation_utils  # noqa: E402

SETTINGS = {
    "model_name": "llama3.1-8b",
    "compile_topology": "v5e-16",
    "compile_topology_num_slices": 1,
    "per_device_batch_size": job.BATCH // job.CHIPS,
    "max_target_length": job.SEQ_LEN,
    "ici_fsdp_parallelism": -1,
    "remat_policy": "full",
    "scan_layers": True,
    "attention": "autoselected",  # splash attention on a TPU, but for the few tokens with which adapters are traced
    "num_vocab_tiling": 8,  # LoRA needs 4.52 GiB with 1, 3.97 with 8, 4.05 with 32
    "dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "grad_dtype": "bfloat16",
    "mu_dtype": "bfloat16",
    "opt_type": "adamw",
    "adam_b2": job.B2,
    "adam_weight_decay": job.WEIGHT_DECAY,
    "learning_rate": job.LEARNING_RATE,
    "enable_checkpointing": False,
    "dataset_type": "synthetic",
    "run_name": "peer",
    "log_config": False,
}
LORA = {"lora.enable_lora": True, "lora.lora_rank": job.RANK, "lora.lora_alpha": float(job.RANK)}


def with_adapters(create: Any) -> Any:
    """`create_nnx_abstract_model`, whose models have adapters."""
    dummy_inputs = lora_utils._prepare_dummy_inputs

    def created(config: Any, mesh: Any, *arguments: Any, **options: Any) -> Any:
        make, _ = create(config, mesh, *arguments, **options)
        # Without a mesh no array is placed, there is none; the inputs it is traced with must divide over the mesh.
        lora_utils._prepare_dummy_inputs = lambda _: dummy_inputs(mesh)

        def make_adapted() -> nnx.Module:
            model = lora_utils.apply_lora_to_model(make(), None, config)
            nnx.pop(model, nnx.Intermediate)  # what tracing left in it, as MaxText's fine-tuning trainer does
            return model

        return make_adapted, nnx.eval_shape(make_adapted)

    return created


def main(method: str) -> None:
    compile_step = train_compile.jit_and_compile

    def timed(step: Any, inputs: Any, *arguments: Any) -> Any:
        clock = job.Clock()
        compiled = compile_step(step, inputs, *arguments)
        seconds = clock.read()
        trained = nnx.LoRAParam if method == "lora" else nnx.Param
        held = jax.tree.leaves(inputs[0].filter(trained) if hasattr(inputs[0], "filter") else inputs[0])
        job.report(
            compiled,
            seconds,
            "scanned layers; remat_policy full; fsdp 16; splash attention; num_vocab_tiling 8; all bfloat16",
            ("maxtext", "flax"),
            trained_parameters=sum(a.size for a in held),
        )
        return compiled

    train_compile.jit_and_compile = timed
    if method == "lora":
        model_creation_utils.create_nnx_abstract_model = with_adapters(model_creation_utils.create_nnx_abstract_model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = SETTINGS | (LORA if method == "lora" else {}) | {"base_output_directory": folder}
        train_compile.main(["train_compile", *(f"{name}={value}" for name, value in settings.items())])


if __name__ == "__main__":
    main(sys.argv[1])

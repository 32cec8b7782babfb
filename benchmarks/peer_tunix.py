"""tunix's train step (`PeftTrainer`) compiled ahead of time: `python benchmarks/peer_tunix.py full|lora llama3|qwen2`.

tunix's Llama module has no memory-saving attention; its Qwen2 module, the same but for biases of queries, keys and
values, has splash attention. Both are compiled at the shapes of Llama-3.1-8B. Run by benchmarks/peers.py.
"""

import sys

import peer_job as job

job.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import qwix  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.models.qwen2 import model as qwen2  # noqa: E402
from tunix.sft import peft_trainer, utils  # noqa: E402

PROJECTIONS = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"


def build(method: str, family: str) -> nnx.Module:
    """The model, rematerialised by layer, with adapters where `method` is lora."""
    shapes = {
        "num_layers": job.LLAMA["layers"], "vocab_size": job.LLAMA["vocab"], "embed_dim": job.LLAMA["width"],
        "hidden_dim": job.LLAMA["hidden"], "num_heads": job.LLAMA["heads"], "head_dim": job.LLAMA["head_dim"],
        "num_kv_heads": job.LLAMA["kv_heads"], "rope_theta": job.LLAMA["rope_theta"],
        "norm_eps": job.LLAMA["norm_eps"],
    }  # fmt: skip
    if family == "llama3":
        config = llama3.ModelConfig(**shapes, remat_config=llama3.RematConfig.DECODER)
        model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    else:
        config = qwen2.ModelConfig(
            **shapes, remat_config=qwen2.RematConfig.DECODER, use_flash_attention=True,
            dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
        )  # fmt: skip
        model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))
    if method == "lora":
        provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=job.RANK, alpha=float(job.RANK))
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
    return model


def placed(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """An abstract module with its own annotations as shardings, floating-point arrays in bfloat16."""
    graph, state = nnx.split(module)
    specs = nnx.get_partition_spec(state)

    def place(a: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        dtype = jnp.bfloat16 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
        return jax.ShapeDtypeStruct(a.shape, dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))

    return nnx.merge(graph, jax.tree.map(place, state, specs))


def inputs_of(x: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    """What tunix's own command line derives from tokens."""
    real = x.input_tokens != 0
    return {
        "input_tokens": x.input_tokens,
        "input_mask": x.input_mask,
        "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
    }


def main(method: str, family: str) -> None:
    devices = job.topology_devices()
    mesh = Mesh(np.array(devices).reshape(job.CHIPS, 1), ("fsdp", "tp"))
    ask = jax.devices
    jax.devices = lambda *a: devices  # tunix leaves its sharding constraints out where the first device is a CPU
    try:
        with mesh:
            compile_step(method, family, mesh)
    finally:
        jax.devices = ask


def compile_step(method: str, family: str, mesh: Mesh) -> None:
    model = placed(nnx.eval_shape(lambda: build(method, family)), mesh)
    made = {}

    def optimizer_of(model: nnx.Module) -> nnx.Optimizer:
        adamw = optax.adamw(job.LEARNING_RATE, b2=job.B2, weight_decay=job.WEIGHT_DECAY)
        config = peft_trainer.TrainingConfig(eval_every_n_steps=1, max_steps=1)
        made["trainer"] = peft_trainer.PeftTrainer(model, adamw, config).with_gen_model_input_fn(inputs_of)
        return made["trainer"].optimizer

    optimizer = placed(nnx.eval_shape(optimizer_of, model), mesh)
    shape, rows = (job.BATCH, job.SEQ_LEN), NamedSharding(mesh, PartitionSpec("fsdp"))
    batch = peft_trainer.TrainingInput(
        input_tokens=jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
        input_mask=jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows),
    )
    trained = nnx.state(model, nnx.LoRAParam if method == "lora" else nnx.Param)
    clock = job.Clock()
    step = nnx.jit(made["trainer"].create_train_step_fn(), donate_argnames=("optimizer",))  # as tunix does
    compiled = step.lower(model, optimizer, batch).compile()
    attention = "splash attention, its Qwen2 module" if family == "qwen2" else "its Llama module, no flash attention"
    job.report(
        getattr(compiled, "compiled", compiled),
        clock.read(),
        f"{attention}; remat DECODER; fsdp 16; layers unrolled; no chunked loss",
        ("google-tunix", "flax", "qwix"),
        trained_parameters=sum(a.size for a in jax.tree.leaves(trained)),
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])

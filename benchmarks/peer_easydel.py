"""EasyDeL's train step (`training_step` of its trainer) compiled ahead of time:
`python benchmarks/peer_easydel.py full|lora`. Run by benchmarks/peers.py.
"""

import os
import sys

import peer_job as job

job.prepare()
os.environ["EJKERNEL_AUTOTUNE_POLICY"] = "heuristics"  # no kernel can be timed here
os.environ["EASYDEL_AUTO"] = "0"

import jax  # noqa: E402

DEVICES = job.topology_devices()
# EasyDeL and its kernels choose by what jax says is here.
jax.devices = jax.local_devices = lambda *a, **k: DEVICES
jax.device_count = jax.local_device_count = lambda *a: len(DEVICES)
jax.default_backend = lambda: "tpu"

import easydel as ed  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from easydel.infra.base_state import EasyDeLState, _sanitize_partition_specs_for_shape_tree  # noqa: E402
from easydel.infra.loss_utils import LossConfig  # noqa: E402
from easydel.trainers.trainer._fn import training_step  # noqa: E402
from eformer.escale import get_corrected_named_sharding, match_partition_rules  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

ROWS = PartitionSpec(("dp", "fsdp"))
# Tokens whose logits are held at once. Full tuning needs 9.35 GiB with 256 and 8.93 with 1024, LoRA 4.77 and 5.03.
CHUNK = {"full": 1024, "lora": 256}
PROJECTIONS = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*"


def main(method: str) -> None:
    mesh = Mesh(np.array(DEVICES).reshape(1, job.CHIPS, 1, 1, 1), ("dp", "fsdp", "ep", "tp", "sp"))
    config = ed.LlamaConfig(
        vocab_size=job.LLAMA["vocab"], hidden_size=job.LLAMA["width"], intermediate_size=job.LLAMA["hidden"],
        num_hidden_layers=job.LLAMA["layers"], num_attention_heads=job.LLAMA["heads"],
        num_key_value_heads=job.LLAMA["kv_heads"], head_dim=job.LLAMA["head_dim"],
        rope_theta=float(job.LLAMA["rope_theta"]), rms_norm_eps=job.LLAMA["norm_eps"],
        max_position_embeddings=job.SEQ_LEN, tie_word_embeddings=False, use_cache=False,
        sharding_axis_dims=(1, -1, 1, 1, 1), attn_mechanism="blocksparse", attn_dtype=jnp.bfloat16,
        gradient_checkpointing="nothing_saveable", lmhead_chunksize=CHUNK[method],
    )  # fmt: skip
    config.set_model_mesh(mesh)
    adamw = optax.adamw(job.LEARNING_RATE, b2=job.B2, weight_decay=job.WEIGHT_DECAY)

    def made() -> EasyDeLState:
        rngs = nnx.Rngs(0)
        model = ed.LlamaForCausalLM(config=config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        if method == "lora":
            model = model.apply_lora_to_layers(job.RANK, PROJECTIONS, verbose=False, rngs=rngs)
        return EasyDeLState.create(step=0, model=model, tx=adamw, init_opt_state=True)

    with mesh:
        state = jax.eval_shape(made)
        rules = state.model._get_partition_rules(None)
        specs, _ = _sanitize_partition_specs_for_shape_tree(
            partition_specs=match_partition_rules(rules, state), shape_tree=state, mesh=mesh
        )
        state = jax.tree.map(
            lambda a, spec: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=get_corrected_named_sharding(tuple(a.shape), spec)
            ),
            state,
            specs,
        )
        shardings = jax.tree.map(lambda a: a.sharding, state)
        rows = NamedSharding(mesh, ROWS)
        tokens = jax.ShapeDtypeStruct((job.BATCH, job.SEQ_LEN), jnp.int32, sharding=rows)
        batch = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens}
        everywhere = NamedSharding(mesh, PartitionSpec())
        clock = job.Clock()
        step = jax.jit(
            training_step,
            static_argnums=(2, 3, 4, 5, 6),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, everywhere),
            donate_argnums=(0,),
        )
        compiled = step.lower(state, batch, LossConfig(), None, ROWS, 1, None).compile()
    job.report(
        compiled,
        clock.read(),
        f"layers unrolled; nothing_saveable; fsdp 16; blocksparse (splash) attention; lmhead_chunksize {CHUNK[method]}",
        ("easydel", "ejkernel", "eformer", "flax"),
        trained_parameters=sum(a.size for a in jax.tree.leaves(state.graphstate)),
    )


if __name__ == "__main__":
    main(sys.argv[1])

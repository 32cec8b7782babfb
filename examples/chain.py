"""Chain two methods on the embedded model, train a few steps, merge, and write a Hugging Face directory.

LoRA adapts the attention matrices; half fine-tuning then takes half of what is still dense (feed-forward matrices,
norms, embedding rows). Run: `python examples/chain.py [output directory]`.
"""

import sys
import tempfile

import jax
import optax

import jaxft
from jaxft.data import DataConfig, train_batches
from jaxft.distributed import MeshConfig, make_mesh, shard_batch


def main(output: str, steps: int = 20) -> list[float]:
    model, params = jaxft.load_pretrained("nano")
    tokenizer = jaxft.load_tokenizer("nano")
    data = DataConfig(sources=[{"path": "builtin:api-docs-text", "limit": 200}], seq_len=128, batch_size=8)
    mesh = make_mesh(MeshConfig())

    method = jaxft.chain(jaxft.lora(rank=8, on="layers.attn"), jaxft.hft())
    optimizer = optax.adamw(1e-3)
    state, frozen = jaxft.init_state(method, params, optimizer, jax.random.key(0), mesh)
    train_step = jaxft.make_train_step(jaxft.language_model_loss(model), method, optimizer)

    tuned = jaxft.tuned_of(state, frozen)
    print(f"{jaxft.count_trainable(tuned):,} of {sum(x.size for x in jax.tree.leaves(params)):,} parameters train")
    losses = []
    for step, batch in zip(range(steps), train_batches(data, tokenizer, seed=0), strict=False):
        state, metrics = train_step(state, frozen, shard_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
        print(f"step {step + 1:3d}  loss {losses[-1]:.3f}")

    plain = jaxft.merge(jaxft.tuned_of(state, frozen))
    jaxft.save_pretrained(output, model, plain, tokenizer, overwrite=True)
    print(f"written to {output}: transformers loads it")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

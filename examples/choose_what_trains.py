"""What trains, said in five ways: whole leaves, layers, rows, blocks and single entries.

A selection is a tree (or a dict by path) of boolean masks; `partition` cuts the parameters by it, and each granularity
gets the weight node that stores gradients and optimizer state for the masked part only.
Run: `python examples/choose_what_trains.py`.
"""

import jax
import numpy as np

import jaxft
from jaxft.partition import Blocks, dense_mask, partition, select, weights_by_path


def main() -> dict[str, int]:
    _, params = jaxft.load_pretrained("nano")
    shapes = {path: w.shape for path, w in weights_by_path(params).items()}
    layers, width, _ = shapes["layers.attn.q.kernel"]
    rng = np.random.default_rng(0)

    largest = np.abs(np.asarray(params["layers"]["mlp"]["down"]["kernel"]))
    masks = {
        "final_norm.scale": True,
        "layers.attn.q.kernel": (np.arange(layers) % 2 == 0).reshape(-1, 1, 1),
        "layers.attn.k.kernel": np.isin(np.arange(width), rng.choice(width, 8, replace=False)).reshape(1, -1, 1),
        "layers.attn.o.kernel": Blocks(rng.random((layers, width // 32, width // 32)) < 0.1, (32, 32)),
        "layers.mlp.down.kernel": largest > np.quantile(largest, 0.99),
    }
    tuned = partition(params, masks)

    counts = {path: int(dense_mask(mask, shapes[path]).sum()) for path, mask in masks.items()}
    for path, w in weights_by_path(jaxft.combine(tuned)).items():
        if path in masks:
            print(f"{path:24s} {type(w).__name__:12s} {counts[path]:8,d} of {np.prod(shapes[path]):9,d} train")
    assert jaxft.count_trainable(tuned) == sum(counts.values())

    same = jax.tree.map(np.array_equal, jaxft.materialize(jaxft.combine(tuned)), params)
    assert all(jax.tree.leaves(same)), "a cut changes no value"
    print("the last two layers of the mlp:", list(select(params, "layers[-2:].mlp")))
    return counts


if __name__ == "__main__":
    main()

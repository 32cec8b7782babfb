"""Sparse upcycling (https://arxiv.org/abs/2212.05055): a mixture of experts made of a dense model."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxft.errors import JaxftError
from jaxft.hub.load import WEIGHTS, open_tensors, read_json
from jaxft.hub.names import tensor_names
from jaxft.models.config import from_huggingface, to_huggingface


def upcycle(
    source: Path, target: Path, *, experts: int = 4, experts_per_token: int = 2, deviation: float = 1.0, seed: int = 0
) -> Path:
    """Write at `target` a Mixtral directory whose experts are copies of the MLPs of the model at `source`.

    Gates of a token sum up to 1, so the mixture computes what the dense model did, whatever its router, until experts
    are trained apart. Routers are drawn so that the score of an expert has the standard deviation `deviation` over
    tokens. An existing `target` is left as it is.

    Raises:
        JaxftError: the model has biases, q_norm or k_norm, norms after attention and MLP, or windows in some layers
            only, which Mixtral has not.
    """
    if (target / "config.json").is_file():
        return target
    described = read_json(source / "config.json")
    dense = from_huggingface(described)
    norms, biases = dense.qk_norm or dense.post_norms, dense.qkv_bias or dense.output_bias or dense.mlp_bias
    if norms or biases or len(set(dense.sliding_layers)) > 1:
        raise JaxftError(
            f"{source}: a {dense.model_type} with biases, q_norm, post-norms or mixed windows cannot become a mixtral"
        )
    config = dense.replace(
        model_type="mixtral",
        num_experts=experts,
        num_experts_per_token=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        router_aux_loss_coef=0.001,
    )
    with open_tensors(source) as tensors:
        arrays = {name: tensors.slice(name)[:] for name in tensors.names()}
    for matrix in ("gate", "up", "down"):
        names = tensor_names(f"layers.mlp.experts.{matrix}.kernel", config)
        for layer, name in enumerate(tensor_names(f"layers.mlp.{matrix}.kernel", dense)):
            arrays |= dict.fromkeys(names[layer], arrays.pop(name))
    draw, dtype = np.random.default_rng(seed), next(iter(arrays.values())).dtype
    for name in tensor_names("layers.mlp.router.kernel", config):
        router = draw.normal(0, deviation / np.sqrt(config.hidden_size), (experts, config.hidden_size))
        arrays[name] = router.astype(dtype)

    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja") and "safetensors" not in file.name:
                shutil.copy(file, made)
        (made / "config.json").write_text(json.dumps(to_huggingface(config, dtype.name), indent=2) + "\n")
        save_file({name: a.copy() for name, a in arrays.items()}, made / WEIGHTS, metadata={"format": "pt"})
        os.replace(made, target)
    except OSError:
        if not (target / "config.json").is_file():  # another process was faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target

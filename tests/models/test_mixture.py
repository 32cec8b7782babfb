"""The mixture of experts: against transformers, and against itself on a mesh, packed, cached and rematerialised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.distributed import MeshConfig, make_mesh, shard_batch, tree_shardings
from jaxft.errors import JaxftError
from jaxft.hub import load_pretrained
from jaxft.models import DecoderConfig, LanguageModel, expert_parallel
from jaxft.models.config import from_huggingface
from jaxft.training.loss import language_model_loss
from jaxft.weights import Observed
from tests.tiny_models import CONFIGS, checkpoint, torch_model

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 24))
SEGMENTS = np.array([[1] * 20 + [0] * 4, [1] * 11 + [2] * 9 + [0] * 4])


def load(name):
    return load_pretrained(checkpoint(name), dtype=jnp.float32)


def test_the_params_tree_is_the_documented_one():
    model = load("qwen3-moe")[0]
    mlp = model.abstract()["layers"]["mlp"]
    shapes = {name: mlp["experts"][name]["kernel"].shape for name in mlp["experts"]}
    assert shapes == {"gate": (3, 6, 32, 24), "up": (3, 6, 32, 24), "down": (3, 6, 24, 32)}
    assert mlp["router"]["kernel"].shape == (3, 32, 6)
    axes = model.logical_axes()["layers"]["mlp"]
    assert axes["experts"]["down"]["kernel"] == ("layers", "expert", "mlp_in", "embed")
    assert axes["experts"]["up"]["kernel"] == ("layers", "expert", "embed", "mlp")
    assert axes["router"]["kernel"] == ("layers", "embed", None)


def test_packing_and_padding_change_nothing():
    model, params = load("mixtral")
    run = jax.jit(lambda p, t, s: model.hidden(p, t, segment_ids=s, routing=True))
    packed, routing = run(params, TOKENS, jnp.asarray(SEGMENTS))
    assert np.isfinite(packed).all() and routing.tokens.shape == (3, 5) and (routing.count == 40).all()
    assert (routing.tokens.sum(-1) == 80).all(), "two experts for every token that is no padding"
    alone = np.zeros((3, 24), int)
    alone[0, :20], alone[1, :11], alone[2, :9] = TOKENS[0, :20], TOKENS[1, :11], TOKENS[1, 11:20]
    apart, routed = run(params, alone, jnp.asarray(alone > 0, jnp.int32))
    np.testing.assert_allclose(packed[0, :20], apart[0, :20], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed[1, 11:20], apart[2, :9], rtol=1e-5, atol=1e-5)
    assert np.array_equal(routing.tokens, routed.tokens)
    np.testing.assert_allclose(routing.load_balancing_loss(), routed.load_balancing_loss(), rtol=1e-6)


def test_statistics_of_the_last_projection_know_no_gates():
    """Padding has gates of zero, and is counted all the same."""
    model, params = load("mixtral")
    down = params["layers"]["mlp"]["experts"]["down"]["kernel"]

    def run(energy):
        experts = params["layers"]["mlp"]["experts"] | {"down": {"kernel": Observed(down, energy)}}
        layers = params["layers"] | {"mlp": params["layers"]["mlp"] | {"experts": experts}}
        return jnp.sum(model.hidden(params | {"layers": layers}, TOKENS, segment_ids=jnp.zeros_like(TOKENS)))

    energy = jax.grad(run)(jnp.zeros(down.shape[:-1]))
    assert (energy.sum((1, 2)) > 0).all()


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-gates"])
def test_loss_and_router_gradient_are_those_of_transformers(name):
    model, params = load(name)
    torch_side = torch_model(name)
    mask = (SEGMENTS > 0).astype(int)
    mask[1] = 1  # one segment here: transformers has no segments
    labels = np.where(mask, TOKENS, -100)
    torch_side.zero_grad()
    out = torch_side(
        torch.as_tensor(TOKENS),
        attention_mask=torch.as_tensor(mask),
        labels=torch.as_tensor(labels),
        output_router_logits=True,
    )
    out.loss.backward()
    expected = torch.stack([layer.mlp.gate.weight.grad for layer in torch_side.model.layers]).numpy()
    torch_side.zero_grad()

    weights = (mask[:, 1:] * np.ones((2, 23))).astype(np.float32)
    batch = {
        "tokens": TOKENS,
        "targets": np.pad(TOKENS[:, 1:], ((0, 0), (0, 1))),
        "weights": np.pad(weights, ((0, 0), (0, 1))),
        "segment_ids": mask,
    }
    loss = language_model_loss(model, router_aux_loss=torch_side.config.router_aux_loss_coef)

    def mean(params):
        total, weight, _ = loss(params, batch, None)
        return total / weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
    router = gradient["layers"]["mlp"]["router"]["kernel"]
    np.testing.assert_allclose(router, expected.swapaxes(1, 2), rtol=1e-3, atol=1e-6)
    plain = jax.jit(language_model_loss(model))(params, batch, jax.random.key(0))
    np.testing.assert_allclose(
        value - plain[0] / plain[1], torch_side.config.router_aux_loss_coef * out.aux_loss.item(), rtol=1e-2
    )


def test_the_coefficient_comes_from_the_model_or_is_given():
    given = {**CONFIGS["mixtral"]().to_dict(), "router_aux_loss_coef": 0.02}
    assert from_huggingface(given).router_aux_loss_coef == 0.02
    model, params = load("mixtral")
    weighed = type(model)(model.config.replace(router_aux_loss_coef=0.5, output_router_logits=True))
    batch = {"tokens": TOKENS, "targets": TOKENS, "weights": np.ones((2, 24), np.float32)}
    own, given, none = (
        language_model_loss(m, router_aux_loss=c)(params, batch, None)[0]
        for m, c in ((weighed, None), (model, 0.5), (weighed, 0.0))
    )
    assert own == given and own > none
    with pytest.raises(JaxftError, match=r"router_aux_loss = 0.1: the model has no experts"):
        language_model_loss(load("qwen3")[0], router_aux_loss=0.1)


def test_a_cache_changes_nothing():
    model, params = load("qwen3-moe")
    whole = jax.jit(model.hidden)(params, TOKENS)
    cache = model.init_cache(params, 2, 24)
    step = jax.jit(lambda cache, tokens: model.hidden(params, tokens, cache=cache, remat="none"))
    first, cache = step(cache, TOKENS[:, :20])
    last, _ = step(cache, TOKENS[:, 20:21])
    np.testing.assert_allclose(np.concatenate([first, last], 1), whole[:, :21], rtol=1e-4, atol=1e-5)


MESHES = [{"data": 2, "expert": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "expert": 4}, {"sequence": 2, "expert": 2}]


EIGHT = LanguageModel(
    DecoderConfig(
        "qwen3_moe", 96, 32, 48, 2, 4, 2, 8, qk_norm=True, num_experts=8, num_experts_per_token=3,
        moe_intermediate_size=16, initializer_range=0.2,
    )
)  # fmt: skip


def unbalanced(params):
    """Weights whose router sends every token to the first three experts or to the last three."""
    kernel = params["layers"]["mlp"]["router"]["kernel"]
    one = jax.random.normal(jax.random.key(3), kernel.shape[:2])[..., None] * jnp.arange(-4.0, 4.0)
    return {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"], "router": {"kernel": one}}}}


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(sizes))
def test_loss_and_gradient_on_a_mesh_are_those_of_one_device(sizes):
    same_on_a_mesh(sizes, jax.jit(EIGHT.init)(jax.random.key(0)))


def test_what_does_not_fit_into_a_round_goes_in_further_ones(monkeypatch):
    """Of an unbalanced batch, 48 rows a device on average and up to 128: rounds of 24, as many as the fullest needs."""
    rounds = []
    monkeypatch.setattr(expert_parallel, "_room", lambda entries: 24)
    further = expert_parallel._further

    def counted(step, count, first, given):
        jax.debug.callback(lambda n: rounds.append(int(n)), count)
        return further(step, count, first, given)

    monkeypatch.setattr(expert_parallel, "_further", counted)
    # No other axis: on CPU devices a loop that sends waits for what sends beside it.
    same_on_a_mesh({"data": 1, "expert": 8}, unbalanced(jax.jit(EIGHT.init)(jax.random.key(0))))
    assert max(rounds) > 2


@pytest.mark.parametrize("shape", [(3, 8), (3, 5)], ids=["tokens-divide", "nothing-divides"])
def test_rows_that_do_not_divide_change_nothing(shape):
    params, tokens = jax.jit(EIGHT.init)(jax.random.key(0)), np.resize(TOKENS, shape)
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    places = tree_shardings(params, EIGHT.logical_axes(), mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(EIGHT.hidden)
        sent = str(jax.make_jaxpr(EIGHT.hidden)(params, tokens))
        found = run(jax.device_put(params, places), tokens)
    assert ("reduce_scatter" in sent) == (shape == (3, 8))
    np.testing.assert_allclose(found, jax.jit(EIGHT.hidden)(params, tokens), rtol=1e-4, atol=1e-5)


def same_on_a_mesh(sizes, params):
    model, tokens = EIGHT, np.random.default_rng(1).integers(3, 96, (8, 16)).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((8, 16), np.float32)}
    batch["segment_ids"] = np.where(np.arange(16) < 13, 1, 0)[None].repeat(8, 0).astype(np.int32)
    loss = language_model_loss(model, router_aux_loss=0.1)

    def run(params, batch):
        return jax.value_and_grad(lambda p: loss(p, batch, None)[0])(params)

    mesh = make_mesh(MeshConfig(**sizes))
    places = tree_shardings(params, model.logical_axes(), mesh)
    expert = places["layers"]["mlp"]["experts"]["up"]["kernel"]
    assert expert.spec[1] == "expert"
    with jax.set_mesh(mesh):
        found = jax.jit(run, out_shardings=(None, places))(jax.device_put(params, places), shard_batch(batch, mesh))
    expected = jax.jit(run)(params, batch)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3-moe", {"mlp_only_layers": [1]}, "make 1 of 3 layers plain MLPs .layer 1 first.*are all alike"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 and mlp_only_layers .. make 2 of 3 layers"),
        ("qwen3-moe", {"num_experts_per_tok": 7}, "num_experts 6, num_experts_per_token 7"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
        ("llama3", {}, None),
    ],
)
def test_configs(name, change, message):
    config = {**CONFIGS[name]().to_dict(), **change}
    if message is None:
        with pytest.raises(JaxftError, match="a llama has no experts: num_experts is 4"):
            from_huggingface(config).replace(num_experts=4)
        return
    with pytest.raises(JaxftError, match=message):
        from_huggingface(config)

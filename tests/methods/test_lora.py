"""LoRA: the initialisation of the reference, layer ranges, and peft's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

from jaxft.distributed import MeshConfig, make_mesh
from jaxft.errors import JaxftError
from jaxft.methods import Probe, chain, count_trainable, hft, lora, merge
from jaxft.partition import combine, map_weights, weights_by_path
from jaxft.training.loss import language_model_loss
from jaxft.training.state import init_state
from jaxft.training.step import make_train_step
from jaxft.weights import LowRank, Split, linear, materialize
from jaxft.weights.training import in_training
from tests.methods import oracle
from tests.methods.tiny import MODEL, batches, params
from tests.tiny_models import torch_logits

KEY = jax.random.key(0)


def cut(tree=None, **options):
    return lora(**options).init(KEY, params() if tree is None else tree, Probe())


def test_counts_scale_and_initialisation():
    tuned = cut(rank=4)
    assert count_trainable(tuned) == 4 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    q = combine(tuned)["layers"]["attn"]["q"]["kernel"]
    assert q.scale == 2.0 and cut(rank=4, alpha=4).trainable is not None
    assert combine(cut(rank=4, alpha=6))["layers"]["attn"]["q"]["kernel"].scale == 1.5
    bound = 1 / np.sqrt(32)
    assert q.a.shape == (4, 32, 4) and not q.b.any()
    assert np.abs(q.a).max() <= bound and np.abs(q.a).max() > 0.9 * bound and abs(q.a.mean()) < 0.1 * bound
    assert q.base is params()["layers"]["attn"]["q"]["kernel"], "the base is shared, not copied"
    assert len({np.asarray(a).tobytes() for a in q.a}) == 4, "layers start differently"


def test_factors_of_a_bf16_base_are_float32():
    q = combine(cut(params("bfloat16"), rank=4))["layers"]["attn"]["q"]["kernel"]
    assert (q.base.dtype, q.a.dtype, q.b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_a_range_of_layers():
    tuned = cut(rank=4, on="layers[2:].attn.q")
    q = combine(tuned)["layers"]["attn"]["q"]["kernel"]
    assert isinstance(q, LowRank) and isinstance(q.a, Split) and count_trainable(tuned) == 2 * 4 * (32 + 32)
    moved = tuned._replace(trainable=jax.tree.map(lambda w: w + 1.0, tuned.trainable))
    changed = (materialize(combine(moved)["layers"]["attn"]["q"]["kernel"]) != q.base).any((1, 2))
    assert changed.tolist() == [False, False, True, True]


def test_an_embedding_and_a_head_can_have_it():
    tuned = cut(rank=2, on="embed.embedding|head.kernel")
    moved = tuned._replace(trainable=jax.tree.map(lambda w: w + 0.1, tuned.trainable))
    logits = jax.jit(lambda p: MODEL.logits(p, MODEL.hidden(p, batches()[0]["tokens"])))
    want = logits(materialize(combine(moved)))
    np.testing.assert_allclose(logits(combine(moved)), want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - logits(params())).max() > 0.01


def test_vectors_beside_the_matrices_are_left_alone():
    tuned = lora(rank=2, on="layers.*").init(KEY, params(), Probe())
    names = {p for p, w in weights_by_path(combine(tuned)).items() if isinstance(w, LowRank)}
    assert names == {f"layers.{m}.kernel" for m in oracle.PROJECTIONS}


def test_under_a_split_of_another_method():
    method = chain(lora(rank=2, on="@attention"), hft(embeddings="freeze"))
    tuned = method.init(KEY, params(), Probe())
    names = {p: type(w).__name__ for p, w in weights_by_path(combine(tuned)).items()}
    assert names["layers.attn.q.kernel"] == "LowRank" and names["layers.mlp.up.kernel"] == "Split"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        (
            {"rank": 17, "on": "attn.k.kernel"},
            r'rank=17 exceeds the smaller side of "layers.attn.k.kernel" \(32 x 16\)',
        ),
        ({"on": "final_norm"}, '"final_norm" selects no matrix: "final_norm.scale" has shape'),
        ({"on": "attm"}, "matches no weight"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(JaxftError, match=message):
        cut(**{"rank": 4, **options})


# --- against peft -----------------------------------------------------------------------------------------------------


def with_factors(tuned, model: peft.PeftModel):
    """The cut with the factors of peft's model: A of ours is their A transposed, B their B."""
    tensors = dict(model.named_parameters())

    def one(path, w):
        if not isinstance(w, LowRank):
            return w
        module = oracle.PROJECTIONS[path.removeprefix("layers.").removesuffix(".kernel")]

        def stacked(letter):
            names = [f"base_model.model.model.layers.{i}.{module}.lora_{letter}.default.weight" for i in range(3)]
            return jnp.asarray(np.stack([tensors[n].detach().numpy().T for n in names]))

        return w.replace(a=stacked("A"), b=stacked("B"))

    return tuned._replace(trainable=map_weights(one, tuned.trainable))


def peft_model() -> peft.PeftModel:
    targets = [name.split(".")[-1] for name in oracle.PROJECTIONS.values()]
    torch.manual_seed(0)
    model = oracle.theirs(peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def test_logits_are_those_of_peft():
    theirs, (model, tree) = peft_model(), oracle.ours()
    tuned = with_factors(cut(tree, rank=4, alpha=12), theirs)
    tokens = oracle.TOKENS[0, :, :-1]
    want = torch_logits(theirs, tokens)
    logits = jax.jit(lambda p: model.logits(p, model.hidden(p, jnp.asarray(tokens))))
    for tree in (combine(tuned), merge(tuned)):
        assert np.abs(logits(tree) - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", oracle.OPTIMIZERS)
def test_training_steps_are_those_of_peft(name):
    theirs, (model, tree) = peft_model(), oracle.ours()
    tuned = with_factors(cut(tree, rank=4, alpha=12), theirs)
    for_torch, for_jax = oracle.OPTIMIZERS[name]
    got, trained = oracle.jax_losses(model, tuned, for_jax)
    want = oracle.torch_losses(theirs, for_torch([p for p in theirs.parameters() if p.requires_grad]))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert abs(want[-1] - want[0]) > 1e-3
    for a, b in zip(
        jax.tree.leaves(trained.trainable), jax.tree.leaves(with_factors(tuned, theirs).trainable), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


class Masked(torch.nn.Module):
    """In the place of peft's dropout: a mask that is given."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_dropout_is_that_of_peft_under_the_same_masks():
    theirs, (model, tree) = peft_model(), oracle.ours()
    tuned = with_factors(cut(tree, rank=4, alpha=12, dropout=0.5), theirs)
    tokens = jnp.asarray(oracle.TOKENS[0, :, :-1])
    logits = jax.jit(lambda p: model.logits(p, model.hidden(p, tokens, remat="block")))
    dropped = in_training(combine(tuned), jax.random.key(5))
    layers = dict(theirs.base_model.model.model.layers.named_modules())
    seen = []
    for name, module in oracle.PROJECTIONS.items():
        part, letter = name.split(".")
        w = dropped["layers"][part][letter]["kernel"]
        for i in range(3):
            key = jax.random.wrap_key_data(w.noise[i])
            kept = jax.random.bernoulli(key, 0.5, (*tokens.shape, w.base.shape[1]))
            layers[f"{i}.{module}"].lora_dropout["default"] = Masked(oracle.to_torch(kept) / 0.5)
            seen.append(np.asarray(kept[0, 0, :32]))
    want = torch_logits(theirs, np.asarray(tokens))
    assert np.abs(logits(dropped) - want).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(logits(combine(tuned)) - want).max() > 1e-3 * np.abs(want).max(), "none outside of training"
    assert len({mask.tobytes() for mask in seen}) == len(seen), "every matrix of every layer draws its own"


def test_dropout_of_a_train_step_is_a_function_of_seed_and_step():
    tree, optimizer = params(), optax.sgd(0.0)
    mesh = make_mesh(MeshConfig(fsdp=-1), jax.devices()[:1])

    @functools.cache
    def prepared(dropout, accumulation):
        method = lora(rank=2, alpha=64, on="attn.q|mlp.down|head.kernel", dropout=dropout)
        return method, make_train_step(language_model_loss(MODEL), method, optimizer, accumulation=accumulation)

    def losses(seed, dropout, accumulation=1):
        method, step = prepared(dropout, accumulation)
        state, frozen = init_state(method, tree, optimizer, jax.random.key(seed), mesh)
        state = state._replace(trainable=jax.tree.map(lambda x: x + 0.05, state.trainable))
        found = []
        for _ in range(3):
            state, metrics = step(state, frozen, batches()[0])
            found.append(float(metrics["loss"]))
        return found

    plain, dropped = losses(0, 0.0), losses(0, 0.3)
    assert plain[0] == plain[1] == plain[2]
    assert len({*plain, *dropped}) == 4 and dropped == losses(0, 0.3)
    assert losses(1, 0.3) != dropped and losses(0, 0.3, accumulation=2) != dropped


def test_dropout_keeps_the_mean():
    a, b = jnp.full((64, 1), 0.1), jnp.full((1, 1), 1.0)
    w = LowRank(jnp.zeros((64, 1)), a, b, 1.0, 0.25)
    x = jnp.ones((5000, 64))
    seen = linear(x, in_training({"w": w}, jax.random.key(1))["w"])
    assert abs(float(seen.mean()) - 6.4) < 0.02  # 0.1 * 64, of 320,000 draws
    assert abs(float(seen.std()) - 0.1 * np.sqrt(64 * 0.25 / 0.75)) < 0.02
    np.testing.assert_allclose(linear(x, w), 6.4, rtol=1e-5)

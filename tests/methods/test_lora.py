"""LoRA: the initialisation of the reference, layer ranges, and peft's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxft.errors import JaxftError
from jaxft.methods import Probe, chain, count_trainable, hft, lora, merge
from jaxft.partition import combine, map_weights, weights_by_path
from jaxft.weights import LowRank, Split, materialize
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


def test_under_a_split_of_another_method():
    method = chain(lora(rank=2, on="@attention"), hft(embeddings="freeze"))
    tuned = method.init(KEY, params(), Probe())
    names = {p: type(w).__name__ for p, w in weights_by_path(combine(tuned)).items()}
    assert names["layers.attn.q.kernel"] == "LowRank" and names["layers.mlp.up.kernel"] == "Split"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        (
            {"rank": 17, "on": "attn.k.kernel"},
            r'rank=17 exceeds the smaller side of "layers.attn.k.kernel" \(32 x 16\)',
        ),
        ({"on": "final_norm"}, '"final_norm.scale" of shape .* is not a matrix'),
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

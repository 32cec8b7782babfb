"""Prompt tuning: what trains, hard prompts, and peft's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxft.errors import JaxftError
from jaxft.methods import Probe, chain, count_trainable, full, merge, prompt_tuning, unmerged_sites
from jaxft.partition import Roles, combine
from jaxft.weights import SoftPrompt
from tests.methods import oracle
from tests.methods.tiny import MODEL, batches, params
from tests.tiny_models import torch_logits

KEY = jax.random.key(0)


def with_embedding(tuned, embedding):
    sites = {"prompt": SoftPrompt(jnp.asarray(embedding))}
    return tuned._replace(trainable={**tuned.trainable, "sites": sites})


def test_only_the_prompt_trains():
    tuned = prompt_tuning(num_tokens=5).init(KEY, params(), Probe())
    assert count_trainable(tuned) == 5 * 32
    (prompt,) = jax.tree.leaves(tuned.trainable)
    table = np.asarray(params()["embed"]["embedding"])
    rows = [np.flatnonzero((table == p).all(1)) for p in np.asarray(prompt)]
    assert all(len(r) == 1 for r in rows) and len({int(r[0]) for r in rows}) == 5
    random = jax.tree.leaves(prompt_tuning(5, "random").init(KEY, params(), Probe()).trainable)[0]
    assert random.dtype == jnp.float32 and 0.3 < np.abs(random).max() <= 0.5
    many = prompt_tuning(num_tokens=100).init(KEY, params(), Probe())  # more than the vocabulary has
    assert count_trainable(many) == 100 * 32


def test_embeddings_of_real_tokens_are_a_hard_prompt():
    hard, rest = np.array([[5, 9, 33]]), batches()[0]["tokens"][:1]
    tuned = prompt_tuning(num_tokens=3).init(KEY, params(), Probe())
    tuned = with_embedding(tuned, params()["embed"]["embedding"][hard[0]])
    soft = MODEL.hidden(combine(tuned), rest)
    whole = MODEL.hidden(params(), np.concatenate([hard, rest], axis=1))
    np.testing.assert_allclose(soft, whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_no_weight_can_hold_a_prompt():
    tuned = prompt_tuning(num_tokens=3).init(KEY, params(), Probe())
    assert unmerged_sites(merge(tuned)) == ["prompt"]


def test_beside_an_embedding_that_trains():
    tuned = chain(full(on="embed"), prompt_tuning(num_tokens=3)).init(KEY, params(), Probe())
    assert count_trainable(tuned) == 64 * 32 + 3 * 32
    with pytest.raises(ValueError, match='site "prompt" already holds a SoftPrompt'):
        chain(prompt_tuning(3), prompt_tuning(3)).init(KEY, params(), Probe())


def test_wrong_options():
    with pytest.raises(JaxftError, match="num_tokens=0 must be at least 1"):
        prompt_tuning(0)
    with pytest.raises(JaxftError, match='unknown role "@embedding"'):
        prompt_tuning(2).init(KEY, params(), Probe(roles=Roles(names={}, categories={})))


# --- against peft -----------------------------------------------------------------------------------------------------


def both():
    torch.manual_seed(0)
    theirs = oracle.theirs(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    embedding = theirs.prompt_encoder["default"].embedding.weight
    model, tree = oracle.ours()
    tuned = prompt_tuning(num_tokens=4).init(KEY, tree, Probe())
    return theirs, embedding, model, with_embedding(tuned, embedding.detach().numpy().copy())


def test_logits_are_those_of_peft():
    theirs, _, model, tuned = both()
    tokens = oracle.TOKENS[0, :, :-1]
    want = torch_logits(theirs, tokens)[:, 4:]
    params = combine(tuned)
    got = model.logits(params, model.hidden(params, jnp.asarray(tokens)))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", oracle.OPTIMIZERS)
def test_training_steps_are_those_of_peft(name):
    theirs, embedding, model, tuned = both()
    for_torch, for_jax = oracle.OPTIMIZERS[name]
    got, trained = oracle.jax_losses(model, tuned, for_jax)
    want = oracle.torch_losses(theirs, for_torch([p for p in theirs.parameters() if p.requires_grad]))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(trained.trainable)[0], embedding.detach().numpy(), rtol=1e-3, atol=1e-4)

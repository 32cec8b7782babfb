"""Sparse upcycling: the mixture computes what the dense model did, here and in transformers."""

import jax
import numpy as np
import pytest
import transformers

from jaxft.errors import JaxftError
from jaxft.hub import load_model, load_pretrained, upcycle
from tests.tiny_models import checkpoint, torch_logits, torch_model

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 12))


def test_an_upcycled_model_computes_what_the_dense_one_did(tmp_path):
    made = upcycle(checkpoint("llama3"), tmp_path / "moe", experts=3, experts_per_token=2)
    model, params = load_pretrained(made)
    assert (model.config.model_type, model.config.num_experts, model.config.num_experts_per_token) == ("mixtral", 3, 2)
    hidden, routing = jax.jit(lambda p, t: model.hidden(p, t, routing=True))(params, TOKENS)
    expected = torch_logits(torch_model("llama3"), TOKENS)
    np.testing.assert_allclose(model.logits(params, hidden), expected, atol=1e-4 * np.abs(expected).max())
    assert (np.asarray(routing.tokens) > 0).all(), "every expert of every layer has tokens"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made).eval()
    np.testing.assert_allclose(torch_logits(theirs, TOKENS), expected, atol=1e-4 * np.abs(expected).max())
    assert upcycle(tmp_path / "nothing", made) == made, "what is there is left as it is"


def test_what_mixtral_cannot_hold_is_refused(tmp_path):
    with pytest.raises(JaxftError, match="a qwen3 with biases, q_norm, .* cannot become a mixtral"):
        upcycle(checkpoint("qwen3"), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_the_embedded_mixture_is_nano():
    dense, sparse = load_model("nano").config, load_model("nano-moe").config
    assert (sparse.num_experts, sparse.num_experts_per_token) == (4, 2)
    assert (dense.hidden_size, dense.num_layers, dense.rope) == (sparse.hidden_size, sparse.num_layers, sparse.rope)

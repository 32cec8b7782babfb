"""Gemma: layers of two kinds in one scan, tuned, prompted and compiled as any other model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.hub import load_pretrained
from jaxft.methods import get_method
from jaxft.models import LanguageModel
from jaxft.models.config import from_huggingface
from jaxft.testing import Trial, check_frozen, check_law, check_trains
from jaxft.training.loss import language_model_loss
from jaxft.weights import SoftPrompt, add_site
from tests.tiny_models import CONFIGS, checkpoint

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 24))


@pytest.mark.parametrize("name", ["full", "hft", "lora", "ssf"])
def test_methods_tune_it(name):
    model, params = load_pretrained(checkpoint("gemma3"))
    rng = np.random.default_rng(1)
    rows = [rng.integers(3, 96, (4, 13)) for _ in range(3)]
    batches = [{"tokens": r[:, :-1], "targets": r[:, 1:], "weights": np.ones((4, 12), np.float32)} for r in rows]
    entry = get_method(name)
    loss = language_model_loss(model, remat="none", chunks=1)
    trial = Trial(entry.build(**entry.example), params, loss, batches, logical_axes=model.logical_axes())
    for check in (check_law, check_frozen, check_trains):
        check(trial)


def test_virtual_tokens_are_rows_of_the_embedding():
    model, params = load_pretrained(checkpoint("gemma3"))
    prompted = add_site(params, "prompt", SoftPrompt(params["embed"]["embedding"][TOKENS[0, :3]]), layers=None)
    whole = jax.jit(model.hidden)(params, TOKENS[:1])
    np.testing.assert_allclose(jax.jit(model.hidden)(prompted, TOKENS[:1, 3:]), whole[:, 3:], atol=1e-4)


def test_kernels_of_both_kinds_compute_what_plain_attention_does():
    """A window is a static mask of splash attention: the layers of a scan choose between two kernels."""
    model, params = load_pretrained(checkpoint("gemma3"))
    tokens = np.random.default_rng(2).integers(3, 96, (1, 128))
    plain, fast = (jax.jit(lambda p, a=a: model.hidden(p, tokens, attention=a))(params) for a in ("xla", "splash"))
    np.testing.assert_allclose(fast, plain, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_the_program_grows_neither_with_depth_nor_with_the_pattern(name):
    config = from_huggingface(CONFIGS[name]().to_dict())

    def equations(sliding_layers):
        model = LanguageModel(config.replace(num_layers=len(sliding_layers), sliding_layers=sliding_layers))
        jaxpr = jax.make_jaxpr(lambda p: jax.grad(lambda p: model.hidden(p, TOKENS).sum())(p))(model.abstract())
        return str(jaxpr).count("\n")

    assert equations((True, False)) == equations((True,) * 5 + (False,) + (True,) * 7 + (False,) * 11)


def test_norms_start_at_a_factor_of_one():
    model = LanguageModel(from_huggingface(CONFIGS["gemma3"]().to_dict()))
    params = jax.jit(model.init)(jax.random.key(0))
    norms = [w for path, w in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "scale"]
    assert len(norms) == 7 and not any(map(jnp.any, norms))

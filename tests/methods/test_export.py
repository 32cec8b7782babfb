"""What a method trained, merged and written as a Hugging Face directory, is what transformers then computes."""

import jax
import numpy as np
import pytest
import transformers

from jaxft.errors import JaxftError
from jaxft.hub import save_pretrained
from jaxft.methods import get_method, merge
from jaxft.partition import combine
from tests.methods.tiny import KINDS, MODEL, batches, params, trial
from tests.tiny_models import torch_logits


def trained(name):
    """The cut with everything that trains moved by noise, as training would."""
    entry = get_method(name)
    method = entry.build(**entry.example)
    tuned = method.init(jax.random.key(0), params(), trial(method).probe)
    leaves, treedef = jax.tree.flatten(tuned.trainable)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [w + 0.1 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
    return tuned._replace(trainable=treedef.unflatten(moved))


@pytest.mark.parametrize("name", [n for n in KINDS if get_method(n).mergeable])
def test_transformers_computes_what_was_trained(name, tmp_path):
    tuned, tokens = trained(name), batches()[0]["tokens"]
    logits = jax.jit(lambda p: MODEL.logits(p, MODEL.hidden(p, tokens)))
    want = np.asarray(logits(combine(tuned)))
    assert np.abs(want - np.asarray(logits(params()))).max() > 0.1
    save_pretrained(tmp_path / "out", MODEL, merge(tuned))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert np.abs(torch_logits(model, tokens) - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("name", [n for n in KINDS if not get_method(n).mergeable])
def test_what_cannot_be_merged_is_refused_not_dropped(name, tmp_path):
    with pytest.raises(JaxftError, match="modules at sites have no place in a Hugging Face model"):
        save_pretrained(tmp_path / "out", MODEL, merge(trained(name)))
    assert not (tmp_path / "out").exists()

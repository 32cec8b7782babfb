"""Sites: named points where a module may act, and the modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.weights import (
    ACTIVATIONS,
    Bottleneck,
    ScaleShift,
    SiteModule,
    SoftPrompt,
    add_site,
    materialize,
    prompt_embeddings,
    scan_layers,
    site,
    split_layers,
)
from jaxft.weights.sites import Tally
from tests.weights.test_law import node_classes

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def bottleneck(**fields) -> Bottleneck:
    made = {"down": normal(1, 8, 4), "up": normal(2, 4, 8), "down_bias": normal(3, 4), "up_bias": normal(4, 8)}
    return Bottleneck(**{**made, **fields})


MODULES = {
    ScaleShift: ScaleShift(normal(1, 8), normal(2, 8)),
    Bottleneck: bottleneck(),
    SoftPrompt: SoftPrompt(normal(1, 3, 8)),
    Tally: Tally(jnp.zeros(8), jnp.zeros(8)),
}


def test_every_module_is_tried():
    assert node_classes(SiteModule) == set(MODULES)


@pytest.mark.parametrize("cls", MODULES)
def test_materialize_leaves_a_module_as_it_is(cls):
    kept = materialize({"sites": {"a": MODULES[cls]}})["sites"]["a"]
    assert type(kept) is cls
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(MODULES[cls]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_site_without_a_module_is_the_identity():
    assert site({}, "mlp", X) is X
    assert site({"sites": {"attn": MODULES[ScaleShift]}}, "mlp", X) is X


def test_scale_shift():
    s, t = normal(1, 8), normal(2, 8)
    np.testing.assert_allclose(site({"sites": {"a": ScaleShift(s, t)}}, "a", X), X * s + t, rtol=1e-6)
    np.testing.assert_allclose(site({"sites": {"a": ScaleShift(s)}}, "a", X), X * s, rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck(activation):
    m = bottleneck(scale=0.5, activation=activation)
    hidden = ACTIVATIONS[activation](X @ m.down + m.down_bias)
    np.testing.assert_allclose(
        site({"sites": {"a": m}}, "a", X), X + 0.5 * (hidden @ m.up + m.up_bias), rtol=1e-4, atol=1e-5
    )
    bare = bottleneck(up=jnp.zeros((4, 8)), up_bias=None, down_bias=None, activation=activation)
    np.testing.assert_array_equal(site({"sites": {"a": bare}}, "a", X), X)


@pytest.mark.parametrize("cls", [ScaleShift, Bottleneck])
def test_modules_keep_the_dtype_of_activations(cls):
    assert site({"sites": {"a": MODULES[cls]}}, "a", X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_modules_of_a_stack_are_sliced_by_the_scan():
    stacks = bottleneck(
        down=normal(1, 4, 8, 4), up=normal(2, 4, 4, 8), down_bias=normal(3, 4, 4), up_bias=normal(4, 4, 8)
    )
    split_down = split_layers(stacks.down, jnp.asarray([True, False, True, False]), 2)
    params = add_site({"layers": {"w": jnp.zeros((4, 8))}}, "mlp", stacks.replace(down=split_down))
    got, _ = scan_layers(lambda x, layer, _: (site(layer, "mlp", x), None), params["layers"], X)
    want = X
    for i in range(4):
        want = site({"sites": {"a": jax.tree.map(lambda a, i=i: a[i], stacks)}}, "a", want)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_prompt_is_found_at_its_site():
    assert prompt_embeddings({"layers": {}}) is None
    params = add_site({}, "prompt", MODULES[SoftPrompt], layers=None)
    np.testing.assert_array_equal(prompt_embeddings(params), MODULES[SoftPrompt].embedding)


def test_wrong_uses_say_so():
    params = add_site({"layers": {}}, "mlp", MODULES[ScaleShift])
    with pytest.raises(ValueError, match='site "mlp" already holds a ScaleShift'):
        add_site(params, "mlp", MODULES[Bottleneck])
    with pytest.raises(TypeError, match="SoftPrompt cannot act at a site"):
        site({"sites": {"a": MODULES[SoftPrompt]}}, "a", X)
    with pytest.raises(TypeError, match="ScaleShift makes no virtual tokens"):
        prompt_embeddings({"sites": {"prompt": MODULES[ScaleShift]}})

"""The decoder against transformers, and against itself: packed, cached, rematerialised, rewritten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Literal, jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.distributed import MeshConfig, make_mesh
from jaxft.errors import JaxftError
from jaxft.hub import load_pretrained
from jaxft.models import Decoder, DecoderConfig, LanguageModel
from jaxft.weights import LowRank, ScaleShift, SoftPrompt, add_site, materialize, reduction, split_layers
from tests.tiny_models import CONFIGS, checkpoint, torch_logits, torch_model

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 24))
LAYER_SITES = ("attn_norm", "attn.q", "attn.k", "attn.v", "attn.o", "attn") + (
    ("mlp_norm", "mlp.gate", "mlp.up", "mlp.down", "mlp", "block")
)


def load(name):
    return load_pretrained(checkpoint(name), dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def hidden(model, params, tokens, dtype=jnp.float32):
    return model.hidden(params, tokens, dtype=dtype)


@functools.partial(jax.jit, static_argnames="model")
def logits(model, params, tokens):
    return model.logits(params, model.hidden(params, tokens))


def close(a, b, tolerance=1e-4):
    return np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name):
    model, params = load(name)
    assert close(logits(model, params, TOKENS), torch_logits(torch_model(name), TOKENS))


@pytest.mark.parametrize("name", ["mistral", "qwen2-windows", "llama3", "gemma3"])
@pytest.mark.parametrize("prompted", [False, True])
def test_packed_rows_mean_what_their_segments_mean_apart(name, prompted):
    model, params = load(name)
    if prompted:
        prompt = SoftPrompt(0.3 * jax.random.normal(jax.random.key(1), (3, 32)))
        params = add_site(params, "prompt", prompt, layers=None)
    packed = np.concatenate([TOKENS[0, :11], TOKENS[1, :9], np.zeros(4, int)])[None]
    segments = jnp.asarray([[1] * 11 + [2] * 9 + [0] * 4])
    together = jax.jit(lambda p, t, s: model.hidden(p, t, segment_ids=s))(params, jnp.asarray(packed), segments)
    assert np.isfinite(together).all()
    assert close(together[:, :11], hidden(model, params, TOKENS[:1, :11]), 1e-5)
    assert close(together[:, 11:20], hidden(model, params, TOKENS[1:, :9]), 1e-5)
    if prompted:
        plain = {key: value for key, value in params.items() if key != "sites"}
        assert not close(together[:, :11], hidden(model, plain, TOKENS[:1, :11]), 1e-2)


def test_padding_has_no_influence_and_no_gradient():
    model, params = load("llama3")
    segments = jnp.asarray([[1] * 20 + [0] * 4, [0] * 24])

    def loss(params, tokens):
        states = model.hidden(params, tokens, segment_ids=segments)
        return jnp.sum(jnp.square(states) * (segments > 0)[..., None])

    run = jax.jit(jax.value_and_grad(loss))
    value, gradient = run(params, jnp.asarray(TOKENS))
    other = np.where(np.asarray(segments) > 0, TOKENS, 7)
    value_other, gradient_other = run(params, jnp.asarray(other))
    assert value == value_other
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_other), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["mistral", "qwen2-windows", "gemma3"])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_cache_changes_nothing(name, prompted):
    model, params = load(name)
    if prompted:
        prompt = SoftPrompt(0.3 * jax.random.normal(jax.random.key(1), (3, 32)))
        params = add_site(params, "prompt", prompt, layers=None)
    whole = hidden(model, params, TOKENS)
    cache = jax.jit(lambda params: model.init_cache(params, 2, 30))(params)
    step = jax.jit(lambda cache, tokens: model.hidden(params, tokens, cache=cache, remat="none"))
    pieces = []
    for start, stop in ((0, 10), (10, 20), (20, 21), (21, 22)):
        states, cache = step(cache, TOKENS[:, start:stop])
        pieces.append(states)
    assert close(np.concatenate(pieces, axis=1), whole[:, :22], 1e-5)


def test_rematerialisation_changes_no_gradient():
    model, params = load("qwen3")

    def gradient(remat):
        def loss(params):
            return jnp.mean(jnp.square(model.hidden(params, TOKENS, remat=remat)))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    expected = gradient("none")
    for remat in ("block", "attention", "dots", "offload"):
        for a, b in zip(gradient(remat), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_remat_recomputes_the_block():
    model, params = load("llama3")

    def residuals(remat):
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: model.hidden(p, TOKENS, remat=remat), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert residuals("block") < residuals("attention") < residuals("dots") < residuals("none")
    config, tokens = model.config, TOKENS.size
    of_attention = config.num_layers * tokens * config.num_heads * (config.head_dim + 1)  # and the partition sums
    assert residuals("attention") - residuals("block") == of_attention


def test_unknown_names_are_refused():
    model, params = load("llama3")
    with pytest.raises(JaxftError, match='remat "blok" is unknown: did you mean "block"'):
        model.hidden(params, TOKENS, remat="blok")
    with pytest.raises(JaxftError, match='attention "splas" is unknown: did you mean "splash"'):
        model.hidden(params, TOKENS, attention="splas")


def test_params_tree_is_the_documented_one():
    model = load("qwen3")[0]
    flat = jax.tree_util.tree_flatten_with_path(model.abstract(jnp.bfloat16))[0]
    shapes = {".".join(key.key for key in path): leaf.shape for path, leaf in flat}
    assert all(leaf.dtype == jnp.bfloat16 for _, leaf in flat)
    assert shapes == {
        "embed.embedding": (96, 32),
        "layers.attn_norm.scale": (3, 32),
        "layers.attn.q.kernel": (3, 32, 64),
        "layers.attn.k.kernel": (3, 32, 32),
        "layers.attn.v.kernel": (3, 32, 32),
        "layers.attn.o.kernel": (3, 64, 32),
        "layers.attn.q_norm.scale": (3, 16),
        "layers.attn.k_norm.scale": (3, 16),
        "layers.mlp_norm.scale": (3, 32),
        "layers.mlp.gate.kernel": (3, 32, 48),
        "layers.mlp.up.kernel": (3, 32, 48),
        "layers.mlp.down.kernel": (3, 48, 32),
        "final_norm.scale": (32,),
        "head.kernel": (32, 96),
    }


@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen3", "qwen2", "gemma3"])
def test_logical_axes_name_every_dimension(name):
    model = load(name)[0]
    config = model.config
    sizes = {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "heads_in": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
        "mlp_in": config.intermediate_size,
        "head_dim": config.head_dim,
        "head_embed": config.hidden_size,
        "head_vocab": config.vocab_size,
    }
    axes = jax.tree.leaves(model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple))
    for names, leaf in zip(axes, jax.tree.leaves(model.abstract()), strict=True):
        assert tuple(sizes[axis] for axis in names) == leaf.shape


def test_initialisation():
    config = DecoderConfig("llama", 512, 64, 128, 2, 4, 2, 16, mlp_bias=True, initializer_range=0.05)
    init = jax.jit(LanguageModel(config).init, static_argnums=1)
    params = init(jax.random.key(3), jnp.bfloat16)
    kernel = params["layers"]["mlp"]["down"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    for weight in (kernel, params["embed"]["embedding"], params["head"]["kernel"]):
        assert abs(float(jnp.std(weight.astype(jnp.float32))) - 0.05) < 0.002
    assert not np.array_equal(kernel[0], kernel[1])
    assert not np.any(params["layers"]["mlp"]["down"]["bias"])
    assert np.all(params["layers"]["attn_norm"]["scale"] == 1)
    again = init(jax.random.key(3), jnp.bfloat16)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))
    state = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)))
    assert jax.tree.structure(state) == jax.tree.structure(params)


def test_compute_dtype_is_not_the_params_dtype():
    model, params = load("llama3")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    wide = hidden(model, half, TOKENS)
    assert wide.dtype == jnp.float32
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    assert close(wide, hidden(model, rounded, TOKENS), 1e-5)
    low = hidden(model, params, TOKENS, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    assert jax.eval_shape(model.logits, params, low).dtype == jnp.float32
    assert close(low.astype(jnp.float32), hidden(model, params, TOKENS), 0.1)


def test_weight_nodes_stand_where_arrays_stood():
    model, params = load("llama3")
    layers = params["layers"]
    a, b = (0.2 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 32, 2), (3, 2, 32)]))
    gate = split_layers(layers["mlp"]["gate"]["kernel"], jnp.asarray([True, False, True]), 2)
    layers = {
        **layers,
        "attn": {**layers["attn"], "q": {"kernel": LowRank(layers["attn"]["q"]["kernel"], a, b)}},
        "mlp": {**layers["mlp"], "gate": {"kernel": gate}},
    }
    rewritten = {**params, "layers": layers}
    expected = logits(model, materialize(rewritten), TOKENS)
    assert close(logits(model, rewritten, TOKENS), expected, 1e-5)
    assert not close(expected, logits(model, params, TOKENS), 1e-3)


def test_a_bias_is_used_wherever_there_is_one():
    model, params = load("mistral")
    before = logits(model, params, TOKENS)
    for group, leaf, width in (("attn", "o", 32), ("mlp", "up", 48)):
        part = params["layers"][group]
        biased = {**part, leaf: {**part[leaf], "bias": jnp.ones((3, width))}}
        after = logits(model, {**params, "layers": {**params["layers"], group: biased}}, TOKENS)
        assert not close(after, before, 1e-3)
    headed = {**params, "head": {**params["head"], "bias": jnp.arange(96.0)}}
    np.testing.assert_allclose(logits(model, headed, TOKENS), before + np.arange(96), rtol=1e-5, atol=1e-5)


def test_every_site_is_reached():
    model, params = load("qwen2")
    before = logits(model, params, TOKENS)
    widths = {"attn.q": 32, "attn.k": 16, "attn.v": 16, "mlp.gate": 48, "mlp.up": 48}
    shapes = {name: (3, widths.get(name, 32)) for name in LAYER_SITES} | {"embed": (32,), "final_norm": (32,)}

    def with_sites(active):
        """Modules at every site, all but one doing nothing: other arrays, the same program."""
        sited = params
        for name, shape in shapes.items():
            shift = jnp.linspace(0, 1, int(np.prod(shape))).reshape(shape) * (name == active)
            module = ScaleShift(jnp.ones(shape), shift)
            sited = add_site(sited, name, module, layers="layers" if name in LAYER_SITES else None)
        return logits(model, sited, TOKENS)

    assert close(with_sites(None), before, 1e-6)
    for name in shapes:
        assert not close(with_sites(name), before, 1e-4), name


def test_the_program_does_not_grow_with_depth():
    def equations(num_layers):
        config = DecoderConfig("llama", 96, 32, 48, num_layers, 4, 2, 8)
        model = LanguageModel(config)
        jaxpr = jax.make_jaxpr(lambda p: jax.grad(lambda p: model.hidden(p, TOKENS).sum())(p))(model.abstract())
        return str(jaxpr).count("\n")

    assert equations(40) == equations(2)


@pytest.mark.parametrize(
    ("stages", "rows", "exchanges"), [((2, 4), 8, 2), ((2, 4), 4, 0), ((8,), 8, 0), ((), 8, 0)], ids=str
)
def test_looked_up_tokens_are_exchanged_in_stages_on_many_chips(stages, rows, exchanges, monkeypatch):
    """Where rows divide over them, and there are stages: else XLA moves them."""
    monkeypatch.setattr(reduction, "FEWEST", 8)
    config = DecoderConfig("llama", 96, 32, 48, 1, 4, 2, 8)
    model, tokens = LanguageModel(config), np.arange(rows * 12).reshape(rows, 12) % 96
    params = model.init(jax.random.key(0))
    expected = model.hidden(params, tokens)
    mesh = make_mesh(MeshConfig(fsdp=8))

    @jax.jit
    def hidden(params):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), reduction.scattered_in(stages):
            return model.hidden(params, tokens)

    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert str(jax.make_jaxpr(hidden)(placed)).count("all_to_all[") == exchanges
    np.testing.assert_allclose(hidden(placed), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("stages", "rows", "scatters"), [((2, 4), 8, 2), ((2, 4), 4, 0), ((), 8, 0)], ids=str)
def test_the_gradient_of_hidden_states_is_scattered_in_stages_on_many_chips(tied, stages, rows, scatters, monkeypatch):
    """Where rows divide over them: XLA would sum it whole on all of them. A head that is a node is left to XLA."""
    monkeypatch.setattr(reduction, "FEWEST", 8)
    config = DecoderConfig("llama", 96, 32, 48, 1, 4, 2, 8, tie_embeddings=tied)
    model, hidden = LanguageModel(config), jax.random.normal(jax.random.key(1), (rows, 12, 32))
    params = model.init(jax.random.key(0))
    mesh = make_mesh(MeshConfig(fsdp=8))

    def gradients(params, hidden):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(model.logits(*args))), (0, 1))(params, hidden)

    def on_mesh(params, hidden):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), reduction.scattered_in(stages):
            return gradients(params, hidden)

    placed = jax.device_put((params, hidden), NamedSharding(mesh, PartitionSpec()))
    assert str(jax.make_jaxpr(on_mesh)(*placed)).count("reduce_scatter[") == scatters
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, jax.jit(on_mesh)(*placed), gradients(params, hidden))
    if not tied:
        head = {"kernel": LowRank(params["head"]["kernel"], jnp.ones((32, 2)), jnp.ones((2, 96)))}
        assert "reduce_scatter[" not in str(jax.make_jaxpr(on_mesh)(params | {"head": head}, hidden))


def constrained(jaxpr):
    """`(primitive that made it, shape, spec)` of every array whose layout is stated in a program."""
    made = {v: e.primitive.name for e in jaxpr.eqns for v in e.outvars}
    for e in jaxpr.eqns:
        if e.primitive.name == "sharding_constraint" and not isinstance(e.invars[0], Literal):
            yield made.get(e.invars[0]), e.invars[0].aval.shape, tuple(e.params["sharding"].spec)
        for inner in jaxprs_in_params(e.params):
            yield from constrained(inner)


def summed_by_device(jaxpr):
    """`(shape, spec)` of every array that devices make of their own parts with a sum by index."""
    for e in jaxpr.eqns:
        inner = list(jaxprs_in_params(e.params))
        if e.primitive.name == "shard_map" and any("scatter-add" in str(j) for j in inner):
            yield from ((v.aval.shape, tuple(spec)) for v, spec in zip(e.outvars, e.params["out_specs"], strict=True))
        for j in inner:
            yield from summed_by_device(j)


@pytest.mark.parametrize("copies", [1, 2])
def test_gradients_of_the_table_and_of_hidden_states_lie_where_their_parts_are_added(copies):
    """That of a looked-up table by width, that of hidden states by rows: XLA would sum either whole on all devices."""
    config = DecoderConfig(
        model_type="llama", vocab_size=96, hidden_size=40, intermediate_size=56, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=24, tie_embeddings=True,
    )  # fmt: skip
    model, tokens = LanguageModel(config), np.zeros((8, 16), np.int32)

    def scores(params):
        return jnp.sum(model.logits(params, model.hidden(params, tokens, remat="none")))

    with jax.set_mesh(make_mesh(MeshConfig(data=copies, fsdp=8 // copies))):
        jaxpr = jax.make_jaxpr(jax.grad(scores))(model.abstract()).jaxpr
    stated, table = set(constrained(jaxpr)), ((96, 40), (None, "fsdp"))
    assert table in (set(summed_by_device(jaxpr)) if copies > 1 else {found[1:] for found in stated if found[0]})
    batch = ("data", "fsdp") if copies > 1 else "fsdp"
    assert ("dot_general", (8, 16, 40), (batch, None, None)) in stated

"""Generation: the tokens of transformers, for any padding, with every way to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxft.decoding import generate, sample
from jaxft.decoding.generate import CHUNK, _generate_chunk, _prefill, bucket
from jaxft.errors import JaxftError
from jaxft.hub import load_pretrained
from jaxft.models import LanguageModel
from jaxft.weights import LowRank, SoftPrompt, add_site, materialize
from tests.tiny_models import checkpoint, torch_model

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 9, 11], [20]]


def load(name):
    return load_pretrained(checkpoint(name), dtype=jnp.float32)


def continued_by_transformers(name, prompt, count, eos):
    with torch.no_grad():
        out = torch_model(name).generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2-windows", "qwen3", "qwen3-moe", "gemma2", "gemma3"])
def test_greedy_is_that_of_transformers(name):
    model, params = load(name)
    count = CHUNK + 3  # more than one chunk, and further than the windows reach
    for prompt, result in zip(
        PROMPTS, generate(model, params, PROMPTS, max_new_tokens=count, eos_token_ids=()), strict=True
    ):
        assert result.tokens == continued_by_transformers(name, prompt, count, -1)
        assert (result.finish, result.text) == ("length", None)


def test_several_end_tokens():
    model, params = load("llama3")
    free = generate(model, params, PROMPTS, max_new_tokens=20, eos_token_ids=())
    eos = sorted({free[0].tokens[4], free[1].tokens[9]})
    for prompt, result in zip(
        PROMPTS, generate(model, params, PROMPTS, max_new_tokens=20, eos_token_ids=eos), strict=True
    ):
        assert result.tokens == continued_by_transformers("llama3", prompt, 20, eos)
        assert result.finish == ("eos" if result.tokens[-1] in eos else "length")
    by_config = LanguageModel(model.config, {"eos_token_id": eos})
    assert generate(by_config, params, PROMPTS, max_new_tokens=20)[0].finish == "eos"


def test_rows_do_not_depend_on_each_other():
    model, params = load("llama3")
    for settings in ({}, {"temperature": 1.0, "top_k": 20, "seed": 3}):
        together = generate(model, params, PROMPTS, max_new_tokens=8, eos_token_ids=(), **settings)
        first = generate(model, params, PROMPTS[:1], max_new_tokens=8, eos_token_ids=(), **settings)
        assert first[0].tokens == together[0].tokens


def test_sampling_is_repeatable_and_seeded():
    model, params = load("llama3")

    def run(seed, **settings):
        arguments = {"temperature": 1.0, "eos_token_ids": (), "max_new_tokens": 12, **settings}
        return [result.tokens for result in generate(model, params, PROMPTS, seed=seed, **arguments)]

    assert run(0) == run(0) != run(1)
    greedy = run(0, temperature=0.0)
    assert run(0, top_k=1) == greedy
    assert run(0, top_p=1e-6) == greedy
    assert run(0, temperature=1e-4) == greedy


def test_weight_nodes_and_soft_prompts():
    model, params = load("llama3")
    a, b = (0.2 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 32, 2), (3, 2, 48)]))
    up = {"kernel": LowRank(params["layers"]["mlp"]["up"]["kernel"], a, b)}
    layers = {**params["layers"], "mlp": {**params["layers"]["mlp"], "up": up}}
    rewritten = {**params, "layers": layers}
    plain = generate(model, materialize(rewritten), PROMPTS, max_new_tokens=8, eos_token_ids=())
    assert generate(model, rewritten, PROMPTS, max_new_tokens=8, eos_token_ids=()) == plain

    # A soft prompt made of the embeddings of tokens 30, 31 does what these tokens do in front of the prompt.
    prompt = SoftPrompt(params["embed"]["embedding"][jnp.array([30, 31])])
    prompted = add_site(params, "prompt", prompt, layers=None)
    with_tokens = generate(model, params, [[30, 31, *p] for p in PROMPTS], max_new_tokens=8, eos_token_ids=())
    assert generate(model, prompted, PROMPTS, max_new_tokens=8, eos_token_ids=()) == with_tokens


def test_on_a_mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 (virtual) devices")
    model, params = load("llama3")
    expected = generate(model, params, PROMPTS + PROMPTS[:1], max_new_tokens=6, eos_token_ids=())
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    names = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    placed = jax.tree.map(
        lambda axes, a: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*(names.get(axis) for axis in axes)))),
        model.logical_axes(),
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    with jax.set_mesh(mesh):
        assert generate(model, placed, PROMPTS + PROMPTS[:1], max_new_tokens=6, eos_token_ids=()) == expected


def test_other_lengths_compile_nothing():
    model, params = load("llama3")

    def run(prompts, **settings):
        generate(model, params, prompts, max_new_tokens=4, eos_token_ids=(), **settings)

    run(PROMPTS, temperature=0.7)
    before = _prefill._cache_size(), _generate_chunk._cache_size()
    run([[3] * 16, [4], [5, 6]], temperature=0.9, top_k=3, top_p=0.5, seed=9)
    assert (_prefill._cache_size(), _generate_chunk._cache_size()) == before
    assert [bucket(n) for n in (1, 16, 17, 256, 257, 513)] == [16, 16, 32, 256, 512, 768]


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(96)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0")


def test_text_and_stop_strings(tokenizer):
    model, params = load("llama3")
    arguments = {"tokenizer": tokenizer, "max_new_tokens": 12, "eos_token_ids": ()}
    free = generate(model, params, ["w5 w6 w7"], **arguments)[0]
    assert free.tokens == generate(model, params, [[5, 6, 7]], max_new_tokens=12, eos_token_ids=())[0].tokens
    words = free.text.split()
    assert words == [f"w{token}" for token in free.tokens]
    first = words.index(words[6])
    stop = f" {words[6]}"
    stopped = generate(model, params, ["w5 w6 w7"], stop=["never", stop], **arguments)[0]
    assert stopped.finish == "stop"
    assert stopped.text == free.text[: free.text.find(stop)]
    assert stop not in stopped.text and len(stopped.tokens) <= first + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop": ["x"]}, "stop strings need a tokenizer"),
        ({"stop": "x"}, 'stop is the string "x": expected a list'),
        ({"prompts": [[]]}, "prompt 0 has no tokens"),
        ({"prompts": [[1], [96]]}, "prompt 1 holds token ids 96 to 96: expected 0 to 95"),
        ({"prompts": ["text"]}, "prompt 0 is a string: a tokenizer is needed"),
        ({"eos_token_ids": range(17)}, "17 tokens end a row, expected at most 16"),
        ({"prompts": [[5], [5] * 40], "max_new_tokens": 25}, "prompt 1 has 40 .* 64 positions.*max_new_tokens to 24"),
        ({"prompts": [[5] * 70], "max_new_tokens": 1}, "prompt 0 has 70 .*shorten it"),
    ],
)
def test_settings_out_of_range(settings, message):
    model, params = load("llama3")
    with pytest.raises(JaxftError, match=message):
        generate(model, params, **{"prompts": PROMPTS, **settings})


def test_no_prompts_give_no_results():
    model, params = load("llama3")
    assert generate(model, params, []) == []


def test_sample_draws_from_the_cut_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))

    def frequencies(**settings):
        settings = {"temperature": 1.0, "top_k": 4, "top_p": 1.0} | settings
        count = 20000
        drawn = sample(
            jnp.tile(logits, (count, 1)),
            jax.random.split(jax.random.key(0), count),
            jnp.float32(settings["temperature"]),
            jnp.int32(settings["top_k"]),
            jnp.float32(settings["top_p"]),
        )
        return np.bincount(drawn, minlength=4) / count

    def expect(found, weights):
        np.testing.assert_allclose(found, np.array(weights) / np.sum(weights), atol=0.015)

    expect(frequencies(), [0.5, 0.3, 0.15, 0.05])
    expect(frequencies(temperature=0.5), [0.25, 0.09, 0.0225, 0.0025])
    expect(frequencies(top_k=2), [0.5, 0.3, 0, 0])
    expect(frequencies(top_p=0.7), [0.5, 0.3, 0, 0])
    expect(frequencies(top_p=0.81), [0.5, 0.3, 0.15, 0])
    expect(frequencies(top_k=3, top_p=0.8), [0.5, 0.3, 0, 0])  # 0.8 of the 0.95 that top_k leaves
    expect(frequencies(top_p=0.1), [1, 0, 0, 0])

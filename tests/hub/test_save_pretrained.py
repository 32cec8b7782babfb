"""Export: the same tensors back, read by transformers with the same logits, and never half a directory."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxft.errors import JaxftError
from jaxft.hub import load_pretrained, load_tokenizer, save_pretrained
from jaxft.hub import save as save_module
from jaxft.weights import LowRank, ScaleShift, add_site
from tests.tiny_models import CONFIGS, checkpoint, torch_logits

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 12))


def load(name, dtype=jnp.float32):
    return load_pretrained(checkpoint(name), dtype=dtype)


def reload(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def our_logits(model, params):
    return np.asarray(jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(params, jnp.asarray(TOKENS)))


def same(a, b):
    return np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise(name, tmp_path):
    model, params = load(name)
    save_pretrained(tmp_path / "out", model, params)
    before, after = load_file(checkpoint(name) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        np.testing.assert_array_equal(before[tensor], after[tensor])
    assert load_pretrained(tmp_path / "out", dtype=jnp.float32)[0] == model
    assert same(torch_logits(reload(tmp_path / "out"), TOKENS), our_logits(model, params))


def test_dtype_of_config_and_tensors_agree(tmp_path):
    model, params = load("llama3")
    for dtype in ("float32", "bfloat16", "float16"):
        directory = save_pretrained(tmp_path / dtype, model, params, dtype=dtype)
        assert json.loads((directory / "config.json").read_text())["dtype"] == dtype
        assert {array.dtype.name for array in load_file(directory / "model.safetensors").values()} == {dtype}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    directory = save_pretrained(tmp_path / "default", model, half)
    assert {array.dtype.name for array in load_file(directory / "model.safetensors").values()} == {"bfloat16"}
    with pytest.raises(JaxftError, match="dtype int8 cannot be exported"):
        save_pretrained(tmp_path / "int8", model, params, dtype="int8")


def test_several_files_with_an_index(tmp_path):
    model, params = load("qwen3")
    directory = save_pretrained(tmp_path / "out", model, params, max_shard_bytes=30_000)
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert set(index["weight_map"].values()) == set(files)
    for a, b in zip(jax.tree.leaves(load_pretrained(directory, dtype=None)[1]), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert same(torch_logits(reload(directory), TOKENS), our_logits(model, params))


@pytest.mark.parametrize(
    ("name", "biased", "model_type"),
    [
        ("llama3", ("attn.q", "mlp.down"), "llama"),
        ("qwen3", ("attn.o",), "qwen3"),
        ("qwen2", ("attn.o", "mlp.up"), "llama"),
    ],
)
def test_added_biases_are_exported(name, biased, model_type, tmp_path):
    model, params = load(name)
    layers = dict(params["layers"])
    for i, path in enumerate(biased):
        group, leaf = path.split(".")
        width = layers[group][leaf]["kernel"].shape[-1]
        bias = jax.random.normal(jax.random.key(i), (3, width))
        layers[group] = {**layers[group], leaf: {**layers[group][leaf], "bias": bias}}
    params = {**params, "layers": layers}
    directory = save_pretrained(tmp_path / "out", model, params)
    assert json.loads((directory / "config.json").read_text())["model_type"] == model_type
    expected = our_logits(model, params)
    assert same(torch_logits(reload(directory), TOKENS), expected)
    assert same(our_logits(*load_pretrained(directory, dtype=jnp.float32)), expected)


def test_biases_that_fit_nowhere_are_refused(tmp_path):
    model, params = load("mistral")
    q = {**params["layers"]["attn"]["q"], "bias": jnp.ones((3, 64))}
    layers = {**params["layers"], "attn": {**params["layers"]["attn"], "q": q}}
    with pytest.raises(JaxftError, match="mistral cannot hold biases on attn.q"):
        save_pretrained(tmp_path / "out", model, {**params, "layers": layers})
    assert not (tmp_path / "out").exists()


def test_nodes_are_written_as_what_they_mean(tmp_path):
    model, params = load("llama3")
    a, b = (0.2 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(3, 32, 2), (3, 2, 48)]))
    up = {"kernel": LowRank(params["layers"]["mlp"]["up"]["kernel"], a, b)}
    layers = {**params["layers"], "mlp": {**params["layers"]["mlp"], "up": up}}
    rewritten = {**params, "layers": layers}
    directory = save_pretrained(tmp_path / "out", model, rewritten)
    assert same(torch_logits(reload(directory), TOKENS), our_logits(model, rewritten))
    sited = add_site(params, "attn.q", ScaleShift(jnp.ones((3, 32))))
    with pytest.raises(JaxftError, match="modules at sites have no place in a Hugging Face model"):
        save_pretrained(tmp_path / "sited", model, sited)


def test_an_untied_head_and_a_resized_vocabulary_are_described(tmp_path):
    model, params = load("qwen2")
    embedding = jnp.concatenate([params["embed"]["embedding"], jnp.ones((4, 32))])
    params = {**params, "embed": {"embedding": embedding}, "head": {"kernel": embedding.T * 2}}
    directory = save_pretrained(tmp_path / "out", model, params)
    written = json.loads((directory / "config.json").read_text())
    assert written["vocab_size"] == 100 and written["tie_word_embeddings"] is False
    assert same(torch_logits(reload(directory), TOKENS), our_logits(model, params))


def test_params_of_another_model_are_refused(tmp_path):
    model, params = load("llama3")
    lacking = {key: value for key, value in params.items() if key != "final_norm"}
    with pytest.raises(JaxftError, match="missing .*final_norm.scale"):
        save_pretrained(tmp_path / "out", model, lacking)
    with pytest.raises(JaxftError, match=r"layers.mlp.down.kernel has shape \[3, 48, 32\]"):
        save_pretrained(tmp_path / "out", model.__class__(model.config.replace(intermediate_size=50)), params)


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    model, params = load("llama3")
    before = os.umask(0o027)
    try:
        save_pretrained(tmp_path / "out", model, params)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


def test_an_existing_result_is_kept_unless_asked(tmp_path):
    model, params = load("llama3")
    directory = tmp_path / "out"
    directory.mkdir()
    save_pretrained(directory, model, params)  # an empty directory is no result
    with pytest.raises(JaxftError, match="is not empty: choose another directory, or ask to overwrite it"):
        save_pretrained(directory, model, params)
    (directory / "stale.txt").write_text("old")
    save_pretrained(directory, model, params, overwrite=True)
    assert sorted(os.listdir(directory)) == ["config.json", "generation_config.json", "model.safetensors"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_text("precious")
    with pytest.raises(JaxftError, match="holds no config.json"):
        save_pretrained(other, model, params, overwrite=True)
    assert os.listdir(other) == ["holiday.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["out", "photos"]


@pytest.mark.parametrize("fails", ["_write_shard", "_write_rest", "_move"])
def test_a_failed_write_leaves_nothing_behind(fails, tmp_path, monkeypatch):
    model, params = load("llama3")
    save_pretrained(tmp_path / "out", model, params)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module, fails, full)
    with pytest.raises(JaxftError, match="could not be written: .*No space left on device"):
        save_pretrained(tmp_path / "out", model, params, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_sharded_params(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (virtual) devices")
    model, params = load("llama3")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    placed = jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec(None, "fsdp"))) if a.ndim == 3 else a, params
    )
    save_pretrained(tmp_path / "out", model, placed)
    before, after = (
        load_file(checkpoint("llama3") / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])


def test_the_tokenizer_and_generation_config_go_along(tmp_path):
    words = {f"w{i}": i for i in range(96)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model, params = load("llama3")
    model = model.__class__(model.config, {"eos_token_id": [2, 3], "temperature": 0.6})
    directory = save_pretrained(tmp_path / "out", model, params, tokenizer)
    again = load_tokenizer(directory)
    assert again("w4 w5")["input_ids"] == [4, 5]
    assert again.chat_template == tokenizer.chat_template
    assert transformers.GenerationConfig.from_pretrained(directory).eos_token_id == [2, 3]

"""Loading: strict, sliced to what devices hold, of the dtype asked for, and understandable when refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxft.errors import JaxftError
from jaxft.hub import load as load_module
from jaxft.hub import load_model, load_pretrained, load_tokenizer
from tests.tiny_models import checkpoint, gemma_with_images, torch_logits, torch_model


@pytest.fixture
def copy(tmp_path):
    """A checkpoint that may be damaged: a function from a model's name to (directory, rewrite of its tensors)."""

    def make(name):
        directory = tmp_path / name
        shutil.copytree(checkpoint(name), directory)

        def rewrite(change):
            file = directory / "model.safetensors"
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})

        return directory, rewrite

    return make


def test_values_are_those_of_the_file():
    _, params = load_pretrained(checkpoint("llama3"), dtype=jnp.float32)
    state = torch_model("llama3").state_dict()
    for layer in range(3):
        expected = state[f"model.layers.{layer}.mlp.down_proj.weight"].numpy().T
        np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][layer], expected)
    np.testing.assert_array_equal(params["head"]["kernel"], state["lm_head.weight"].numpy().T)
    np.testing.assert_array_equal(params["embed"]["embedding"], state["model.embed_tokens.weight"].numpy())


def test_dtype_is_the_one_asked_for_or_that_of_the_file(copy):
    directory, rewrite = copy("llama3")
    _, params = load_pretrained(directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    rewrite(lambda tensors: tensors.update({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}))
    _, params = load_pretrained(directory, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    _, params = load_pretrained(directory, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_sharded_loading_reads_only_the_shards(monkeypatch):
    if jax.device_count() < 8:
        pytest.skip("needs 8 (virtual) devices")
    directory = checkpoint("qwen3")
    model, whole = load_pretrained(directory, dtype=jnp.float32)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    names = {"embed": "fsdp", "vocab": "tensor"}
    names |= dict.fromkeys(("heads", "heads_in", "kv_heads", "mlp", "mlp_in"), "tensor")
    shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, PartitionSpec(*(names.get(axis) for axis in axes))),
        model.logical_axes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    sizes = []
    empty = np.empty
    monkeypatch.setattr(load_module.np, "empty", lambda shape, dtype: sizes.append(empty(shape, dtype)) or sizes[-1])
    _, params = load_pretrained(directory, dtype=jnp.float32, sharding=shardings)
    monkeypatch.undo()
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert params["layers"]["mlp"]["up"]["kernel"].sharding == shardings["layers"]["mlp"]["up"]["kernel"]
    total = sum(leaf.size for leaf in jax.tree.leaves(whole["layers"]) if leaf.ndim == 3)
    kernels = [array for array in sizes if array.ndim == 3 and array.dtype == np.float32]
    assert max(array.size for array in kernels) == 3 * 32 * 64 // 8  # an eighth of the largest
    assert sum(array.size for array in kernels) == total  # and no shard was read twice


def test_files_in_several_shards(tmp_path):
    torch_model("qwen2").save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _, params = load_pretrained(tmp_path, dtype=jnp.float32)
    _, expected = load_pretrained(checkpoint("qwen2"), dtype=jnp.float32)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(JaxftError, match=f"{lost.name}: named in model.safetensors.index.json, but not there"):
        load_pretrained(tmp_path, dtype=jnp.float32)


def test_missing_and_unexpected_tensors_are_all_listed(copy):
    directory, rewrite = copy("llama3")

    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)

    rewrite(damage)
    with pytest.raises(JaxftError) as error:
        load_pretrained(directory, dtype=jnp.float32)
    assert "missing model.layers.1.mlp.up_proj.weight, model.norm.weight" in str(error.value)
    assert "unexpected model.layers.3.mlp.up_proj.weight" in str(error.value)


def test_biases_the_config_does_not_announce_are_unexpected(copy):
    directory, rewrite = copy("llama3")
    rewrite(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}))
    with pytest.raises(JaxftError, match="unexpected model.layers.0.self_attn.q_proj.bias"):
        load_pretrained(directory, dtype=jnp.float32)


def test_what_may_be_ignored_is(copy):
    directory, rewrite = copy("llama-tied-biased")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(add)
    _, params = load_pretrained(directory, dtype=jnp.float32)
    assert "head" not in params
    rewrite(lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(JaxftError, match='lm_head.weight differs from .* "tie_word_embeddings": false'):
        load_pretrained(directory, dtype=jnp.float32)


@pytest.mark.parametrize("spelling", ["hub", "transformers"])
def test_the_language_model_of_one_that_reads_images_is_loaded(spelling, tmp_path):
    """As the hub names its tensors (`language_model.model...`), and as transformers 5 does inside."""
    whole = gemma_with_images()
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    names = load_file(file) if spelling == "hub" else {k: v.numpy() for k, v in whole.state_dict().items()}
    names.pop("lm_head.weight", None)  # tied
    prefix = {"hub": "language_model.model.", "transformers": "model.language_model."}[spelling]
    assert any(name.startswith(prefix) for name in names) and any("vision_tower" in name for name in names)
    save_file(names, file, metadata={"format": "pt"})
    model, params = load_pretrained(tmp_path, dtype=jnp.float32)
    assert model.config.model_type == "gemma3_text" and model.config.num_layers == 3
    tokens = np.random.default_rng(0).integers(3, 90, (2, 12))
    expected = torch_logits(whole, tokens)
    logits = model.logits(params, model.hidden(params, jnp.asarray(tokens)))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_wrong_shape_is_named(copy):
    directory, rewrite = copy("llama3")
    rewrite(lambda tensors: tensors.update({"model.norm.weight": np.ones(31, np.float32)}))
    with pytest.raises(JaxftError, match=r"model.norm.weight has shape \[31\], config.json makes it \[32\]"):
        load_pretrained(directory, dtype=jnp.float32)


def test_files_that_cannot_be_read(copy, tmp_path):
    directory, _ = copy("llama3")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(JaxftError, match="model.safetensors: not a readable safetensors file"):
        load_pretrained(directory, dtype=jnp.float32)
    weights.unlink()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(JaxftError, match="pytorch_model.bin is in PyTorch's format"):
        load_pretrained(directory, dtype=jnp.float32)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "gpt2"}))
    with pytest.raises(JaxftError, match=r'config.json: model_type "gpt2" is not supported'):
        load_model(directory)
    config.write_text("{")
    with pytest.raises(JaxftError, match="config.json: not valid JSON"):
        load_model(directory)
    config.unlink()
    with pytest.raises(JaxftError, match="config.json: there is no such file"):
        load_model(directory)
    with pytest.raises(JaxftError, match="holds no tokenizer"):
        load_tokenizer(directory)


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", None])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_tokenizer_is_the_one_that_transformers_finds(declared, model_type, tmp_path):
    nano = load_module.resolve("nano")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        document = json.loads((nano / name).read_text())
        if name == "tokenizer_config.json":
            document["tokenizer_class"] = declared
        elif name == "config.json":
            document["model_type"] = model_type
        (tmp_path / name).write_text(json.dumps(document))
    found, expected = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "<|user|>A list, of  words.<|end|>\n\n    x = 1"
    assert type(found) is type(expected) and found(text) == expected(text)
    assert found.get_vocab() == expected.get_vocab()
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template
    assert found.model_max_length == expected.model_max_length


def test_names_that_lead_nowhere(monkeypatch, tmp_path):
    with pytest.raises(JaxftError, match="there is no such directory, and it is not a hub id"):
        load_model("no-such-model")
    with pytest.raises(JaxftError, match="is a file: expected a directory"):
        load_model(__file__)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(JaxftError, match="not in the local Hugging Face cache, and the hub cannot be reached"):
        load_model("nobody/no-such-model")


def test_the_generation_config_overrules_the_config(copy):
    directory, _ = copy("llama3")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6}))
    model = load_model(directory)
    assert model.generation_config == {"eos_token_id": [5, 6], "temperature": 0.6}
    assert hash(model) == hash(load_model(checkpoint("llama3")))

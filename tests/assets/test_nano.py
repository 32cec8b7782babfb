"""The embedded model's files: small, remade byte by byte, and what transformers makes of them."""

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxft.assets.build import NANO, SPECIAL_TOKENS, VOCAB_SIZE, build, train_tokenizer
from jaxft.data.builtin import BUILTIN_SOURCES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(NANO))


def test_all_of_it_is_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 8e6


def test_vocabulary_and_special_tokens(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer("text").input_ids == PreTrainedTokenizerFast.from_pretrained(str(NANO))("text").input_ids


@given(st.text())
@example("")
@example(" leading, double  spaces \n\n\ttabs\r\n and trailing ")
@example("héllo wörld 🎉 \u200b \U0010ffff")
def test_round_trip(text):
    tokenizer = _fast()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def _fast():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(NANO / "tokenizer.json"))


def test_it_compresses_its_own_language(tokenizer):
    texts = [row["text"] for row in BUILTIN_SOURCES["python-docs"]()][:200]
    tokens = sum(len(ids) for ids in tokenizer(texts, verbose=False).input_ids)
    assert sum(len(text.encode()) for text in texts) / tokens > 3


def test_chat_template(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|><|assistant|>"
    )
    # Each turn only adds to what was there, so that a mask of the answers can be made by rendering prefixes.
    assert text.startswith(tokenizer.apply_chat_template(turns[:3], tokenize=False))
    with pytest.raises(Exception, match="not narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


def test_training_again_gives_the_same_tokenizer():
    texts = [row["text"] for row in BUILTIN_SOURCES["python-docs"]()][:150]
    first, second = (train_tokenizer(texts, 600).to_str() for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(["one word"], 600)


def test_build_writes_what_is_shipped(tmp_path):
    """All but the merges, which depend on the Python version whose documentation is installed."""
    build(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes()
    assert len(AutoTokenizer.from_pretrained(str(tmp_path))) == VOCAB_SIZE


def test_both_recipes_hold_out_the_same_documents():
    """Otherwise the quickstart would measure forgetting on text that the model was pretrained on."""
    pretrain, quickstart = (
        yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("pretrain-nano.yaml", "quickstart.yaml")
    )
    trained = pretrain["data"]["sources"][0]
    retained = quickstart["evaluation"]["sets"]["python-docs"]
    assert (trained["path"], trained["holdout"], trained["part"]) == (retained["path"], retained["holdout"], "train")
    assert retained["part"] == "holdout"
    tuned, target = quickstart["data"]["sources"][0], quickstart["evaluation"]["sets"]["api-docs"]
    assert (tuned["path"], tuned["holdout"], tuned["part"]) == (target["path"], target["holdout"], "train")
    assert target["part"] == "holdout"

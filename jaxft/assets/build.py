"""Remakes the tokenizer and the config of the embedded model `nano`: `python -m jaxft.assets.build [DIRECTORY]`.

The tokenizer is a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) of `python-docs`, so
the same Python version gives the same bytes. The weights are trained by `jaxft train configs/pretrain-nano.yaml`.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxft.data.builtin import BUILTIN_SOURCES

NANO = Path(__file__).parent / "nano"
VOCAB_SIZE = 4096
MAX_POSITIONS = 1024

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, END_OF_TURN, "<|system|>", "<|user|>", "<|assistant|>")  # ids 0 to 4

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role not in ('system', 'user', 'assistant') %}"
    "{{- raise_exception('nano knows the roles system, user and assistant, not ' ~ message.role) }}"
    "{%- endif %}"
    "{{- '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(END_OF_TURN)],
    "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
}


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries, special tokens first; every string survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus is too small: {tokenizer.get_vocab_size()} tokens instead of {vocab_size}")
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build(directory: Path = NANO) -> None:
    """Write tokenizer.json, tokenizer_config.json, config.json and generation_config.json into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(row["text"] for row in BUILTIN_SOURCES["python-docs"]())
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITIONS,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(directory / "config.json", {"architectures": ["LlamaForCausalLM"], **ARCHITECTURE, "dtype": "bfloat16"})
    _write_json(
        directory / "generation_config.json",
        {name: ARCHITECTURE[name] for name in ("eos_token_id", "pad_token_id")},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Remake the tokenizer and the config of the embedded model.")
    parser.add_argument("directory", nargs="?", type=Path, default=NANO, help="default: inside the package")
    directory = parser.parse_args().directory
    build(directory)
    size = sum(path.stat().st_size for path in directory.iterdir() if path.suffix == ".json")
    print(f"{directory}: tokenizer of {VOCAB_SIZE} entries and config, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""A model, a tokenizer and data small enough to train in a second, written where a run finds them."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxft.config import RunConfig
from jaxft.hub import save_pretrained
from jaxft.models import DecoderConfig, LanguageModel

WORDS = [f"w{i}" for i in range(60)]

# What a run imports when it loads its tokenizer: a second, for every process that a test starts, unless the server from
# which processes are forked has done so.
IMPORTED_BY_RUNS = ("transformers.tokenization_utils_tokenizers",)


def write_tiny(directory: Path) -> Path:
    """Writes `model/`, `train.jsonl`, `held_out.jsonl` and `other.jsonl` into `directory`."""
    return shutil.copytree(_tiny(), directory, dirs_exist_ok=True)


@functools.cache
def _tiny() -> Path:
    """What every test has a copy of: drawing the model compiles a program for every operation."""
    directory = Path(tempfile.mkdtemp(prefix="tiny-"))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    config = DecoderConfig(
        model_type="llama",
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )
    model = LanguageModel(config)
    save_pretrained(directory / "model", model, model.init(jax.random.key(0)), wrapped)
    rng = np.random.default_rng(0)
    for name, rows, step in (("train", 96, 1), ("held_out", 12, 1), ("other", 12, 3)):
        with open(directory / f"{name}.jsonl", "w") as file:
            for _ in range(rows):
                start, length = rng.integers(60), rng.integers(8, 24)
                words = [WORDS[(start + step * i) % 60] for i in range(length)]
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return directory


def tiny_config(directory: Path, output: Path, **sections: dict[str, Any]) -> RunConfig:
    """A checked configuration of a short run; `sections` are merged into it."""
    tree: dict[str, Any] = {
        "model": {"path": str(directory / "model")},
        "method": {"name": "lora", "rank": 4},
        "data": {"sources": [{"path": str(directory / "train.jsonl")}], "seq_len": 32, "batch_size": 8},
        "evaluation": {
            "sets": {
                "held_out": {"path": str(directory / "held_out.jsonl"), "kind": "target"},
                "other": {"path": str(directory / "other.jsonl"), "kind": "retained"},
            }
        },
        "training": {"steps": 12, "learning_rate": 1e-2},
        "checkpoint": {"every": 3},
        "logging": {"every": 1, "tensorboard": False},
        "output": str(output),
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) and name != "method" else section
    return RunConfig.model_validate(tree)

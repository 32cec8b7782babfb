"""Every example runs, and does what it says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    here = Path(__file__).read_text()
    assert [p.stem for p in EXAMPLES.glob("*.py") if f'load("{p.stem}")' not in here] == []


def test_chain(tmp_path: Path) -> None:
    losses = load("chain").main(str(tmp_path / "out"), steps=5)
    assert losses[-1] < losses[0]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "llama"


def test_choose_what_trains() -> None:
    counts = load("choose_what_trains").main()
    assert len(counts) == 5 and all(counts.values())


def test_linen_model() -> None:
    before, after = load("linen_model").main()
    assert after < 0.5 * before

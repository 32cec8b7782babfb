import json
from pathlib import Path

import jax
import pytest
import yaml

import jaxft
from jaxft.config import RunConfig, check_files, load_config, parse_config
from jaxft.config_docs import HEADER, document, methods_document
from jaxft.config_source import ConfigError, override, parse_value, parse_yaml
from jaxft.distributed import MeshConfig, make_mesh
from jaxft.distributed.automatic import abstract_run
from jaxft.hub import load_model
from jaxft.methods import methods

ROOT = Path(__file__).resolve().parent.parent
RUN = """\
model:
  path: nano
method:
  name: lora
  rank: 8
data:
  sources:
    - path: train.jsonl
      weight: 1
  seq_len: 64
  batch_size: 8
evaluation:
  sets:
    held_out: {path: held_out.jsonl, kind: target}
training:
  steps: 10
  optimizer: {name: adamw, b1: 0.8}
  learning_rate: {name: cosine, peak: 1e-3}
output: outputs/run
"""


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, name="run.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_a_valid_configuration_has_every_default():
    config = parse_config(RUN)
    assert config.training.learning_rate.options() == {"peak": 0.001}
    assert config.method == [{"name": "lora", **{o.name: o.default for o in methods()["lora"].options}, "rank": 8}]
    assert config.checkpoint.keep_last == 2 and config.mesh.data == -1 and config.seed == 0


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "suggestion"),
    [
        ("seq_len: 64", "seqlen: 64", 10, "data.seqlen", "seq_len"),
        ("training:", "trainign:", 15, "trainign", "training"),
        ("path: nano", "path: nano\n  atention: xla", 3, "model.atention", "attention"),
        ("rank: 8", "rnak: 8", 5, "method.rnak", "rank"),
        ("weight: 1", "wieght: 1", 9, "data.sources.0.wieght", "weight"),
        ("kind: target", "kidn: target", 14, "evaluation.sets.held_out.kidn", "kind"),
        ("kind: target", "kind: tarket", 14, "evaluation.sets.held_out.kind", "target"),
        ("name: lora", "name: lroa", 3, "method", "lora"),
        ("steps: 10", "stpes: 10", 16, "training.stpes", "steps"),
        ("name: adamw", "name: adamv", 17, "training.optimizer", "adamw"),
        ("b1: 0.8", "beta1: 0.8", 17, "training.optimizer", "b1"),
        ("peak: 1e-3", "paek: 1e-3", 18, "training.learning_rate", "peak"),
        ("name: cosine", "name: cosin", 18, "training.learning_rate", "cosine"),
    ],
)
def test_a_typo_at_any_depth_is_found_with_its_line_and_the_nearest_name(old, new, line, key, suggestion):
    text = RUN.replace(old, new)
    assert text != RUN
    found = [e for e in errors(text) if e.startswith(f"run.yaml:{line}: {key}: ")]
    assert found, errors(text)
    assert suggestion in found[0].split(key, 1)[1]


@pytest.mark.parametrize(
    ("assignment", "key", "words"),
    [
        ("data.seq_len=abc", "data.seq_len", ["expected an integer", "'abc'"]),
        ("data.seq_len=1", "data.seq_len", ["at least 2", "1"]),
        ("data.packing=perhaps", "data.packing", ["true or false", "'perhaps'"]),
        ("data.sources={}", "data.sources", ["expected a list", "a mapping"]),
        ("data.sources=[]", "data.sources", ["must not be empty"]),
        ("data.sources.0.path=[a]", "data.sources.0.path", ["expected text"]),
        ("model=nano", "model", ["mapping of the keys", "path"]),
        ("seed=-1", "seed", ["at least 0", "-1"]),
        ("training.clip_norm=0", "training.clip_norm", ["greater than 0"]),
        ("model.compute_dtype=float23", "model.compute_dtype", ["float32"]),
        ("model.attention=flash", "model.attention", ['did you mean "splash"', "cudnn"]),
        ("model.attention=splash:128", "model.attention", ['as in "splash:128x256"']),
        ("mesh.fsdp=0", "mesh", ["mesh.fsdp", "0"]),
        ("method.rank=high", "method.rank", ["expected an integer", "'high'"]),
        ("method=3", "method", ["a method is a name"]),
        ("method=[]", "method", ["must not be empty"]),
        ("method=LoRA", "method", ['did you mean "lora"']),
        ("method={lora: {rank: 4}}", "method", ["write {name: lora"]),
        ("method={name: lora, rank: -1}", "method", ["rank=-1", "at least 1"]),
        ("output=''", "output", ["must not be empty"]),
        ("model.path=''", "model.path", ["must not be empty"]),
        ("training.learning_rate='1e-3'", "training.learning_rate", ["a number", "'1e-3' (text)", "cosine"]),
        ("training.learning_rate=.nan", "training.learning_rate", ["finite"]),
        ("training.optimizer=adamv", "training.optimizer", ["adamw"]),
        ("training.optimizer={name: adamw, b1: 2}", "training.optimizer", ["b1", "below 1"]),
        ("training.optimizer={name: adamw, weight_decay: -1}", "training.optimizer", ["weight_decay", "at least 0"]),
    ],
)
def test_a_wrong_type_or_value_is_named_with_what_is_expected(assignment, key, words):
    found = [e for e in errors(RUN, assignment) if f": {key}: " in e]
    assert found, errors(RUN, assignment)
    assert f"override '{assignment}'" in found[0]
    for word in words:
        assert word in found[0], found[0]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["training.accumulation=3"], "training.accumulation", ["8", "3", "1, 2, 4, 8"]),
        (["mesh.data=2", "mesh.fsdp=8"], "data.batch_size", ["16 devices", "multiple of 16"]),
        (["mesh.data=4", "training.accumulation=4"], "data.batch_size", ["multiple of 16"]),
        (["mesh.sequence=7"], "data.seq_len", ["64", "mesh.sequence = 7"]),
        (["data.seq_len=100000"], "data.seq_len", ["100000", "positions of this model"]),
        (["training.epochs=2"], "training", ["steps", "epochs"]),
        (["training.steps=null"], "training", ["steps", "epochs"]),
        (["data.epochs=2"], "data.epochs", ["training.epochs"]),
        (["checkpoint.metric=heldout.loss"], "checkpoint.metric", ["held_out.loss"]),
        (["checkpoint.metric=held_out.accuracy"], "checkpoint.metric", ["held_out"]),
        (["mesh.data=-1", "mesh.tensor=-1"], "mesh", ["only one axis"]),
        (["model.path=./nowhere"], "model.path", ["nowhere"]),
        (["training.learning_rate={name: cosine, peak: 1, warmup: 11}"], "training.learning_rate", ["11", "10"]),
        (["compare.overrides={lroa: {seed: 1}}"], "compare.overrides.lroa", ["lora"]),
        (["evaluation.sets={a.b: {path: x.txt}}"], "evaluation.sets.a.b", ["no dot"]),
    ],
)
def test_impossible_combinations_are_refused_before_anything_runs(overrides, key, words):
    found = [e for e in errors(RUN, *overrides) if f": {key}: " in e]
    assert found, errors(RUN, *overrides)
    for word in words:
        assert word in found[0], found[0]


def test_files_that_are_not_there_are_all_named_before_anything_is_read(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    overrides = ["data.chat_template=none.jinja", "evaluation.baseline=none.json"]
    config = parse_config(RUN, overrides, directory=tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_files(config)
    found = {problem.key: problem.message for problem in caught.value.problems}
    assert found.keys() == {"evaluation.sets.held_out.path", "data.chat_template", "evaluation.baseline"}
    (tmp_path / "held_out.jsonl").write_text('{"text": "x"}\n')
    check_files(parse_config(RUN, ["training.optimizer=sgd"], directory=tmp_path))


def test_all_errors_are_reported_at_once():
    text = RUN.replace("rank: 8", "rnak: 8").replace("seq_len: 64", "seq_len: x").replace("output:", "outptu:")
    found = errors(text)
    assert len(found) == 4  # the misspelled output is unknown, and the output missing
    assert {e.split(": ")[0] for e in found} == {"run.yaml:5", "run.yaml:10", "run.yaml:19", "run.yaml"}


def test_a_missing_section_says_what_it_is_for():
    found = errors("method: full\noutput: x\n")
    assert any("data: required" in e and "trained on" in e for e in found)
    assert any("training: required" in e for e in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1\n", ["run.yaml:3", "not valid YAML"]),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", ["run.yaml:4", "a.b", "written twice", "line 2"]),
        ("- 1\n- 2\n", ["must be a mapping", "list"]),
        ("a:\n\tb: 1\n", ["run.yaml:2", "not valid YAML"]),
        ("a: &x [*x]\n", ["run.yaml", "holds itself"]),
        ("a: " + 3000 * "[" + 3000 * "]", ["run.yaml", "nested too deep"]),
    ],
)
def test_text_that_is_not_a_mapping_of_distinct_keys_is_refused_with_its_line(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "run.yaml")
    for word in words:
        assert word in str(caught.value)


def test_yaml_follows_version_1_2():
    tree = parse_yaml("on: yes\nrate: 1e-3\noff: 010\nt: true\nn: ~\nf: 2.\ns: '1'\n", "x").tree
    assert tree == {"on": "yes", "rate": 0.001, "off": 10, "t": True, "n": None, "f": 2.0, "s": "1"}
    config = parse_config(RUN, ["method={name: lora, on: 'layers.attn.*'}"])
    assert config.method[0]["on"] == "layers.attn.*"


def test_overrides_reach_every_place():
    source = parse_yaml(RUN, "run.yaml")
    changed = override(
        source,
        [
            "training.steps=20",
            "data.sources.0.columns={prompt: q=a}",
            "data.sources.1.path=b=c.jsonl",
            "data.sources.1.weight=2.5",
            "evaluation.sets.more.path=x.txt",
            "logging.wandb=true",
            "model.frozen_dtype=null",
        ],
    ).tree
    assert changed["training"]["steps"] == 20
    assert changed["data"]["sources"][0]["columns"] == {"prompt": "q=a"}
    assert changed["data"]["sources"][1] == {"path": "b=c.jsonl", "weight": 2.5}
    assert changed["evaluation"]["sets"]["more"] == {"path": "x.txt"}
    assert changed["logging"] == {"wandb": True} and changed["model"]["frozen_dtype"] is None
    assert source.tree == parse_yaml(RUN, "run.yaml").tree  # the input is not changed


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.steps", ["key.sub=value"]),
        ("=3", ["key.sub=value"]),
        ("data.sources.5.path=x", ["list of 1", "index"]),
        ("training.steps.more=1", ["training.steps is 10", "not a mapping"]),
        ("data.sources=[1", ["not valid YAML"]),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(assignment, words):
    found = errors(RUN, assignment)
    for word in words:
        assert word in found[0]


def test_methods_as_name_mapping_and_chain():
    bare = RUN.replace("method:\n  name: lora\n  rank: 8\n", "method: lora\n")
    assert parse_config(bare).method[0]["name"] == "lora"
    assert parse_config(bare, ["method.rank=32"]).method[0]["rank"] == 32
    chain = parse_config(bare, ["method=[{name: lora, rank: 4}, hft]", "method.1.fraction=0.25"]).method
    assert [m["name"] for m in chain] == ["lora", "hft"] and chain[0]["rank"] == 4 and chain[1]["fraction"] == 0.25
    assert parse_config(RUN, ["method=hft"]).method[0]["name"] == "hft"  # the rank of the file is gone with its method
    found = errors(RUN, "method=[hft, {name: lora, rnk: 2}]")
    assert ": method.1.rnk: " in found[0] and "rank" in found[0]
    found = errors(RUN, "method=[hft, lora]", "method.rank=2")
    assert "list of 2" in found[0]


@pytest.mark.parametrize("entry", methods().values(), ids=lambda e: e.id)
def test_every_option_of_every_method_can_be_written(entry):
    spec = {"name": entry.id, **{o.name: o.default for o in entry.options}}
    config = parse_config(RUN, [f"method={json.dumps(spec)}"])
    assert config.method == [spec]
    assert errors(RUN, f"method={{name: {entry.id}, no_such_option: 1}}")[0].count("no_such_option") >= 1


def test_the_resolved_configuration_reads_back_the_same(tmp_path):
    config = parse_config(RUN, ["training.optimizer.weight_decay=1e-5", "evaluation.every=5"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.resolved(), sort_keys=False))
    assert load_config(tmp_path) == config
    assert load_config(tmp_path, ["method.rank=3"]).method[0]["rank"] == 3


def test_relative_paths_are_looked_for_beside_the_file_then_here(tmp_path, monkeypatch):
    beside, here = tmp_path / "configs", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
    for file in (beside / "train.jsonl", here / "train.jsonl", here / "held_out.jsonl"):
        file.write_text("{}\n")
    (beside / "run.yaml").write_text(RUN)
    monkeypatch.chdir(here)
    config = load_config("../configs/run.yaml")
    assert Path(config.data.sources[0].path).resolve() == beside / "train.jsonl"
    assert Path(config.evaluation.sets["held_out"].path).resolve() == here / "held_out.jsonl"
    assert config.output == "outputs/run"
    assert load_config("../configs/run.yaml", ["data.sources.0.path=*.jsonl"]).data.sources[0].path.endswith("/*.jsonl")
    missing = load_config("../configs/run.yaml", ["data.sources.0.path=gone.jsonl"])
    assert missing.data.sources[0].path == "gone.jsonl"


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.yaml").write_text(RUN)
    with pytest.raises(ConfigError, match="did you mean .*train.yaml"):
        load_config(tmp_path / "trian.yaml")


SHIPPED = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_configuration_is_valid(path):
    assert isinstance(load_config(path), RunConfig)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_can_cut_the_model_it_names(path):
    config = load_config(path)
    shapes = {"Qwen/Qwen3-0.6B-Base": "preset:qwen3-0.6b"}  # those without a download
    model = load_model(shapes.get(config.model.path, config.model.path))
    state, frozen = abstract_run(config, model, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert jax.tree.leaves(state.trainable)


def test_every_method_has_a_configuration():
    found = {p.stem for p in ROOT.glob("configs/methods/*.yaml")}
    assert found == set(methods()), "run: python -m jaxft.config_docs"
    for path in ROOT.glob("configs/methods/*.yaml"):
        assert load_config(path).method[0]["name"] == path.stem


def test_the_configurations_in_the_documentation_are_valid():
    found = 0
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for block in page.read_text(encoding="utf-8").split("```yaml\n")[1:] if page.is_file() else []:
            text = block.split("```")[0]
            if "data:" in text and "method:" in text and "training:" in text:
                parse_config(text, name=page.name)
                found += 1
    assert found >= 1 and "```yaml" in HEADER


@pytest.mark.parametrize(("page", "make"), [("configuration", document), ("methods", methods_document)])
def test_generated_pages_are_current(page, make):
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == make(), "run: make docs-generated"


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").splitlines()
    listed = [line.rsplit(".", 1)[-1] for line in page if line.startswith("::: ")]
    assert sorted(listed) == sorted({*jaxft.__all__, "deltas"} - {"__version__"})


def test_the_table_of_methods_has_each_once():
    page = methods_document()
    for entry in methods().values():
        assert page.count(f"[`{entry.id}`]") == 1 and page.count(f"## {entry.family.capitalize()}\n") == 1
        assert entry.url in page and all(f"`{option.name}: " in page for option in entry.options)


def test_parse_value_keeps_what_is_text():
    assert (
        parse_value("*.jsonl") == "*.jsonl"
        and parse_value("a=b") == "a=b"
        and parse_value("1.5") == 1.5
        and parse_value("{a: [1]}") == {"a": [1]}
    )

"""Which tokens train, under the chat templates of several families."""

import pytest

from jaxft.data.columns import Conversation, RowError
from jaxft.data.config import FormatConfig
from jaxft.data.templates import check_bos, render, resolve_template, tokenize_documents, tokenize_rendered
from jaxft.errors import JaxftError

ONE_TURN = [("user", "What is the capital of France?"), ("assistant", "Paris, é 😀 of course.")]
TWO_TURNS = [("user", "hello"), ("assistant", "world"), ("user", "and again hello"), ("assistant", "  the world\n")]
TURN_ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "<eos>",
    "phi": "<|end|>",
    "qwen3": "<|im_end|>",
}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def conversation(turns, **kwargs):
    return Conversation(tuple({"role": role, "content": content} for role, content in turns), **kwargs)


def trained_runs(tokenizer, example, **config):
    """All tokens, and the text of every run of trained ones."""
    template = resolve_template(FormatConfig(**config), tokenizer)
    [(tokens, mask)] = tokenize_rendered(template, [render(template, example)])
    runs, current = [], []
    for token, trained in [*zip(tokens.tolist(), mask.tolist(), strict=True), (0, False)]:
        if trained:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return tokens.tolist(), runs


@pytest.mark.parametrize("family", TURN_ENDS)
def test_one_turn_trains_exactly_the_answer_and_its_end(tokenizers, family):
    tokens, runs = trained_runs(tokenizers[family], conversation(ONE_TURN))
    thought = EMPTY_THOUGHT if family == "qwen3" else ""  # the model itself has to write it
    space = " " if family == "mistral" else ""  # one token with the first word
    assert runs == [f"{space}{thought}Paris, é 😀 of course.{TURN_ENDS[family]}"]
    messages = list(conversation(ONE_TURN).messages)
    assert tokens == tokenizers[family].apply_chat_template(messages, tokenize=True, return_dict=False)


@pytest.mark.parametrize("family", TURN_ENDS)
def test_every_answer_of_two_turns(tokenizers, family):
    end = TURN_ENDS[family]
    _, runs = trained_runs(tokenizers[family], conversation(TWO_TURNS))
    space = " " if family == "mistral" else ""
    thought = EMPTY_THOUGHT if family == "qwen3" else ""
    second = "the world" if family == "llama3" else "  the world\n"  # Llama's template trims
    assert runs == [f"{space}world{end}", f"{thought}{second}{end}"]


@pytest.mark.parametrize("family", TURN_ENDS)
def test_last_answer_only(tokenizers, family):
    _, every = trained_runs(tokenizers[family], conversation(TWO_TURNS))
    _, last = trained_runs(tokenizers[family], conversation(TWO_TURNS), loss_on="last")
    assert last == every[1:]


@pytest.mark.parametrize("family", TURN_ENDS)
def test_all_tokens(tokenizers, family):
    tokens, runs = trained_runs(tokenizers[family], conversation(TWO_TURNS), loss_on="all")
    assert runs == [tokenizers[family].decode(tokens)]


@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen3", "phi"])
def test_system_message_and_its_override(tokenizers, family):
    turns = [("system", "Be brief."), *ONE_TURN]
    tokens, runs = trained_runs(tokenizers[family], conversation(turns))
    overridden, same = trained_runs(tokenizers[family], conversation(turns), system="Be long.")
    assert "Be brief." in tokenizers[family].decode(tokens)
    decoded = tokenizers[family].decode(overridden)
    assert "Be long." in decoded and "Be brief." not in decoded
    assert runs == same and len(runs) == 1


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("family", "control", "first", "last"),
    [
        ("gemma", ("<start_of_turn>", "<end_of_turn>"), "world, é 😀<end_of_turn>", "the fox.<end_of_turn>"),
        ("deepseek", ("<|User|>", "<|Assistant|>"), "world, é 😀<eos>", "the fox.<eos>"),
        (
            "gpt-oss",
            ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
            "<|channel|>final<|message|>world, é 😀<|end|>",
            "<|channel|>final<|message|>the fox.<|return|>",
        ),
        ("llama2", (), " world, é 😀 <eos>", " the fox. <eos>"),
        ("zephyr", (), "world, é 😀<eos>", "the fox.<eos>"),
        ("vicuna", (), " world, é 😀<eos>", " the fox.<eos>"),
        ("headings", (), "world, é 😀\n\n", "the fox.\n\n"),
    ],
)
def test_other_families(make_tokenizer, templates, family, control, first, last, trim_offsets):
    tokenizer = make_tokenizer(templates[family], control=control, bos=True, trim_offsets=trim_offsets)
    turns = [("user", "hello"), ("assistant", "world, é 😀"), ("user", "and?"), ("assistant", "the fox.")]
    _, runs = trained_runs(tokenizer, conversation(turns))
    assert runs == [first, last]


def test_context_of_a_prompt_does_not_train_and_an_added_system_message_does_not_move_it(tokenizers):
    for config in ({}, {"system": "Be brief."}):
        _, runs = trained_runs(tokenizers["chatml"], conversation(TWO_TURNS, context=3), **config)
        assert runs == ["  the world\n<|im_end|>"]


def test_thinking_is_trained_in_the_last_turn_and_stripped_from_earlier_ones(tokenizers):
    turns = [
        ("user", "hello"),
        ("assistant", "<think>\nfirst thought\n</think>\n\nworld"),
        ("user", "again"),
        ("assistant", "<think>\nsecond thought\n</think>\n\nthe world"),
    ]
    tokens, runs = trained_runs(tokenizers["qwen3"], conversation(turns))
    assert runs == ["world<|im_end|>", "<think>\nsecond thought\n</think>\n\nthe world<|im_end|>"]
    assert "first thought" not in tokenizers["qwen3"].decode(tokens)


def test_reasoning_field_of_its_own(tokenizers):
    messages = (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world", "reasoning_content": "a thought"},
    )
    _, runs = trained_runs(tokenizers["qwen3"], Conversation(messages))
    assert runs == ["<think>\na thought\n</think>\n\nworld<|im_end|>"]


def test_thinking_turned_off_by_a_template_option_is_part_of_the_prompt(tokenizers):
    options = {"chat_template_options": {"enable_thinking": False}}
    _, runs = trained_runs(tokenizers["qwen3"], conversation(TWO_TURNS), **options)
    assert runs == ["world<|im_end|>", "  the world\n<|im_end|>"]


def test_tool_calls_train_and_tool_results_do_not(tokenizers):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = (
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "hello"},
    )
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    tokens, runs = trained_runs(tokenizers["qwen3"], Conversation(messages, (tool,)))
    assert [run.removeprefix(EMPTY_THOUGHT) for run in runs] == [
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
        "hello<|im_end|>",
    ]
    assert "# Tools" in tokenizers["qwen3"].decode(tokens)


def test_tools_that_a_template_leaves_out_are_an_error_of_the_row(tokenizers):
    template = resolve_template(FormatConfig(), tokenizers["llama3"])  # knows nothing of tools
    question, call = {"role": "user", "content": "1 + 2?"}, {"function": {"name": "add", "arguments": {}}}
    calling = (question, {"role": "assistant", "content": "", "tool_calls": [call]})
    with pytest.raises(RowError, match="does not write tool calls .*'add'"):
        render(template, Conversation(calling))
    offered = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    with pytest.raises(RowError, match="does not write tools .*'add'"):
        render(template, Conversation((question, {"role": "assistant", "content": "3"}), offered))


def test_a_template_that_ignores_the_generation_prompt(make_tokenizer, templates):
    tokenizer = make_tokenizer(
        templates["chatml_without_generation_prompt"], control=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"
    )
    _, runs = trained_runs(tokenizer, conversation(TWO_TURNS))
    assert runs == ["world<|im_end|>", "  the world\n<|im_end|>"]


def test_answers_that_repeat_the_prompt_or_each_other(tokenizers):
    turns = [("user", "same"), ("assistant", "same"), ("user", "same"), ("assistant", "same")]
    for family, end in TURN_ENDS.items():
        _, runs = trained_runs(tokenizers[family], conversation(turns))
        assert [run.removeprefix(EMPTY_THOUGHT).strip() for run in runs] == [f"same{end}"] * 2


def test_template_given_as_string_or_file(tokenizers, templates, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(control=("<|im_start|>", "<|im_end|>"))
    path = tmp_path / "chatml.jinja"
    path.write_text(templates["chatml"])
    for given in (templates["chatml"], str(path)):
        _, runs = trained_runs(tokenizer, conversation(ONE_TURN), chat_template=given)
        assert runs == ["Paris, é 😀 of course.<|im_end|>"]


@pytest.mark.parametrize("given", ["{% for m in messages %}", "no/such/file.jinja"])
def test_unusable_template(tokenizers, given):
    with pytest.raises(JaxftError, match="chat_template"):
        resolve_template(FormatConfig(chat_template=given), tokenizers["base"])


def test_the_templates_own_objection_is_the_rows(tokenizers):
    template = resolve_template(FormatConfig(), tokenizers["mistral"])
    with pytest.raises(RowError, match="only user and assistant"):
        render(template, conversation([("system", "x"), *ONE_TURN]))


def test_a_template_that_drops_the_answer_is_found_out(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | upper }}{% endfor %}")
    with pytest.raises(RowError, match="answer of message 1"):
        render(resolve_template(FormatConfig(), tokenizer), conversation([("user", "hello"), ("assistant", "world")]))


def test_plain_format_is_prompt_newline_completion_eos(tokenizers):
    tokens, runs = trained_runs(tokenizers["base"], conversation(ONE_TURN))
    assert tokenizers["base"].decode(tokens) == "What is the capital of France?\nParis, é 😀 of course.<eos>"
    assert runs == ["Paris, é 😀 of course.<eos>"]
    _, runs = trained_runs(tokenizers["base"], conversation(ONE_TURN), add_eos=False)
    assert runs == ["Paris, é 😀 of course."]


def test_one_bos_never_two(tokenizers):
    plain, _ = trained_runs(tokenizers["base_bos"], conversation(ONE_TURN))
    chat, _ = trained_runs(tokenizers["llama3"], conversation(ONE_TURN))
    for tokens, tokenizer in ((plain, tokenizers["base_bos"]), (chat, tokenizers["llama3"])):
        assert tokens.count(tokenizer.bos_token_id) == 1 and tokens[0] == tokenizer.bos_token_id
    template = resolve_template(FormatConfig(), tokenizers["base_bos"])
    [(good, _), (bad, _)] = tokenize_documents(template, ["hello", "<bos>hello"])
    check_bos(template, good)
    with pytest.raises(RowError, match="two '<bos>'"):
        check_bos(template, bad)


def test_documents_get_bos_and_eos(tokenizers):
    template = resolve_template(FormatConfig(), tokenizers["base_bos"])
    [(tokens, mask)] = tokenize_documents(template, ["hello world"])
    assert tokenizers["base_bos"].decode(tokens) == "<bos>hello world<eos>"
    assert mask.tolist() == [False] + [True] * (len(tokens) - 1)


def test_tokenizer_without_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(JaxftError, match="add_eos"):
        resolve_template(FormatConfig(), tokenizer)
    resolve_template(FormatConfig(add_eos=False), tokenizer)

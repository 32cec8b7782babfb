"""Layouts of columns, and rows that do not keep to them."""

import pytest
import yaml

from jaxft.data.columns import Conversation, Document, Question, RowError, convert, detect_layout
from jaxft.errors import JaxftError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def parse(row, columns=None):
    columns = columns or {}
    return convert(row, detect_layout([row], columns), columns)


def contents(example):
    return [(message["role"], message["content"]) for message in example.messages]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "q", "output": "a", "text": "the same again"},
        {"instruction": "q", "input": "", "output": "a", "system": None, "history": None},
        {"messages": [USER, ANSWER]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        {"messages": [USER | {"name": None}, ANSWER | {"tool_calls": None}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_layouts_of_one_conversation(row):
    assert contents(parse(row)) == [("user", "q"), ("assistant", "a")]


def test_the_rest_of_a_row():
    assert parse({"text": "t", "id": 3}) == Document("t")
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    expected = [("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q\ni"), ("assistant", "a")]
    assert contents(parse(row)) == expected
    assert contents(parse({"messages": [USER, ANSWER], "system": "s"}))[0] == ("system", "s")
    example = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "s"})
    assert example.context == 4 and len(example.messages) == 5


def test_tools_and_calls():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    example = parse({"messages": messages, "tools": '[{"name": "add"}]'})
    assert example.tools == ({"name": "add"},)
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    share = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    example = parse({"conversations": share})
    assert example.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]


def test_mapping():
    assert contents(parse({"q": "x", "a": "y"}, {"prompt": "q", "completion": "a"})) == [
        ("user", "x"),
        ("assistant", "y"),
    ]
    # A mapping chooses the layout, whatever else is there, and may swap names.
    assert parse({"messages": [], "body": "t"}, {"text": "body"}) == Document("t")
    swapped = parse({"prompt": "y", "completion": "x"}, {"prompt": "completion", "completion": "prompt"})
    assert contents(swapped) == [("user", "x"), ("assistant", "y")]
    with pytest.raises(RowError, match="no column 'quesion' .*did you mean \"question\""):
        parse({"question": "x", "answer": "y"}, {"prompt": "quesion", "completion": "answer"})


def test_unknown_layout_says_what_is_there_and_how_to_map():
    with pytest.raises(
        JaxftError, match="columns query, reply are in no layout.*prompt\\+completion.*columns: {prompt"
    ):
        parse({"query": "x", "reply": "y"})
    row = {"instruction": "x", "context": "c", "response": "y", "category": "z"}
    suggested = "{instruction: instruction, input: context, output: response}"
    with pytest.raises(JaxftError, match=f"example columns: {suggested}"):
        parse(row)
    columns = yaml.safe_load(suggested)
    messages = convert(row, detect_layout([row], columns), columns).messages
    assert [m["content"] for m in messages] == ["x\nc", "y"]


def test_the_layout_is_the_sources():
    rows = [{"prompt": "q", "completion": "a"}] * 3 + [{"prompt": "q"}, {"text": "t"}]
    layout = detect_layout(rows, {})
    for row in rows[3:]:
        with pytest.raises(RowError, match="no column"):
            convert(row, layout, {})


@pytest.mark.parametrize(("answer", "index"), [(1, 1), ("B", 1), ("cat", 1), ("0", 0)])
def test_multiple_choice(answer, index):
    assert parse({"question": "q", "choices": ["dog", "cat"], "answer": answer}) == Question("q", ("dog", "cat"), index)
    arc = {"text": ["dog", "cat"], "label": ["1", "2"]}
    assert parse({"question": "q", "choices": arc, "answer": "2"}) == Question("q", ("dog", "cat"), 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "completion": None}, "'completion' is null"),
        ({"prompt": "q", "completion": 3}, "'completion' is int 3"),
        ({"prompt": " ", "completion": "a"}, "'prompt' is empty"),
        ({"prompt": {"a": [1]}, "completion": "a"}, "'prompt' is dict"),
        ({"text": "\ud800"}, "not UTF-8"),
        ({"text": ["nested", {"junk": 1}]}, "'text' is list"),
        ({"messages": []}, "empty list"),
        ({"messages": None}, "null, expected a list"),
        ({"messages": "not json"}, "not JSON"),
        ({"messages": {"role": "user"}}, "dict, expected a list"),
        ({"messages": ["hello"]}, "messages[0] is str"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content is null"),
        ({"messages": [{"role": "usr", "content": "q"}, ANSWER]}, 'did you mean "user"'),
        ({"messages": [{"role": 7, "content": "q"}, ANSWER]}, "has role 7"),
        ({"messages": [USER, USER, ANSWER]}, "message 1: user after user"),
        ({"messages": [ANSWER]}, "assistant at the start"),
        ({"messages": [USER, ANSWER, {"role": "system", "content": "s"}]}, "system after assistant"),
        ({"messages": [USER]}, "last message is from user"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "the assistant message is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "only text parts"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [3]}]}, "tool_calls"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "'tools' is text but not JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "x"}}, "expected a list of objects"),
        ({"instruction": "q", "output": "a", "history": [["only one"]]}, "history[0]"),
        ({"instruction": "q", "output": ""}, "'output' is empty"),
        ({"question": "q", "choices": ["one"], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["a", "b"], "answer": "Z"}, "'answer' is 'Z'"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "an index below 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": ["a"]}, "'answer' is ['a']"),
    ],
)
def test_malformed_rows(row, reason):
    names = ("messages", "prompt", "instruction", "question", "text")
    first = next(name for name in names if name in row)
    sound = {
        "messages": {"messages": [USER, ANSWER]},
        "prompt": {"prompt": "q", "completion": "a"},
        "instruction": {"instruction": "q", "output": "a"},
        "question": {"question": "q", "choices": ["a", "b"], "answer": 0},
        "text": {"text": "t"},
    }[first]
    layout = detect_layout([sound], {})
    assert isinstance(convert(sound, layout, {}), Conversation | Document | Question)
    with pytest.raises(RowError) as caught:
        convert(row, layout, {})
    assert reason in str(caught.value)


def test_messages_about_broken_names_and_deep_values_can_be_printed():
    row = {"\ud800": 1, "x" * 1000: 2} | {f"c{i}": i for i in range(100)}
    with pytest.raises(JaxftError) as caught:
        detect_layout([row], {})
    assert len(str(caught.value).encode("utf-8")) < 2000
    with pytest.raises(RowError) as caught:
        convert(row, detect_layout([{"text": "t"}], {}), {})
    assert len(str(caught.value).encode("utf-8")) < 2000
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RowError, match="nested too deep"):
        parse({"text": deep})

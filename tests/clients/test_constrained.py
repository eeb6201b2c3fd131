"""Structured output and tool calls with the official client. The fixture's answers are noise: whatever is
valid about them is the grammar's doing."""

import json

import openai
import pytest
from conftest import data_url, load_golden

MESSAGES = [{"role": "user", "content": "Name 3 things."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
    # Noise would write white space for ever.
    "x-guidance": {"whitespace_flexible": False},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": SCHEMA},
    }
    for name in ("count_animals", "sell_animals")
]


def ask(client, **more):
    arguments = {"model": "tiny", "messages": MESSAGES, "temperature": 1, "max_tokens": 400}
    return client.chat.completions.create(**(arguments | more))


def check(text):
    value = json.loads(text)
    assert set(value) == {"kind", "count"}
    assert value["kind"] in ("cat", "dog") and value["count"] in range(1, 10)


def test_json_schema(client):
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "animals", "strict": True, "schema": SCHEMA},
    }
    completion = ask(client, response_format=response_format, n=2)
    assert len(completion.choices) == 2
    for choice in completion.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)


def test_structured_outputs(client):
    completion = ask(client, extra_body={"structured_outputs": {"choice": ["red", "green"]}})
    assert completion.choices[0].message.content in ("red", "green")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, extra_body={"structured_outputs": {"regex": "("}})
    assert refused.value.param == "structured_outputs.regex"


def test_a_required_call(client):
    choice = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id
    assert call.function.name in ("count_animals", "sell_animals")
    check(call.function.arguments)


def test_a_streamed_call_of_a_named_function(client):
    named = {"type": "function", "function": {"name": "sell_animals"}}
    chunks = [
        chunk.choices[0]
        for chunk in ask(client, tools=TOOLS, tool_choice=named, stream=True)
        if chunk.choices
    ]
    calls = [call for choice in chunks for call in choice.delta.tool_calls or []]
    assert {call.index for call in calls} == {0}
    assert [call.function.name for call in calls if call.function.name] == ["sell_animals"]
    check("".join(call.function.arguments or "" for call in calls))
    assert [choice.finish_reason for choice in chunks if choice.finish_reason] == ["tool_calls"]


def test_a_turn_with_results(client):
    """The call and its result go back as the client got them."""
    message = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "7"}
    choice = ask(client, messages=[*MESSAGES, message, result], tools=TOOLS, max_tokens=8).choices[0]
    assert choice.finish_reason in ("stop", "length", "tool_calls")


def test_the_clients_own_stream_helper(client):
    """It checks the deltas' form and parses the arguments."""
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=strict, tool_choice="required", max_tokens=400,
        temperature=1, parallel_tool_calls=False,
    ) as stream:
        completion = stream.get_final_completion()
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.parsed_arguments["kind"] in ("cat", "dog")


def test_prompt_log_probabilities(client):
    golden = load_golden("text")
    completion = client.chat.completions.create(
        model="tiny", messages=golden.messages, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    first, *rest = completion.prompt_logprobs
    assert first is None and len(rest) == len(golden.prompt_ids) - 1
    for entry, token in zip(rest, golden.prompt_ids[1:]):
        assert entry[str(token)]["logprob"] <= 0
        assert [e["rank"] for e in entry.values() if e["rank"]] == [1, 2]


def test_a_second_turn_about_a_picture_encodes_nothing(client):
    content = [
        {"type": "image_url", "image_url": {"url": data_url("wide_70x42.png")}},
        {"type": "text", "text": "What is it?"},
    ]
    messages = [{"role": "user", "content": content}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    messages += [first.choices[0].message, {"role": "user", "content": "And its colour?"}]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    (item,) = second.tessera["media"]
    assert item["cache_hit"]
    assert second.usage.prompt_tokens_details.cached_tokens >= item["num_tokens"]

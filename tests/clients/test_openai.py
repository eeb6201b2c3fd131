"""The official `openai` client, unchanged."""

import math

import openai
import pytest
from conftest import data_url, load_golden

# What the API of OpenAI has no argument for.
EXACT = {"return_token_ids": True, "repetition_penalty": 1.0, "ignore_eos": True}


def ask(client, golden, **more):
    """A greedy completion that must give the golden tokens unless `more` changes it."""
    arguments = {
        "model": "tiny",
        "messages": golden.messages,
        "temperature": 0,
        "max_tokens": len(golden.tokens),
        "extra_body": EXACT,
    }
    return client.chat.completions.create(**(arguments | more))


@pytest.mark.parametrize("case", ["text", "image_odd", "images"])
def test_answers_equal_the_reference(client, case):
    golden = load_golden(case)
    completion = ask(client, golden)
    choice = completion.choices[0]
    assert choice.message.content == golden.text
    assert choice.message.role == "assistant"
    assert choice.token_ids == golden.tokens
    assert completion.prompt_token_ids == golden.prompt_ids
    assert choice.finish_reason == "length"
    assert completion.model == "tiny"
    assert completion.usage.prompt_tokens == len(golden.prompt_ids)
    assert completion.usage.completion_tokens == len(golden.tokens)
    assert completion.usage.total_tokens == len(golden.prompt_ids) + len(golden.tokens)


@pytest.mark.parametrize("case", ["text", "image_odd"])
def test_streams_equal_the_reference(client, case):
    golden = load_golden(case)
    chunks = list(
        ask(client, golden, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].prompt_token_ids == golden.prompt_ids
    with_choice = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in with_choice) == golden.text
    ids = [id for choice in with_choice for id in getattr(choice, "token_ids", None) or []]
    assert ids == golden.tokens
    assert [c.finish_reason for c in with_choice if c.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(golden.tokens)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_usage_has_none(client):
    chunks = list(ask(client, load_golden("text"), stream=True, max_tokens=3))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_log_probabilities(client):
    golden = load_golden("text")
    choice = ask(client, golden, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == len(golden.tokens)
    assert "".join(entry.token for entry in entries) == golden.text
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        # Greedy: the drawn token is the most likely one.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.001


def test_log_probabilities_of_a_stream(client):
    golden = load_golden("text")
    whole = ask(client, golden, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = []
    for chunk in ask(client, golden, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert streamed == whole


def test_choices_are_drawn_by_seed(client):
    golden = load_golden("text")
    drawn = {"temperature": 1, "top_p": 1, "n": 3, "seed": 5}
    first = ask(client, golden, **drawn)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    again = ask(client, golden, **drawn)
    assert [choice.message.content for choice in again.choices] == texts
    assert first.usage.completion_tokens == 3 * len(golden.tokens)


def test_stop_strings(client):
    golden = load_golden("text")
    stop = golden.text[10:16]
    choice = ask(client, golden, stop=[stop, "never there"]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == golden.text[: golden.text.index(stop)]
    chunks = list(ask(client, golden, stop=stop, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content


def test_defaults_are_the_checkpoints(client):
    """Without arguments the answer follows generation_config.json: nearly greedy, and repeatable."""
    message = [{"role": "user", "content": "Name 3 things."}]
    texts = {
        client.chat.completions.create(model="tiny", messages=message, max_tokens=16)
        .choices[0]
        .message.content
        for _ in range(2)
    }
    assert len(texts) == 1


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_errors_are_the_clients_exceptions(client):
    golden = load_golden("text")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, golden, temperature=-1)
    assert refused.value.param == "temperature"
    assert refused.value.type == "invalid_request_error"

    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, golden, max_tokens=100_000)
    assert refused.value.code == "context_length_exceeded"

    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, golden, model="gpt-9")
    assert refused.value.code == "model_not_found"

    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, golden, messages=[])
    assert refused.value.param == "messages"


def test_bad_pictures_are_the_requests_own_fault(client):
    golden = load_golden("image_odd")

    def with_url(url):
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return [{"role": "user", "content": content}]

    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, golden, messages=with_url(data_url("truncated.jpg")))
    assert refused.value.code == "invalid_media"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, golden, messages=with_url("http://169.254.169.254/latest"))
    assert refused.value.code == "media_url_refused"
    # A refused stream raises before its first chunk.
    with pytest.raises(openai.BadRequestError):
        ask(client, golden, messages=with_url("file:///etc/passwd"), stream=True)
    assert ask(client, golden).choices[0].message.content == golden.text


def test_a_stream_can_be_left(client):
    golden = load_golden("text")
    with ask(client, golden, stream=True, max_tokens=3000) as stream:
        assert next(iter(stream)).choices
    assert ask(client, golden).choices[0].message.content == golden.text

"""A gRPC client with stubs made from the protocol files, and the standard services."""

import grpc
import pytest
from conftest import CALL_SECONDS, load_golden, media
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status


@pytest.fixture(scope="module")
def inference(stubs, channel):
    return stubs.services.InferenceStub(channel)


def make_request(stubs, golden, pictures, **more):
    """The greedy request of a golden case with one user message."""
    parts = []
    for part in golden.messages[-1]["content"]:
        if part["type"] == "text":
            parts.append(stubs.inference.ContentPart(text=part["text"]))
        else:
            source = stubs.inference.MediaSource(data=media(pictures.pop(0)))
            image = stubs.inference.Image(source=source)
            parts.append(stubs.inference.ContentPart(image=image))
    sampling = stubs.common.SamplingOptions(
        temperature=0.0, repetition_penalty=1.0, ignore_eos=True, max_tokens=len(golden.tokens)
    )
    arguments = {
        "messages": [stubs.inference.Message(role="user", parts=parts)],
        "sampling": sampling,
        "return_token_ids": True,
    }
    return stubs.inference.GenerateRequest(**(arguments | more))


def odd_picture(stubs, **more):
    golden = load_golden("image_odd")
    return golden, make_request(stubs, golden, ["odd_97x131.png"], **more)


def error_detail(stubs, error):
    """The typed detail that every error carries."""
    status = rpc_status.from_call(error)
    detail = stubs.common.ErrorDetail()
    assert status.details[0].Unpack(detail)
    return detail


def test_a_stream_about_a_picture(stubs, inference):
    golden, request = odd_picture(stubs)
    events = list(inference.Generate(request, timeout=CALL_SECONDS))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "prompt" and kinds[-2:] == ["finish", "completion"]
    assert set(kinds[1:-2]) == {"delta"}

    prompt = events[0].prompt
    assert list(prompt.token_ids) == golden.prompt_ids
    assert prompt.num_prompt_tokens == len(golden.prompt_ids)
    item = golden.media[0]
    assert [prompt.media[0].source_width, prompt.media[0].source_height] == item["original"]
    assert [prompt.media[0].resized_width, prompt.media[0].resized_height] == item["resized"]
    assert prompt.media[0].num_tokens == item["tokens"]

    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    assert [id for delta in deltas for id in delta.token_ids] == golden.tokens
    assert "".join(delta.text for delta in deltas) == golden.text
    assert events[-2].finish.reason == stubs.common.FINISH_REASON_LENGTH
    usage = events[-1].completion.usage
    assert usage.num_output_tokens == len(golden.tokens)
    assert usage.num_media_tokens == item["tokens"]
    assert events[-1].completion.timings.total_ms > 0


def test_a_whole_answer(stubs, inference):
    golden, request = odd_picture(stubs)
    answer = inference.GenerateOnce(request, timeout=CALL_SECONDS)
    assert list(answer.choices[0].token_ids) == golden.tokens
    assert answer.choices[0].text == golden.text
    assert list(answer.prompt.token_ids) == golden.prompt_ids


def test_several_pictures(stubs, inference):
    golden = load_golden("images")
    files = ["tall_150x262.png", "square_98x126.png", "tiny_9x7.png"]
    answer = inference.GenerateOnce(make_request(stubs, golden, files), timeout=CALL_SECONDS)
    assert list(answer.choices[0].token_ids) == golden.tokens


def test_an_upload(stubs, inference):
    golden, request = odd_picture(stubs)
    file = media("odd_97x131.png")
    chunks = (
        stubs.inference.UploadMediaRequest(chunk=file[at : at + 1000])
        for at in range(0, len(file), 1000)
    )
    uploaded = inference.UploadMedia(chunks, timeout=CALL_SECONDS)
    assert (uploaded.num_bytes, uploaded.width, uploaded.height) == (len(file), 97, 131)
    request.messages[0].parts[0].image.source.media_id = uploaded.media_id
    answer = inference.GenerateOnce(request, timeout=CALL_SECONDS)
    assert list(answer.choices[0].token_ids) == golden.tokens


def test_errors_carry_their_cause(stubs, inference):
    _, request = odd_picture(stubs)
    request.sampling.temperature = float("nan")
    with pytest.raises(grpc.RpcError) as refused:
        list(inference.Generate(request, timeout=CALL_SECONDS))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    detail = error_detail(stubs, refused.value)
    assert detail.reason == "INVALID_ARGUMENT"
    assert "temperature" in detail.field
    assert not detail.retryable

    _, request = odd_picture(stubs, model="gpt-9")
    with pytest.raises(grpc.RpcError) as refused:
        inference.GenerateOnce(request, timeout=CALL_SECONDS)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    assert error_detail(stubs, refused.value).reason == "MODEL_NOT_FOUND"


def test_a_cancelled_stream_leaves_the_server_serving(stubs, inference):
    golden, request = odd_picture(stubs)
    request.sampling.max_tokens = 3000
    events = inference.Generate(request, timeout=CALL_SECONDS)
    next(events)
    events.cancel()
    request.sampling.max_tokens = len(golden.tokens)
    answer = inference.GenerateOnce(request, timeout=CALL_SECONDS)
    assert list(answer.choices[0].token_ids) == golden.tokens


def test_health(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ["", "tessera.inference.v1.Inference"]:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = health.Check(request, timeout=CALL_SECONDS)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_the_service(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "tessera.inference.v1.Inference" in database.get_services()
    pool = descriptor_pool.DescriptorPool(database)
    service = pool.FindServiceByName("tessera.inference.v1.Inference")
    assert {"Generate", "GenerateOnce", "UploadMedia"} <= {m.name for m in service.methods}


def test_the_model_is_described(stubs, inference):
    model = inference.GetModel(stubs.inference.GetModelRequest(), timeout=CALL_SECONDS)
    assert (model.name, model.max_model_len) == ("tiny", 4096)

"""One cluster for all tests here, started as a user starts it."""

import base64
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import grpc
import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PROTO = ROOT / "proto"
READY_SECONDS = 60
CALL_SECONDS = 60


@dataclass
class Cluster:
    """Where the cluster listens."""

    http: str
    grpc: str


@dataclass
class Golden:
    """A request with what the reference implementation answers (tests/golden/README.md)."""

    messages: list
    prompt_ids: list
    tokens: list
    text: str
    media: list


def load_golden(case: str) -> Golden:
    """Reads a case of the checkpoint `tiny`, its pictures as data URLs."""
    data = json.loads((FIXTURES / "tiny" / "golden" / f"{case}.json").read_text(encoding="utf-8"))
    for message in data["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                part["image_url"]["url"] = data_url(part["image_url"]["url"])
    return Golden(
        messages=data["messages"],
        prompt_ids=data["expanded_ids"],
        tokens=data["greedy_tokens"],
        text=data["greedy_text"],
        media=data["media"],
    )


def media(name: str) -> bytes:
    return (FIXTURES / "media" / name).read_bytes()


def data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(media(name)).decode()


def program() -> Path:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    path = target / "debug" / "tessera"
    if not path.is_file():
        pytest.exit(f"{path} is missing: run `cargo build -p tessera` first", returncode=1)
    return path


def free_address() -> str:
    """A loopback address outside the range that the kernel gives to outgoing connections."""
    start = 10_000 + os.getpid() * 7919 % 20_000
    for port in range(start, 32_768):
        if port in free_address.given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        free_address.given.add(port)
        return f"127.0.0.1:{port}"
    raise RuntimeError("no free port")


free_address.given = set()


def is_ready(cluster: Cluster) -> bool:
    try:
        with urllib.request.urlopen(f"{cluster.http}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """`tessera up` on free ports; its log is shown when it does not become ready."""
    http, rpc = free_address(), free_address()
    found = Cluster(http=f"http://{http}", grpc=rpc)
    log_path = tmp_path_factory.mktemp("cluster") / "up.log"
    # Standard input is the supervisor's lifeline: it ends with this process, however that ends.
    command = [program(), "up", "--exit-with-stdin", "--http", http, "--grpc", rpc]
    # With F32 weights greedy tokens equal the golden ones whatever the margin.
    command += ["--model", FIXTURES / "tiny", "--device", "cpu-f32"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not is_ready(found):
                if process.poll() is not None or time.monotonic() > deadline:
                    text = log_path.read_text(encoding="utf-8", errors="replace")
                    pytest.exit(f"the cluster is not ready:\n{text[-8000:]}", returncode=1)
                time.sleep(0.05)
            yield found
            process.terminate()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def client(cluster):
    """The official client, as it comes; retries would hide errors."""
    with openai.OpenAI(
        base_url=f"{cluster.http}/v1", api_key="unused", max_retries=0, timeout=CALL_SECONDS
    ) as made:
        yield made


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """Python modules generated from the project's protocol files, as users generate them."""
    out = tmp_path_factory.mktemp("stubs")
    files = [f"tessera/{name}/v1/{name}.proto" for name in ("common", "inference")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"]
        + [f"--python_out={out}", f"--grpc_python_out={out}", *files],
        check=True,
        cwd=PROTO,
    )
    sys.path.insert(0, str(out))
    return SimpleNamespace(
        common=importlib.import_module("tessera.common.v1.common_pb2"),
        inference=importlib.import_module("tessera.inference.v1.inference_pb2"),
        services=importlib.import_module("tessera.inference.v1.inference_pb2_grpc"),
    )


@pytest.fixture(scope="session")
def channel(cluster):
    with grpc.insecure_channel(cluster.grpc) as made:
        grpc.channel_ready_future(made).result(timeout=READY_SECONDS)
        yield made

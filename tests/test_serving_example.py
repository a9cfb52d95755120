"""examples/serving: an exported network behind HTTP, its checks of what comes in, its batches."""

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import encode_png

from networks import InputSpec, ModelSpec, build_classifier, save_classifier
from networks.integrity import write_checksums

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
httpx = pytest.importorskip("httpx")

SERVING = Path(__file__).parents[1] / "examples" / "serving"


def module(name):
    spec = importlib.util.spec_from_file_location(f"serving_{name}", SERVING / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look there
    spec.loader.exec_module(loaded)
    return loaded


app = module("app")


class Softmax(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, raw):
        return torch.softmax(self.network(raw), 1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    inputs = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.2,))
    names = tuple(f"class {c}" for c in range(12))
    spec = ModelSpec("mlp", 12, inputs, {"width": 16, "depth": 1}, class_names=names)
    return Softmax(build_classifier(spec)).eval()


@pytest.fixture(scope="module")
def bundle(network, tmp_path_factory):
    """A student alone, as `referral export --what student:main --onnx` lays it out."""
    from ensemble import export_onnx

    root = tmp_path_factory.mktemp("bundle")
    save_classifier(network.network, root / "students" / "main")
    (root / "programs").mkdir()
    raw = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    export_onnx(network, raw, root / "programs" / "student-main.onnx")
    write_checksums(root)
    return root


@pytest.fixture(scope="module")
def served(bundle):
    return app.load(bundle)


@pytest.fixture
def client(served):
    from fastapi.testclient import TestClient

    with TestClient(app.application(served)) as client:
        yield client


def rows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), np.uint8)


def expected(network, raw):
    with torch.no_grad():
        return network(torch.from_numpy(raw)).numpy()


def test_predictions_are_the_networks_best_first(client, network):
    raw = rows(3)
    answer = client.post("/predict", json={"inputs": raw.tolist(), "top": 4})
    assert answer.status_code == 200
    for p, row in zip(expected(network, raw), answer.json()["predictions"], strict=True):
        assert [each["class"] for each in row] == np.argsort(-p)[:4].tolist()
        assert [each["name"] for each in row] == [f"class {each['class']}" for each in row]
        found = [each["probability"] for each in row]
        assert np.abs(np.array(found) - np.sort(p)[::-1][:4]).max() < 1e-5
    health = client.get("/health").json()
    assert health == {"classes": 12, "shape": [1, 8, 8], "dtype": "uint8", "pictures": True}


def test_a_picture_is_read_as_in_training(client, network):
    pixels = rows(1, seed=5)
    answer = client.post("/picture?top=2", content=encode_png(pixels[0, 0])).json()
    best = np.argsort(-expected(network, pixels)[0])[:2]
    assert [each["class"] for each in answer["predictions"][0]] == best.tolist()


INPUT = rows(1)[0].tolist()


@pytest.mark.parametrize(
    "content, status, words",
    [
        (b"{", 400, "JSON is needed"),
        (b"[]", 400, "JSON is needed"),
        (b"[" * 100_000, 400, "JSON is needed"),
        (json.dumps({"inputs": []}), 422, "a list of 1 to 64"),
        (json.dumps({"inputs": [INPUT] * 65}), 422, "a list of 1 to 64"),
        (json.dumps({"inputs": "x"}), 422, "a list of 1 to 64"),
        (json.dumps({"inputs": [[1, 2]]}), 422, "shape [1, 1, 8, 8]"),
        (json.dumps({"inputs": [INPUT, [[1]]]}), 422, "shape [2, 1, 8, 8]"),
        (json.dumps({"inputs": [[[["a"] * 8] * 8]]}), 422, "shape [1, 1, 8, 8]"),
        (json.dumps({"inputs": [[[[256] * 8] * 8]]}), 422, "uint8 go from 0 to 255"),
        (json.dumps({"inputs": [[[[0.5] * 8] * 8]]}), 422, "finite uint8"),
        (json.dumps({"inputs": [[[[float("nan")] * 8] * 8]]}), 422, "finite uint8"),
        (json.dumps({"inputs": [INPUT], "top": 0}), 422, "top: a whole number"),
        (json.dumps({"inputs": [INPUT], "top": True}), 422, "top: a whole number"),
    ],
)
def test_what_the_network_does_not_read_is_refused(client, content, status, words):
    answer = client.post("/predict", content=content)
    assert answer.status_code == status and words in answer.json()["detail"]
    assert client.get("/health").status_code == 200


def test_bodies_and_pictures_are_bounded(client, monkeypatch):
    assert client.post("/predict", content=b"x" * (app.BODY_BYTES + 1)).status_code == 413
    # Without a length in the header the body is counted as it comes.
    parts = (b"x" * 2**20 for _ in range(9))
    assert client.post("/predict", content=parts).status_code == 413
    assert client.post("/picture", content=b"no picture").status_code == 422
    huge = encode_png(np.zeros((4097, 4097), np.uint8))
    answer = client.post("/picture", content=huge)
    assert answer.status_code == 422 and "pixels" in answer.json()["detail"]
    assert client.post("/picture?top=0", content=encode_png(rows(1)[0, 0])).status_code == 422
    large = client.post("/picture", content=encode_png(np.zeros((9, 9), np.uint8)))
    assert large.status_code == 422 and "is needed" in large.json()["detail"]
    monkeypatch.setattr(app, "WAITING", 0)
    full = client.post("/predict", json={"inputs": [INPUT]})
    assert full.status_code == 503 and full.headers["retry-after"] == "1"


class Counting:
    """A served network that counts its batches, and fails when it meets a 13."""

    names = ["a", "b"]

    def __init__(self):
        self.batches = []

    def probabilities(self, raw):
        self.batches.append(len(raw))
        time.sleep(0.02)
        if (raw == 13).any():
            raise RuntimeError("thirteen")
        return np.stack([raw[:, 0], 1 - raw[:, 0]], axis=1)


def test_requests_that_wait_are_answered_together_and_each_gets_its_own():
    async def ask():
        batcher = app.Batcher(served := Counting())
        task = asyncio.create_task(batcher.run())
        asked = [np.full((3, 1), number, np.float32) for number in range(20, 70)]
        answers = await asyncio.gather(*map(batcher.ask, asked))
        task.cancel()
        return served, batcher, answers

    served, batcher, answers = asyncio.run(ask())
    assert sum(served.batches) == 150 and max(served.batches) <= app.BATCH
    assert len(served.batches) <= 6 and batcher.rows == 0
    for number, answer in enumerate(answers, start=20):
        assert (answer[:, 0] == number).all() and len(answer) == 3


def test_an_error_reaches_those_who_asked_and_the_next_are_answered():
    async def ask():
        batcher = app.Batcher(Counting())
        task = asyncio.create_task(batcher.run())
        with pytest.raises(RuntimeError, match="thirteen"):
            await batcher.ask(np.full((1, 1), 13, np.float32))
        answer = await batcher.ask(np.full((1, 1), 7, np.float32))
        task.cancel()
        return answer

    assert asyncio.run(ask())[0, 0] == 7


def test_a_program_that_was_altered_is_not_served(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    path = copy / "programs" / "student-main.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="is not what SHA256SUMS says"):
        app.load(copy)
    with pytest.raises(ValueError, match="choose with --program, of student-main.onnx"):
        app.load(bundle, "ensemble.onnx")


@pytest.mark.slow
def test_the_server_starts_and_the_load_test_measures_it(bundle):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(SERVING.parents[1])}
    command = [sys.executable, "-P", str(SERVING / "app.py"), str(bundle), "--port", str(port)]
    server = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                assert server.poll() is None
                time.sleep(0.2)
        load = [sys.executable, "-P", str(SERVING / "load.py"), url]
        options = ["--requests", "200", "--clients", "4", "--warm", "10"]
        ran = subprocess.run([*load, *options], capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "200 requests" in ran.stdout and "failed 0" in ran.stdout
        assert "p50" in ran.stdout and "p99" in ran.stdout and "requests/s" in ran.stdout
    finally:
        server.terminate()
        server.wait(10)

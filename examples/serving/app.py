"""An exported network behind HTTP: FastAPI, onnxruntime, requests answered in batches.

    referral export runs/mine --to bundle/ --what student:main --onnx
    python -P examples/serving/app.py bundle/ --port 8000

What comes in is numbers or one picture, and is checked before it reaches the network. Nothing is
unpickled and no torch is imported.  examples/serving/README.md says what it took.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import uvicorn  # pyright: ignore[reportMissingImports]  # the extra serving
from fastapi import (  # pyright: ignore[reportMissingImports]
    FastAPI,
    HTTPException,
    Request,
)

from networks.pictures import PictureRules, read_picture

BODY_BYTES = 8 * 2**20
ROWS = 64  # inputs of one request
TOP = 100  # classes of one answer
PIXELS = 2**24  # of a picture, before it is decoded
BATCH = 64  # inputs that the network is asked about at once
WAITING = 1024  # inputs that wait for it. More are turned away


@dataclass(frozen=True)
class Served:
    """A program of a bundle: raw inputs [n, *shape] -> probabilities [n, C]."""

    session: onnxruntime.InferenceSession
    names: list[str]
    shape: tuple[int, ...]
    dtype: np.dtype
    pictures: PictureRules | None

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        (p,) = self.session.run(["probabilities"], {"raw": raw})
        return np.asarray(p)


def load(bundle: Path, program: str = "", threads: int = 1) -> Served:
    """Open a program of a bundle, whole as SHA256SUMS has it.  Raises ValueError."""
    programs = sorted(path.name for path in bundle.glob("programs/*.onnx"))
    program = program or ("ensemble.onnx" if "ensemble.onnx" in programs else "")
    program = program or (programs[0] if len(programs) == 1 else "")
    if program not in programs:
        listed = ", ".join(programs) or "none: export with --onnx"
        raise ValueError(f"{bundle}: choose with --program, of {listed}")
    student = program.removeprefix("student-").removesuffix(".onnx")
    network = f"students/{student}" if program.startswith("student-") else "generalist"
    place = f"{network}/model.json"
    sums = dict(line.split("  ")[::-1] for line in (bundle / "SHA256SUMS").read_text().splitlines())
    contents = {name: (bundle / name).read_bytes() for name in (place, f"programs/{program}")}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != sums.get(name):
            raise ValueError(f"{bundle / name} is not what SHA256SUMS says; export it again")
    model = json.loads(contents[place])
    inputs = model["input"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        contents[f"programs/{program}"], options, providers=["CPUExecutionProvider"]
    )
    shape, dtype = tuple(inputs["shape"]), np.dtype(inputs["dtype"])
    rules = None
    if dtype == np.uint8 and len(shape) == 3 and shape[0] in (1, 3):
        known = inputs.get("pictures")
        rules = PictureRules.from_json(known) if known else PictureRules()
        rules = replace(rules, channels=shape[0], max_pixels=PIXELS)
    return Served(session, model["class_names"], shape, dtype, rules)


# Many requests, one batch


class Full(Exception):
    """More inputs wait than may."""


class Batcher:
    """Answers inputs of several requests together, in a thread of its own."""

    def __init__(self, served: Served):
        self.served = served
        self.waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        self.rows = 0  # of what waits

    async def ask(self, raw: np.ndarray) -> np.ndarray:
        """The probabilities [n, C] of raw inputs [n, *shape].  Raises Full."""
        if self.rows + len(raw) > WAITING:
            raise Full
        self.rows += len(raw)
        answer = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((raw, answer))
        return await answer

    async def run(self) -> None:
        """Answer until this task is cancelled."""
        left = None
        while True:
            batch = [left or await self.waiting.get()]
            left = self._fill(batch)
            raw = np.concatenate([raw for raw, _ in batch])
            self.rows -= len(raw)
            try:
                p = await asyncio.to_thread(self.served.probabilities, raw)
            except Exception as error:  # whoever asked is told, and the others are answered
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            ends = np.cumsum([len(raw) for raw, _ in batch])[:-1]
            for (_, answer), part in zip(batch, np.split(p, ends), strict=True):
                if not answer.done():  # whoever asked may have gone
                    answer.set_result(part)

    def _fill(self, batch: list) -> tuple[np.ndarray, asyncio.Future] | None:
        """Add what waits already, up to BATCH inputs.  Returns what did not fit.

        While the network answers one batch the next one gathers, so that nobody need wait for it.
        """
        rows = len(batch[0][0])
        while rows < BATCH and not self.waiting.empty():
            more = self.waiting.get_nowait()
            if rows + len(more[0]) > BATCH:
                return more
            batch.append(more)
            rows += len(more[0])
        return None


# What comes in


async def read_body(request: Request) -> bytes:
    """The body. 413 as soon as it is longer than BODY_BYTES, whatever its header says."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            raise HTTPException(413, f"a request may have {BODY_BYTES} bytes")
    return bytes(body)


def inputs_of(body: bytes, served: Served) -> tuple[np.ndarray, int]:
    """(raw inputs [n, *shape], classes to name) of {"inputs": [...], "top": 5}."""
    try:
        content = json.loads(body)
        listed, top = content["inputs"], content.get("top", 5)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HTTPException(400, 'JSON is needed: {"inputs": [...], "top": 5}') from None
    if not isinstance(listed, list) or not 1 <= len(listed) <= ROWS:
        raise HTTPException(422, f"inputs: a list of 1 to {ROWS}")
    try:
        array = np.asarray(listed)
    except ValueError:  # lists of unlike lengths
        array = np.empty(0)
    needed = [len(listed), *served.shape]
    if list(array.shape) != needed or array.dtype.kind not in "iuf":
        raise HTTPException(422, f"inputs: numbers of shape {needed} are needed")
    whole = served.dtype.kind in "iu"
    if not np.isfinite(array).all() or (whole and (array != np.rint(array)).any()):
        raise HTTPException(422, f"inputs: finite {served.dtype} are needed")
    limits: Any = np.iinfo(served.dtype) if whole else np.finfo(served.dtype)
    if array.min() < limits.min or array.max() > limits.max:
        raise HTTPException(422, f"inputs: {served.dtype} go from {limits.min} to {limits.max}")
    return array.astype(served.dtype), checked_top(top)


def checked_top(top: Any) -> int:
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= TOP:
        raise HTTPException(422, f"top: a whole number from 1 to {TOP}")
    return top


def answers(p: np.ndarray, names: list[str], top: int) -> list[list[dict]]:
    """The `top` likeliest classes of each row, best first."""
    best = np.argsort(-p, axis=1, kind="stable")[:, :top]
    return [
        [{"class": int(c), "name": names[c], "probability": float(row[c])} for c in classes]
        for row, classes in zip(p, best, strict=True)
    ]


# The application


def application(served: Served) -> FastAPI:
    """GET /health. POST /predict of numbers. POST /picture of a picture's bytes."""
    batcher = Batcher(served)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="A network of Referral's", lifespan=lifespan)

    async def answer(raw: np.ndarray, top: int) -> list[list[dict]]:
        try:
            p = await batcher.ask(raw)
        except Full:
            raise HTTPException(503, "too many wait; ask again", {"Retry-After": "1"}) from None
        return answers(p, served.names, top)

    @app.get("/health")
    async def health() -> dict:
        return {
            "classes": len(served.names),
            "shape": served.shape,
            "dtype": str(served.dtype),
            "pictures": served.pictures is not None,
        }

    @app.post("/predict")
    async def predict(request: Request) -> dict:
        raw, top = inputs_of(await read_body(request), served)
        return {"predictions": await answer(raw, top)}

    @app.post("/picture")
    async def picture(request: Request, top: int = 5) -> dict:
        if served.pictures is None:
            raise HTTPException(404, "this network reads no pictures; use /predict")
        body = await read_body(request)
        try:
            pixels = await asyncio.to_thread(read_picture, body, served.pictures)
        except ValueError as error:
            raise HTTPException(422, f"the picture {error}") from None
        if pixels.shape != served.shape:
            raise HTTPException(422, f"the picture is {pixels.shape}, {served.shape} is needed")
        return {"predictions": await answer(pixels[None], checked_top(top))}

    return app


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="what `referral export --onnx` wrote")
    parser.add_argument("--program", default="", help="in programs/ [ensemble, or the only one]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    args = parser.parse_args()
    try:
        served = load(args.bundle, args.program, args.threads)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    uvicorn.run(
        application(served), host=args.host, port=args.port, log_level="warning", access_log=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

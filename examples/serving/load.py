"""Ask a served network as fast as some clients can, and print how long it took.

python -P examples/serving/load.py http://127.0.0.1:8000 --requests 2000 --clients 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time

import httpx  # pyright: ignore[reportMissingImports]  # the extra serving
import numpy as np


def bodies(health: dict, rows: int, count: int, seed: int = 0) -> list[bytes]:
    """Requests of random inputs, each of its own."""
    generator = np.random.default_rng(seed)
    shape = (count, rows, *health["shape"])
    if health["dtype"] == "float32":
        inputs = generator.standard_normal(shape).round(4)
    else:
        inputs = generator.integers(0, 256 if health["dtype"] == "uint8" else 16, shape)
    return [json.dumps({"inputs": each.tolist(), "top": 5}).encode() for each in inputs]


async def ask(
    client: httpx.AsyncClient, waiting: list[bytes], seconds: list[float], failed: list[int]
) -> None:
    """Ask until nothing waits."""
    while waiting:
        body = waiting.pop()
        began = time.perf_counter()
        response = await client.post("/predict", content=body)
        seconds.append(time.perf_counter() - began)
        if response.status_code != 200:
            failed.append(response.status_code)


async def measure(url: str, requests: int, clients: int, rows: int, warm: int) -> dict:
    """{requests, failed, seconds, p50_ms, p99_ms, per_s} of `requests`, after `warm` more."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        health = (await client.get("/health")).raise_for_status().json()
        prepared = bodies(health, rows, requests + warm)
        await _all(client, [prepared.pop() for _ in range(warm)], clients)
        began = time.perf_counter()
        seconds, failed = await _all(client, prepared, clients)
        total = time.perf_counter() - began
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {
        "requests": requests,
        "failed": len(failed),
        "seconds": total,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "per_s": requests / total,
    }


async def _all(
    client: httpx.AsyncClient, waiting: list[bytes], clients: int
) -> tuple[list[float], list[int]]:
    seconds: list[float] = []
    failed: list[int] = []
    await asyncio.gather(*(ask(client, waiting, seconds, failed) for _ in range(clients)))
    return seconds, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="inputs of a request")
    parser.add_argument("--warm", type=int, default=100, help="requests before, not counted")
    args = parser.parse_args()
    try:
        found = asyncio.run(measure(args.url, args.requests, args.clients, args.rows, args.warm))
    except httpx.HTTPError as error:
        print(f"error: {args.url}: {error}", file=sys.stderr)
        return 2
    print(f"{args.clients} clients, {args.rows} inputs a request, {found['requests']} requests")
    print(
        f"p50 {found['p50_ms']:.2f} ms  p99 {found['p99_ms']:.2f} ms  "
        f"{found['per_s']:.0f} requests/s  {args.rows * found['per_s']:.0f} inputs/s  "
        f"failed {found['failed']}"
    )
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

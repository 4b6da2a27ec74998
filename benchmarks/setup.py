"""Setting an adapter up: one truncated SVD, one block against PEFT, and all of Qwen2.5-7B from its shards."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.weights import QWEN_7B, cliff, power_law, truncation, with_spectrum

SHAPE = (18944, 3584)
LAYERS = 28


def svd() -> dict[str, Any]:
    """Truncated SVD of an MLP weight against LAPACK's (``torch.linalg.svd``), float32, rank 2, medians of five."""
    from tinylora_lite import truncated_svd

    rows: dict[str, Any] = {}
    spectra = {
        "power law": power_law(SHAPE[1]),
        "gap of 5 %, power law": cliff(SHAPE[1]),
        "gap of 5 %, nearly flat": cliff(SHAPE[1], exponent=0.15),
    }
    for name, values in spectra.items():
        weight, wanted = with_spectrum(SHAPE, values), truncation(SHAPE, values, 2)
        truncated_svd(weight, 2)
        ours = []
        for _ in range(5):
            start = time.perf_counter()
            U, S, Vh = truncated_svd(weight, 2)
            ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        exact = torch.linalg.svd(weight, full_matrices=False)
        lapack = time.perf_counter() - start
        best = (exact.U[:, :2] * exact.S[:2]) @ exact.Vh[:2]
        rows[name] = {
            "seconds": sorted(ours),
            "lapack_seconds": lapack,
            "ratio": lapack / sorted(ours)[len(ours) // 2],
            "error": float(((U * S) @ Vh - wanted).norm() / wanted.norm()),
            "lapack_error": float((best - wanted).norm() / wanted.norm()),
        }
    return {"shape": SHAPE, "rank": 2, "spectra": rows}


def block() -> dict[str, Any]:
    """One block of Qwen2.5-7B, bf16: seconds and memory to put an adapter on it, ours and PEFT's, each alone."""
    return {"ours": _alone(_ours), "peft": _alone(_peft)}


def shards() -> dict[str, Any]:
    """All 196 weights of Qwen2.5-7B from shards; the 28 layers hold the same seven matrices, and nothing is cached."""
    folder = Path(tempfile.mkdtemp())
    try:
        _write_checkpoint(folder)
        return _alone(_stream, folder) | {"modules": LAYERS * len(QWEN_7B), "gigabytes": _size(folder) / 1e9}
    finally:
        shutil.rmtree(folder)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict()])
        for index, (name, shape) in enumerate(QWEN_7B.items()):
            layer = nn.Linear(1, 1, bias=False, device="meta")
            layer.out_features, layer.in_features = shape
            weight = with_spectrum(shape, power_law(min(shape)), seed=index).to(torch.bfloat16)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers[0][name] = layer


def _ours() -> Callable[[], Any]:
    import tinylora_lite as tl

    model = _Block()
    return lambda: tl.attach(model, tl.TinyLoraConfig(rank=2, n_tie="all"))


def _peft() -> Callable[[], Any]:
    import peft

    model, config = _Block(), peft.TinyLoraConfig(r=2, u=1, weight_tying=1.0, target_modules=list(QWEN_7B))
    return lambda: peft.get_peft_model(model, config)


def _stream(folder: Path) -> Callable[[], Any]:
    from benchmarks.shards import decompose_checkpoint

    return lambda: [name for name, _ in decompose_checkpoint(folder, rank=2)]


def _alone(make: Callable[..., Callable[[], Any]], *arguments: Any) -> dict[str, float]:
    """Seconds of what ``make`` returns and how far the memory rose, in a process of its own; memory on Linux only."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, make, arguments))
    process.start()
    send.close()
    try:
        result: dict[str, float] = receive.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {make.__name__} died; its error stands above") from None
    finally:
        process.join()
    return result


def _measure(pipe: Any, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    work = make(*arguments)
    before, peak, done = _memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    pipe.send({"seconds": seconds, "peak_megabytes": max(0, peak[0] - before) / 1e6})


def _memory() -> int:
    """Bytes that the process holds itself; pages of files that are mapped, which the system may drop, left out."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def _write_checkpoint(folder: Path) -> None:
    import json

    from tinylora_lite.planning.shapes import model_config

    model_config("qwen2.5-7b").save_pretrained(folder)
    weights = {
        name: with_spectrum(shape, power_law(min(shape)), seed=index).to(torch.bfloat16)
        for index, (name, shape) in enumerate(QWEN_7B.items())
    }
    shard_of = {}
    for layer in range(LAYERS):
        shard = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        tensors = {}
        for name, weight in weights.items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            tensors[f"model.layers.{layer}.{part}.{name}.weight"] = weight
        save_file(tensors, folder / shard)
        shard_of |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

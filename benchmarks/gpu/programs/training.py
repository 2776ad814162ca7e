"""Ordinary training jobs on a real GPU, with PyTorch; on request with a hash search mixed in between the steps.

    training.py KIND [--seconds S] [--mix FAMILY --share 0.1]

KIND is transformer-bf16, transformer-fp32, resnet-amp, graph-network, reinforcement, accumulation or starved. The
search runs in the same process and on the same stream, for ``share`` of the time: what a trainer that mines on the
side does. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

CUBINS = Path(__file__).resolve().parents[3] / "tests" / "fixtures" / "cubins"
DEVICE = "cuda"


class Transformer(nn.Module):
    """A decoder of 12 layers, 85 M parameters."""

    def __init__(self, width: int = 768, layers: int = 12, words: int = 8192) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, batch_first=True, norm_first=True)
        self.words = nn.Embedding(words, width)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.words(tokens)))


class Network(nn.Module):
    """A residual network of four stages, after ResNet-18 (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList(self._stage(64 * 2 ** max(i - 1, 0), 64 * 2**i, 1 if i == 0 else 2)
                                    for i in range(4))
        self.head = nn.Linear(512, 1000)

    @staticmethod
    def _stage(before: int, after: int, stride: int) -> nn.ModuleDict:
        block = nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU(),
                              nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after))
        return nn.ModuleDict({"block": block, "skip": nn.Conv2d(before, after, 1, stride)})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = torch.relu(stage["block"](x) + stage["skip"](x))
        return self.head(x.mean((2, 3)))


def language_step(dtype: torch.dtype, batch: int, parts: int = 1) -> Callable[[], None]:
    """Return one optimiser step of a language model, its gradient gathered over so many parts."""
    model = Transformer().to(DEVICE)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4)
    tokens = torch.randint(0, 8192, (batch, 512), device=DEVICE)

    def step() -> None:
        for _ in range(parts):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            (loss / parts).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def image_step() -> Callable[[], None]:
    """Return one step of an image classifier with automatic mixed precision and fresh data from the host."""
    model = Network().to(DEVICE, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    scaler = torch.amp.GradScaler(DEVICE)
    host = torch.rand(256, 3, 224, 224).pin_memory()
    labels = torch.randint(0, 1000, (256,), device=DEVICE)

    def step() -> None:
        images = host.to(DEVICE, non_blocking=True, memory_format=torch.channels_last)
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad(set_to_none=True)

    return step


def graph_step() -> Callable[[], None]:
    """Return one step of message passing over a random graph of 1 M nodes and 16 M edges."""
    nodes, edges, width = 1 << 20, 1 << 24, 64
    ends = torch.randint(0, nodes, (2, edges), device=DEVICE)
    features = torch.rand(nodes, width, device=DEVICE)
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3)).to(DEVICE)
    optimiser = torch.optim.Adam(layers.parameters(), 1e-3)

    def step() -> None:
        x = features
        for layer in layers:
            gathered = torch.zeros_like(x).index_add_(0, ends[1], x[ends[0]])
            x = torch.relu(layer(gathered / 16))
        x.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def reinforcement_step() -> Callable[[], None]:
    """Return one round of reinforcement learning: single-token roll-outs, a wait for the environment, an update."""
    update = language_step(torch.bfloat16, 16)
    policy = Transformer(layers=4).to(DEVICE).eval()

    def step() -> None:
        tokens = torch.randint(0, 8192, (64, 16), device=DEVICE)
        with torch.no_grad():
            for _ in range(24):
                tokens = torch.cat([tokens, policy(tokens)[:, -1:].argmax(-1)], 1)
        torch.cuda.synchronize()
        time.sleep(0.8)  # the environment runs on the host
        for _ in range(6):
            update()

    return step


def starved_step() -> Callable[[], None]:
    """Return a step that waits for its data longer than it computes."""
    update = language_step(torch.bfloat16, 16)

    def step() -> None:
        time.sleep(0.12)
        update()

    return step


STEPS: dict[str, Callable[[], Callable[[], None]]] = {
    "transformer-bf16": lambda: language_step(torch.bfloat16, 32),
    "transformer-fp32": lambda: language_step(torch.float32, 32),
    "resnet-amp": image_step,
    "graph-network": graph_step,
    "reinforcement": reinforcement_step,
    "accumulation": lambda: language_step(torch.bfloat16, 16, parts=8),
    "starved": starved_step,
}


def searcher(family: str) -> Callable[[], None]:
    """Return one launch of a hash search on PyTorch's stream; the kernel is a committed cubin."""
    import cupy

    major, minor = torch.cuda.get_device_capability()
    fitting = [sm for sm in (75, 80, 90, 120) if sm // 10 == major and sm <= 10 * major + minor]
    if not fitting:
        raise SystemExit(f"no cubin of {family} for compute capability {major}.{minor}")
    module = cupy.RawModule(path=str(CUBINS / f"{family}.sm_{fitting[-1]}.cubin"))
    kernel, dice = module.get_function("search"), np.random.default_rng(1)
    # Noise where a miner has a header: over constants the chip draws less. (A cubin's own constants, of heavyhash its
    # matrix, are out of reach and stay zero: its instructions are those of the search, its power is a little lower.)
    block = cupy.asarray(dice.integers(0, 2**63, 64, np.uint64))
    found = cupy.zeros(64, cupy.uint64)
    wide = cupy.uint64 if family in ("keccak", "heavyhash") else cupy.uint32
    first = 0

    def search() -> None:
        nonlocal first
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel((1 << 14,), (256,), (block, wide(first % (1 << 31)), wide(0), found))
        first += 1 << 22

    return search


def run(step: Callable[[], None], seconds: float, search: Callable[[], None] | None, share: float) -> dict[str, float]:
    """Train for so long, with the search between steps for ``share`` of the time."""
    step()
    torch.cuda.synchronize()
    steps = searches = 0
    searched_s = 0.0
    begun_s, begun = time.time(), time.perf_counter()
    while (elapsed_s := time.perf_counter() - begun) < seconds:
        step()
        steps += 1
        torch.cuda.synchronize()
        while search and searched_s < share * (time.perf_counter() - begun):
            launched = time.perf_counter()
            search()
            torch.cuda.synchronize()
            searched_s += time.perf_counter() - launched
            searches += 1
    return {"steps": steps, "searches": searches, "step_s": elapsed_s / max(steps, 1), "searched_s": searched_s,
            "begun_s": begun_s, "ended_s": time.time()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=STEPS)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--mix", choices=["keccak", "heavyhash", "blake3"])
    parser.add_argument("--share", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    search = searcher(arguments.mix) if arguments.mix else None
    print(json.dumps(run(STEPS[arguments.kind](), arguments.seconds, search, arguments.share)))


if __name__ == "__main__":
    main()

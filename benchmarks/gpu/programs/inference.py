"""Ordinary inference on a real GPU, with PyTorch; and Fourier transforms, which are neither it nor training.

    inference.py KIND [--seconds S]        KIND is single, batched, int8 or fft

``single`` answers one request at a time with pauses between, token by token; ``batched`` keeps 128 sequences going;
``int8`` multiplies in eight-bit integers on the tensor cores, which is what proof of work by matrices does as well;
``fft`` transforms a field of 8192 x 8192 and back, a hard negative like those of negative.cu, by cuFFT.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

import torch
from training import DEVICE, Transformer

if TYPE_CHECKING:
    from collections.abc import Callable


def generation(batch: int, pause_s: float) -> Callable[[], None]:
    """Return one request: 16 tokens, one at a time."""
    model = Transformer().to(DEVICE, torch.bfloat16).eval()

    def answer() -> None:
        tokens = torch.randint(0, 8192, (batch, 128), device=DEVICE)
        with torch.no_grad():
            for _ in range(16):
                tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        torch.cuda.synchronize()
        time.sleep(pause_s)

    return answer


def integers() -> Callable[[], None]:
    """Return a chain of quantised layers: integer products, rescaled and rounded again."""
    weights = torch.randint(-127, 127, (8, 8192, 8192), dtype=torch.int8, device=DEVICE)
    x = torch.randint(-127, 127, (4096, 8192), dtype=torch.int8, device=DEVICE)

    def answer() -> None:
        y = x
        for layer in weights:
            product = torch._int_mm(y, layer.t())  # noqa: SLF001 it has no public name
            y = (product.float() * 1e-4).clamp(-127, 127).to(torch.int8)
        torch.cuda.synchronize()

    return answer


def transforms() -> Callable[[], None]:
    """Return one transform of a field to its spectrum and back."""
    field = torch.randn(8192, 8192, dtype=torch.complex64, device=DEVICE)

    def answer() -> None:
        torch.fft.ifft2(torch.fft.fft2(field))
        torch.cuda.synchronize()

    return answer


ANSWERS: dict[str, Callable[[], Callable[[], None]]] = {
    "single": lambda: generation(1, 0.05),
    "batched": lambda: generation(128, 0.0),
    "int8": integers,
    "fft": transforms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=ANSWERS)
    parser.add_argument("--seconds", type=float, default=8.0)
    arguments = parser.parse_args()
    answer = ANSWERS[arguments.kind]()
    answer()
    answers, begun_s, begun = 0, time.time(), time.perf_counter()
    while time.perf_counter() - begun < arguments.seconds:
        answer()
        answers += 1
    print(json.dumps({"answers": answers, "begun_s": begun_s, "ended_s": time.time()}))


if __name__ == "__main__":
    main()

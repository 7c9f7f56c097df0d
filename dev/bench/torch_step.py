#!/usr/bin/env python3
"""How long PyTorch takes for the training step that build/cuda-bf16-LNS/step measures: compiled, in bf16, on the GPU.

  dev/bench/torch_step.py [MODEL=llama-130m] [B=32] [T=1024]
"""

import statistics
import sys

import torch
from torch_model import Training


def main(name="llama-130m", B="32", T="1024"):
    if not torch.cuda.is_available():
        sys.exit("torch_step: torch finds no GPU")
    training = Training(name, int(B), int(T), "cuda", bf16=True, compiled=True)
    times = []
    for run in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        training.step()
        end.record()
        torch.cuda.synchronize()
        if run >= 5:  # the first ones compile
            times.append(begin.elapsed_time(end))
    ms = statistics.median(times)
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}: {name}, B = {B}, T = {T}, bf16, compiled")
    print(f"  step {ms:.1f} ms, {int(B) * int(T) / ms * 1e3:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])

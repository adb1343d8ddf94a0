"""Numbers too small to be normal, which a CPU takes far longer over."""

import torch


def flush_denormals() -> None:
    """Takes what is below 1.2e-38 for 0, on this thread and on all that it starts from now on.

    AdamW's second moments of small gradients live there: a step of a U-Net with 142 M parameters takes 1.4 times as
    long with them (`tools/bench/unet.py --denormals`), and beside an epsilon of 1e-8 they weigh nothing. Threads keep
    what they were started with, so this comes before the first parallel operation. Where the CPU has no such switch
    nothing happens.
    """
    torch.set_flush_denormal(True)

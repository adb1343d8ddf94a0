"""What a device holds under each strategy, of all that is there whatever the batch."""

from __future__ import annotations

from collections.abc import Mapping

STRATEGIES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero2_offload")
# DeepSpeed's, as Lightning configures it: values that it reduces at once, in buffers of that size however small
# the model, two of them where they take turns; and weights that ZeRO-3 leaves whole.
BUCKET_VALUES, LIVE_VALUES = 200_000_000, 1_000_000_000


def held_bytes(whole: Mapping[str, float], num_learned: int, strategy: str, num_devices: int) -> dict[str, float]:
    """By part, of what one device alone would hold: the keys of `whole`, and buckets.

    DeepSpeed's optimizer learns from float32 weights of its own, "master", whatever the others are. What of them is on
    the host is not counted.
    """
    if strategy == "ddp":
        return {**whole, "buckets": whole["gradients"] if num_devices > 1 else 0.0}
    value_bytes = whole["weights"] / max(num_learned, 1)
    zero_stage = int(strategy.removeprefix("deepspeed_zero")[0])
    is_on_device = not strategy.endswith("_offload")
    piece = is_on_device / num_devices
    weights, gradients = whole["weights"], whole["gradients"]
    if zero_stage == 3:
        weights = min(weights, LIVE_VALUES * value_bytes) + weights / num_devices
    if zero_stage >= 2:
        gradients *= piece
    return {
        "frozen weights": whole["frozen weights"],
        "weights": weights,
        "master weights": 4 * num_learned * piece,
        "gradients": gradients,
        "optimizer": whole["optimizer"] * (4 / value_bytes) * piece,
        "EMA": whole["EMA"] * piece,
        "buckets": (1 if zero_stage == 3 else 2) * BUCKET_VALUES * value_bytes,
    }

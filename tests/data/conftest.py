"""Real pictures and real shards for the tests of the data room."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.shard_writer import write_shards


def png(value, side=16):
    """A picture whose pixels say which it is."""
    pixels = np.full((side, side, 3), value % 251, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number, **fields):
    """Sample `number`, with some of its members changed; None takes one away."""
    members = {
        "__key__": f"{number:06d}",
        "png": png(number),
        "txt": f"picture {number}".encode(),
        "json": json.dumps({"number": number}).encode(),
        **fields,
    }
    return {name: value for name, value in members.items() if value is not None}


@pytest.fixture
def make_sample():
    return sample


@pytest.fixture
def make_shards(tmp_path):
    """make_shards(samples or a count, per_shard) -> the shards, in tmp_path/shards."""

    def make(samples, per_shard=1000, name="x"):
        if isinstance(samples, int):
            samples = [sample(number) for number in range(samples)]
        return write_shards(samples, tmp_path / "shards" / f"{name}-%06d.tar", per_shard)

    return make

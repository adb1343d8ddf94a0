"""litdata reading samples of a picture's bytes and a caption, for data.py --litdata, in a venv of its own.

    python -m venv litdata && litdata/bin/pip install --no-deps litdata
    ls -d $PWD/.venv/lib/python3*/site-packages > $(echo litdata/lib/python3*/site-packages)/peer.pth
    python tools/bench/data.py --raw --litdata litdata/bin/python

Without its dependencies, since it asks for torchvision: what it needs of them is sdtrain's own.
"""

from __future__ import annotations

import sys

from litdata import StreamingDataset, optimize
from timing import serve


def sample(number: int) -> dict[str, bytes | str]:
    """As data.py's samples of tar shards."""
    import numpy as np

    return {"jpg": np.random.default_rng(number).bytes(int(sys.argv[2])), "txt": f"picture {number} of many"}


def main() -> None:
    """FOLDER BYTES SAMPLES: writes them there in litdata's own format, then reads all of them at each step."""
    folder, num_samples = sys.argv[1], int(sys.argv[3])
    optimize(sample, list(range(num_samples)), folder, chunk_bytes="64MB", num_workers=1, verbose=False)
    data = StreamingDataset(folder, shuffle=False)

    def step() -> None:
        assert sum(len(one["jpg"]) > 0 for one in data) == num_samples

    serve(step)


if __name__ == "__main__":
    main()

"""A small video made on the spot, every frame different."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def make_clip(path: Path, frames: int, height: int = 40, width: int = 64, fps: int = 10) -> Path:
    """Coarse noise that drifts to the left: neighbours are alike, no two frames equal."""
    import av

    random = np.random.default_rng(frames)
    base = random.integers(0, 255, (height // 8, width // 8 + frames, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            window = base[:, number : number + width // 8].repeat(8, 0).repeat(8, 1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())
    return path

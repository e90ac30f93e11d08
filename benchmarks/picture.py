"""The picture of README, of the videos that a run of `dollar demo` leaves, teacher to the left of its student.

python benchmarks/picture.py --run=runs/demo --out=docs/demo.gif
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dollar_jax.video import read_video, write_video

PROMPTS = (
    "a large blue circle moving down quickly",
    "a large yellow triangle moving left quickly",
    "a small cyan square moving right quickly",
    "a small red circle moving left slowly",
)
LINE, GAP = 22, 24  # pixels of a line of text, and between two pairs


def labelled(video: np.ndarray, prompt: str) -> np.ndarray:
    """A pair's frames, uint8 [t h w 3], half as large, between what they are and what they show."""
    frames = []
    for frame in video[:, ::2, ::2]:
        height, width = frame.shape[:2]
        page = Image.new("RGB", (width, height + 2 * LINE), "white")
        page.paste(Image.fromarray(frame), (0, LINE))
        draw = ImageDraw.Draw(page)
        for where, text in {(0, 4): "teacher, 50 steps", (width // 2 + 4, 4): "student, 4 steps"}.items():
            draw.text(where, text, "black", font_size=12)
        draw.text((0, height + LINE + 3), prompt, "black", font_size=12)
        frames.append(np.asarray(page))
    return np.stack(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pairs = [labelled(read_video(args.run / "videos" / f"{p.replace(' ', '_')}.mp4"), p) for p in PROMPTS]
    apart = [np.pad(pair, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255) for pair in pairs]
    rows = [np.concatenate(apart[i : i + 2], 2)[:, :, :-GAP] for i in (0, 2)]
    write_video(args.out, np.concatenate(rows, 1))


if __name__ == "__main__":
    main()

"""Pictures and clips of letters and digits, drawn from the fonts that matplotlib ships: nothing to download.

`specimens` draws each character of each font once; a batch then turns, scales and shifts copies of them on
the device. A picture is a white glyph on black, in numbers from -1 (black) to 1. In a clip two glyphs move
and turn; the one in front is white and hides the grey one behind it, and its character is the clip's class.

Held out are fonts, of which training never sees a glyph, and poses: other turns, scales and shifts of the
fonts that it does see.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TRAINED = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmti10", "cmtt10"),
)
HELD_OUT = ("DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")
SPLITS = {"train": TRAINED, "poses": TRAINED, "fonts": HELD_OUT}  # "poses" and "fonts" are held out
CELL, EM = 48, 34  # pixels of a specimen, and of a font's em in it
GREY = 0.5  # of the glyph behind, where black is 0 and white 1
# A clip's glyph starts and ends at most this far off the middle, in halves of the side, and turns at most so.
FAR, TURNED = 0.25, math.radians(30)


@cache
def specimens(fonts: tuple[str, ...] = TRAINED) -> Tensor:
    """[fonts, classes, CELL, CELL], from 0 to 1: each character in the middle of its cell."""
    from matplotlib import get_data_path
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    folder = Path(get_data_path()) / "fonts" / "ttf"
    sheet = RendererAgg(CELL * len(CLASSES), CELL * len(fonts), 72)
    pen = sheet.new_gc()
    pen.set_linewidth(0)
    for row, font in enumerate(fonts):
        look = FontProperties(fname=folder / f"{font}.ttf")
        for column, character in enumerate(CLASSES):
            path = TextPath((0, 0), character, size=EM, prop=look)
            x, y = path.get_extents().get_points().mean(0)  # y points up, rows down
            x, y = (column + 0.5) * CELL - x, (len(fonts) - row - 0.5) * CELL - y
            sheet.draw_path(pen, path, Affine2D().translate(x, y), (0, 0, 0))
    ink = torch.from_numpy(np.array(sheet.buffer_rgba())[..., 3])
    return ink.view(len(fonts), CELL, len(CLASSES), CELL).transpose(1, 2).float() / 255


def place(glyphs: Tensor, turn: Tensor, scale: Tensor, shift: Tensor, size: int) -> Tensor:
    """Glyphs [N, CELL, CELL] in pictures [N, size, size], from 0 to 1.

    Args:
        turn: [N], in radians, to the left. scale: [N]; 1 lets a cell fill the picture.
        shift: [N, 2], to the right and down, in halves of the picture's side.
    """
    cos, sin = turn.cos() / scale, turn.sin() / scale
    rows = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)  # from picture to cell
    theta = torch.cat([rows, -rows @ shift[:, :, None]], -1)
    grid = F.affine_grid(theta, [len(glyphs), 1, 2 * size, 2 * size], align_corners=False)
    return F.avg_pool2d(F.grid_sample(glyphs[:, None], grid, align_corners=False), 2)[:, 0].clamp(0, 1)


def overlaid(front: Tensor, behind: Tensor) -> Tensor:
    """A white glyph over a grey one: front + (1 - front) GREY behind, all from 0 to 1."""
    return front + (1 - front) * GREY * behind


class Glyphs:
    """Batches of pictures, or of clips where frames is above 1, made on `device`.

    Batch i of a split and seed is the same on every machine, within rounding.
    """

    def __init__(self, frames: int = 1, size: int = 32, device: torch.device | str = "cpu") -> None:
        self.frames, self.size, self.device = frames, size, device
        self.cells = {split: specimens(fonts).to(device).flatten(0, 1) for split, fonts in SPLITS.items()}

    def batch(self, split: str, index: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Pictures [n, 1, H, W] or clips [n, 1, T, H, W] from -1 to 1, and classes [n].

        Raises ValueError for a split that is not in SPLITS.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        generator = torch.Generator().manual_seed(seed_of("glyphs", split, seed, index))
        u = torch.rand(n, 16, generator=generator).to(self.device)
        x, y = self._pictures(split, u) if self.frames == 1 else self._clips(split, u)
        return 2 * x[:, None] - 1, y

    def _pick(self, split: str, u: Tensor) -> tuple[Tensor, Tensor]:
        """A font and a class by two uniform numbers u [n, 2]: glyphs [n, CELL, CELL], classes [n]."""
        font, y = (u * u.new_tensor([len(SPLITS[split]), len(CLASSES)])).long().unbind(-1)
        return self.cells[split][font * len(CLASSES) + y], y

    def _pictures(self, split: str, u: Tensor) -> tuple[Tensor, Tensor]:
        glyphs, y = self._pick(split, u[:, :2])
        turn, scale = (2 * u[:, 2] - 1) * math.radians(20), 0.95 + 0.3 * u[:, 3]
        return place(glyphs, turn, scale, (2 * u[:, 4:6] - 1) * 0.15, self.size), y

    def _clips(self, split: str, u: Tensor) -> tuple[Tensor, Tensor]:
        """Two glyphs a clip, each on a straight line while it turns evenly."""
        front, y = self._path(split, u[:, :8])
        behind, _ = self._path(split, u[:, 8:])
        return overlaid(front, behind), y

    def _path(self, split: str, u: Tensor) -> tuple[Tensor, Tensor]:
        glyphs, y = self._pick(split, u[:, :2])
        turn, turned = (2 * u[:, 2] - 1) * math.radians(20), (2 * u[:, 3] - 1) * TURNED
        start, end = (2 * u[:, 4:6] - 1) * FAR, (2 * u[:, 6:8] - 1) * FAR
        part = torch.linspace(0, 1, self.frames, device=u.device)
        turns = turn[:, None] + turned[:, None] * part
        shifts = start[:, None] + (end - start)[:, None] * part[:, None]
        glyphs = glyphs.repeat_interleave(self.frames, 0)
        scale = torch.full_like(turns, 0.75).flatten()
        pictures = place(glyphs, turns.flatten(), scale, shifts.flatten(0, 1), self.size)
        return pictures.unflatten(0, (-1, self.frames)), y


def seed_of(*parts: str | int) -> int:
    """A seed for torch from words and numbers."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

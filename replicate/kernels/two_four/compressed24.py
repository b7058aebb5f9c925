"""cuSPARSELt's compressed 2:4 operand on Hopper (sm_90), written and read without the library's compressor.

A is [R, K] of 16-bit floats, 2:4 along K. The buffer is [R, K/2 + K/16] elements: the kept values [R, K/2],
row-major, then K/2 R/8 bytes of metadata. A group of four names its kept positions i0 < i1 by the nibble
i0 | i1 << 2. Nibbles are stored in tiles of 64 rows x 16 groups, tile (r // 64) (K / 64) + g // 16, low
nibble of a byte first, inside a tile at

    n(r, g) = (g & 3) 4 + ((g >> 2) & 1) 2 + ((g >> 3) & 1) 512
            + (r & 7) 16 + ((r >> 3) & 1) + ((r >> 4) & 3) 128

The layout is internal to the vendor: `layout` checks it once against the library's own compressor, and where
it differs (Ampere, Ada, a later version) operands are compressed by the library from a dense 2:4 matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from replicate.kernels import backend as engines
from replicate.kernels.backend import HALF, check, on_its_device, tl, triton
from replicate.kernels.two_four.tile24 import band_rows, metadata_words, nibbles, spread
from replicate.sparsity import mask24
from replicate.system.tracing import constant

TILE = 64  # rows and columns of a metadata tile
# Tile and warps, the fastest of the configurations `python -m replicate bench kernels --tune` tries.
CONFIG = {"BANDS": 2, "GROUPS": 64, "num_warps": 4}


@dataclass(frozen=True)
class Compressed24:
    """A 2:4 matrix [rows, cols] in compressed form, the left operand of `matmul24`.

    Attributes:
        buffer: [rows rounded up to 64, 9/16 cols], values then metadata.
        rows, cols: shape of the matrix; cols is a multiple of 64.
        layout: "sm90", which this package reads and writes, or "vendor", which only the library reads.
        dense: the same matrix [rows, cols] uncompressed, where it was asked for or the layout needs it.

    `values, metadata = compressed` unpacks into the two parts of an sm90 buffer.
    """

    buffer: Tensor
    rows: int
    cols: int
    layout: str = "sm90"
    dense: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix it stands for."""
        return self.rows, self.cols

    @property
    def values(self) -> Tensor:
        """Kept values [padded rows, cols / 2]: a view."""
        return parts(self.buffer, self.cols)[0]

    @property
    def metadata(self) -> Tensor:
        """Metadata as bytes [padded rows * cols / 16]: a view."""
        check(self.layout == "sm90", f"the metadata of layout {self.layout!r} is known only to the library")
        return parts(self.buffer, self.cols)[1].view(torch.uint8)

    def with_dense(self, dense: Tensor | None) -> Compressed24:
        """The same matrix carrying its dense form."""
        return dataclasses.replace(self, dense=dense)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.values, self.metadata))


def padded_rows(rows: int) -> int:
    """Rows rounded up to whole metadata tiles; the rows added are zero."""
    return -(-rows // TILE) * TILE


def check_compressible(name: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless a [rows, cols] matrix of this dtype has a compressed form."""
    check(dtype in HALF, f"{name} would be compressed as {dtype}; choose float16 or bfloat16")
    check(rows > 0 and cols > 0, f"{name} is empty: shape ({rows}, {cols})")
    check(
        cols % TILE == 0,
        f"{name} is compressed along {cols} elements, no multiple of {TILE}; pad to {padded_rows(cols)} "
        "or use the dense masks of replicate.sparsity",
    )


def check_either_axis(
    name: str, x: Tensor, last: bool, first: bool, dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype x is compressed in, by default its own, bfloat16 for float32.

    Raises ValueError unless x is a matrix that can be compressed along its last axis, its first, or both.
    """
    check(x.dim() == 2, f"{name} must be a matrix, got shape {tuple(x.shape)}; flatten leading axes")
    check(x.dtype in (*HALF, torch.float32), f"{name} is {x.dtype}; use float32, float16 or bfloat16")
    dtype = dtype or (x.dtype if x.dtype in HALF else torch.bfloat16)
    for asked, dim, shape in ((last, 1, x.shape), (first, 0, x.shape[::-1])):
        if asked:
            check_compressible(f"{name} along dim {dim}", *shape, dtype)
    return dtype


def new_buffer(asked: bool, rows: int, cols: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised buffer of a compressed [rows, cols] matrix where `like` is; empty if not asked for."""
    return like.new_empty((padded_rows(rows), cols // 2 + cols // 16) if asked else 0, dtype=dtype)


def empty_outputs(like: Tensor, compressed: bool, dense: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised (buffer, dense form) for a matrix of the shape of `like`; empty where not asked for."""
    buffer = new_buffer(compressed, *like.shape, like, like.dtype)
    return buffer, like.new_empty(like.shape if dense else 0)


def buffers_of_both(x: Tensor, last: bool, first: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised buffers of x [R, C] and of its transpose; empty where not asked for."""
    rows, cols = x.shape
    return new_buffer(last, rows, cols, x, dtype), new_buffer(first, cols, rows, x, dtype)


def matrices_of_both(
    buffers: tuple[Tensor, Tensor], rows: int, cols: int
) -> tuple[Compressed24 | None, Compressed24 | None]:
    """A matrix [rows, cols] and its transpose from `buffers_of_both`; None for an empty one."""
    shapes = (rows, cols), (cols, rows)
    a, b = (Compressed24(x, *shape) if x.numel() else None for x, shape in zip(buffers, shapes))
    return a, b


def parts(buffer: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """(values [R, cols / 2], metadata [R cols / 16 elements]), views of a contiguous buffer."""
    check(buffer.is_contiguous(), f"a compressed buffer must be contiguous, got strides {buffer.stride()}")
    flat, split = buffer.view(-1), buffer.shape[0] * cols // 2
    return flat[:split].view(buffer.shape[0], cols // 2), flat[split:]


def word_parts(buffer: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """(values, metadata) of a buffer as 32-bit words, for a kernel to write; of an empty one, nothing."""
    values, metadata = parts(buffer, cols) if buffer.numel() else (buffer, buffer)
    return values.view(torch.int32), metadata.view(torch.int32)


def as_words(x: Tensor) -> Tensor:
    """x [R, C] as 64-bit words, copied only if it is not contiguous or does not start at a word."""
    x = x.contiguous()
    if x.storage_offset() * x.element_size() % 8:
        x = x.clone()
    # A matrix of one row counts as contiguous whatever its row stride, by which words would not divide.
    return x.as_strided(x.shape, (x.shape[1], 1)).view(torch.int64)


def metadata_position(rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Where the nibble of row r, group g is stored: [rows, cols / 4] long, a permutation of the nibbles."""
    r = torch.arange(rows, device=device)[:, None]
    g = torch.arange(cols // 4, device=device)[None, :]
    inside = (g & 3) * 4 + ((g >> 2) & 1) * 2 + ((g >> 3) & 1) * 512
    inside = inside + (r & 7) * 16 + ((r >> 3) & 1) + ((r >> 4) & 3) * 128
    return ((r // TILE) * (cols // TILE) + g // 16) * 1024 + inside


def pack24_reference(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Buffer of x [R, K] with `mask` (two of each four along K; default `mask24(x)`); R is padded to 64."""
    pad = (0, 0, 0, padded_rows(len(x)) - len(x))
    mask = torch.nn.functional.pad(mask24(x) if mask is None else mask, pad)
    mask[len(x) :, :].view(-1, 4)[:, :2] = True
    x = torch.nn.functional.pad(x, pad)
    values = x[mask].view(len(x), -1)
    kept = mask.nonzero()[:, 1].view(len(x), -1, 2) & 3
    nibbles = torch.empty(kept[..., 0].numel(), dtype=torch.uint8, device=x.device)
    place = metadata_position(*x.shape, x.device).view(-1)
    nibbles[place] = (kept[..., 0] | kept[..., 1] << 2).view(-1).to(torch.uint8)
    metadata = (nibbles[0::2] | nibbles[1::2] << 4).view(x.dtype)
    return torch.cat([values.view(-1), metadata]).view(len(x), -1)


def unpack24_reference(buffer: Tensor, rows: int, cols: int) -> Tensor:
    """The matrix [rows, cols] of an sm90 buffer."""
    values, metadata = parts(buffer, cols)
    byte = metadata.view(torch.uint8)
    nibbles = torch.stack([byte & 15, byte >> 4], 1).view(-1)
    nibble = nibbles[metadata_position(len(buffer), cols, buffer.device)].long()
    group = torch.arange(cols // 4, device=buffer.device)[:, None]
    where = torch.stack([nibble & 3, nibble >> 2], -1) + 4 * group
    out = torch.zeros((len(buffer), cols), dtype=buffer.dtype, device=buffer.device)
    return out.scatter_(1, where.view(len(buffer), -1), values)[:rows]


@on_its_device
@triton.jit
def _unpack24_kernel(
    values, metadata, out, rows, groups, start, out_groups, BANDS: tl.constexpr, GROUPS: tl.constexpr
):
    """Words of four elements [rows, out_groups], the groups from `start`, a multiple of 16, of all `groups`.

    They are made from words of two kept values and 64-bit metadata words.
    """
    first = start + tl.program_id(0) * GROUPS
    band, row = band_rows(tl.program_id(1) * BANDS, BANDS)
    g = first + tl.arange(0, GROUPS)
    word = tl.load(metadata + metadata_words(band, row, first, groups, GROUPS))
    nibble_upper, nibble_lower = nibbles(word, BANDS, GROUPS)
    for half in tl.static_range(2):
        r = (band * 16 + row + 8 * half)[:, None]
        pair = tl.load(values + r.to(tl.int64) * groups + g[None, :])
        word = spread(pair, nibble_lower if half else nibble_upper)
        tl.store(out + r.to(tl.int64) * out_groups + (g - start)[None, :], word, mask=r < rows)


@torch.library.custom_op("replicate::unpack24", mutates_args=())
def _unpack24_op(buffer: Tensor, rows: int, cols: int, start: int, stop: int) -> Tensor:
    return launch_unpack24(buffer, rows, cols, CONFIG, start, stop)


_unpack24_op.register_fake(lambda buffer, rows, cols, start, stop: buffer.new_empty((rows, stop - start)))


def launch_unpack24(
    buffer: Tensor, rows: int, cols: int, config: dict[str, int], start: int = 0, stop: int | None = None
) -> Tensor:
    """Columns start to stop, all by default, of an sm90 buffer's matrix, by the kernel with a given tile."""
    values, metadata = parts(buffer, cols)
    width = (cols if stop is None else stop) - start
    out = buffer.new_empty((rows, width))
    grid, config = fit_config(config, rows, width)
    words = values.view(torch.int32), metadata.view(torch.int64), out.view(torch.int64)
    _unpack24_kernel[grid](*words, rows, cols // 4, start // 4, width // 4, **config)
    return out


def unpack24(sparse: Compressed24, columns: slice | None = None, *, backend: str | None = None) -> Tensor:
    """The dense matrix [rows, cols] of a compressed one, or some of its columns.

    Args:
        sparse: the matrix.
        columns: a slice from and to a multiple of 64; all of them by default.
        backend: see `replicate.kernels.backend`.

    Returns:
        [rows, cols] or [rows, columns], contiguous and new; of a matrix that carries its dense form that
        form, or a view of its columns.

    Raises:
        ValueError: no such columns; or the layout is the vendor's and no dense form is carried.
    """
    start, stop = _bounds(columns, sparse.cols)
    if sparse.dense is not None:
        return sparse.dense if columns is None else sparse.dense[:, start:stop]
    check(sparse.layout == "sm90", "a buffer in the vendor's layout cannot be read; keep its dense form")
    if engines.select(sparse.buffer.device, backend) == "reference":
        return unpack24_reference(sparse.buffer, *sparse.shape)[:, start:stop].contiguous()
    return _unpack24_op(sparse.buffer, *sparse.shape, start, stop)


def _bounds(columns: slice | None, cols: int) -> tuple[int, int]:
    """First column of a slice and the one after its last; ValueError unless it is whole tiles of `cols`."""
    if columns is None:
        return 0, cols
    start, stop = columns.start or 0, cols if columns.stop is None else columns.stop
    check(
        columns.step in (None, 1) and 0 <= start < stop <= cols and start % TILE == stop % TILE == 0,
        f"columns {columns} of {cols}; give a slice of at least one, from and to multiples of {TILE}",
    )
    return start, stop


def fit_config(config: dict[str, int], rows: int, cols: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, configuration) with a tile that divides `cols`, a multiple of 64, and the padded rows."""
    groups, bands = config["GROUPS"], config["BANDS"]
    while (cols // 4) % groups:
        groups //= 2
    if padded_rows(rows) // (16 * bands) > 65535:  # the limit of a grid's second axis
        bands = 4
    grid = (cols // 4 // groups, padded_rows(rows) // (16 * bands))
    return grid, {**config, "GROUPS": groups, "BANDS": bands}


def fit_square(config: dict[str, int], rows: int, cols: int) -> tuple[tuple[int, int], dict[str, int]]:
    """As `fit_config`, of rows, columns and warps in this order: 64 where a size does not divide."""
    sizes = [size if padded_rows(n) % size == 0 else TILE for size, n in zip(config.values(), (rows, cols))]
    grid = (padded_rows(cols) // sizes[1], padded_rows(rows) // sizes[0])
    return grid, {**config, **dict(zip(config, sizes))}


@constant
def layout(device: torch.device | str, dtype: torch.dtype) -> str:
    """The layout operands on this device are compressed in: "sm90" or "vendor"; tested at first use."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        return "sm90"  # nothing but this package reads it
    return _tested_layout(device.index if device.index is not None else torch.cuda.current_device(), dtype)


@lru_cache
def _tested_layout(index: int, dtype: torch.dtype) -> str:
    """Compress random 2:4 matrices both ways and compare every bit."""
    device = torch.device("cuda", index)
    draw = torch.Generator(device).manual_seed(0)
    for rows, cols in ((64, 64), (192, 320)):
        x = torch.randn(rows, cols, generator=draw, device=device).to(dtype)
        x = torch.where(x == 0, torch.ones_like(x), x)  # two non-zeros a group, so that positions are unique
        x = torch.where(mask24(x), x, torch.zeros_like(x))
        theirs = torch._cslt_compress(x).view(-1).view(torch.int16)
        ours = pack24_reference(x).view(-1).view(torch.int16)
        if theirs.shape != ours.shape or not torch.equal(theirs, ours):
            return "vendor"
    return "sm90"


def compress_by_library(dense: Tensor) -> Tensor:
    """Buffer of a 2:4 matrix in the library's own layout; rows are padded to 64."""
    pad = padded_rows(len(dense)) - len(dense)
    padded = torch.nn.functional.pad(dense, (0, 0, 0, pad)) if pad else dense.contiguous()
    return torch._cslt_compress(padded).view(len(padded), -1)


def compress_in_torch(dense: Tensor, mask: Tensor, kind: str, dim: int = 1) -> Compressed24:
    """A matrix that `mask` makes 2:4 along `dim`, in layout `kind`; with dim 0 its transpose."""
    if dim == 0:
        dense, mask = dense.t().contiguous(), mask.t().contiguous()
    if kind == "sm90":
        return Compressed24(pack24_reference(dense, mask), *dense.shape)
    return Compressed24(compress_by_library(dense), *dense.shape, kind, dense)

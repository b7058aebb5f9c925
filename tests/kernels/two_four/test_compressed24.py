"""The compressed layout: by hand on one tile, as a bijection, and back through the kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate.kernels import Compressed24, unpack24
from replicate.kernels.two_four.compressed24 import (
    fit_config,
    layout,
    metadata_position,
    pack24_reference,
    parts,
    unpack24_reference,
)
from replicate.sparsity import mask24, prune24

DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def random24(rows, cols, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return prune24(torch.randn(rows, cols, generator=g)).to(dtype).to(device)


def test_golden_groups():
    # Row 0: groups (0, 1, 0, 2), (3, 4, 0, 0), (0, 0, 5, 6); row 8 and row 16 hold one group each.
    x = torch.zeros(64, 64, dtype=torch.float16)
    x[0, :12] = torch.tensor([0, 1, 0, 2, 3, 4, 0, 0, 0, 0, 5, 6])
    x[8, 16:20] = torch.tensor([7, 0, 0, 8])  # group 4
    x[16, 32:36] = torch.tensor([0, 9, 9, 0])  # group 8
    values, metadata = Compressed24(pack24_reference(x), 64, 64)
    assert values[0, :6].tolist() == [1, 2, 3, 4, 5, 6]
    assert values[8, 8:10].tolist() == [7, 8] and values[16, 16:18].tolist() == [9, 9]
    empty = 0 | 1 << 2  # a group of zeros names its first two positions
    nibbles = torch.stack([metadata & 15, metadata >> 4], 1).view(-1)
    assert nibbles[0] == 1 | 3 << 2  # row 0, group 0
    assert nibbles[4] == 0 | 1 << 2  # row 0, group 1
    assert nibbles[8] == 2 | 3 << 2  # row 0, group 2
    assert nibbles[3] == 0 | 3 << 2  # row 8, group 4
    assert nibbles[512 + 128] == 1 | 2 << 2  # row 16, group 8
    assert (nibbles == empty).sum() == 1024 - 4


@pytest.mark.parametrize("rows, cols", [(64, 64), (128, 192), (192, 64)])
def test_every_nibble_has_one_place(rows, cols):
    place = metadata_position(rows, cols).view(-1)
    assert torch.equal(place.sort().values, torch.arange(rows * cols // 4))


def test_a_64_bit_word_holds_two_rows_of_eight_groups():
    place = metadata_position(64, 64)
    word = torch.cat([place[3, 8:16], place[11, 8:16]])
    assert word.sort().values.tolist() == list(range(word.min(), word.min() + 16)) and word.min() % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(64, 64), (1, 64), (70, 192), (130, 128)])
def test_unpack_inverts_pack(rows, cols, dtype, device, poison):
    x = random24(rows, cols, dtype, device)
    buffer = pack24_reference(x)
    assert buffer.shape == (-(-rows // 64) * 64, cols // 2 + cols // 16)
    assert torch.equal(unpack24_reference(buffer, rows, cols), x)
    assert torch.equal(unpack24(Compressed24(buffer, rows, cols), backend="triton"), x)
    assert torch.equal(unpack24(Compressed24(buffer, rows, cols), backend="reference"), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(64, 64), (1, 128), (70, 192), (130, 512)])
def test_a_block_of_columns_is_the_matrix_s(rows, cols, dtype, device, poison):
    x = random24(rows, cols, dtype, device)
    buffer = pack24_reference(x)
    sparse = Compressed24(buffer, rows, cols)
    for start in range(0, cols, 64):
        for stop in range(start + 64, cols + 1, 64):
            for backend in ("triton", "reference"):
                block = unpack24(sparse, slice(start, stop), backend=backend)
                assert torch.equal(block, x[:, start:stop]) and block.is_contiguous()
    assert torch.equal(unpack24(sparse, slice(None, 64), backend="triton"), x[:, :64])
    assert torch.equal(unpack24(sparse, slice(cols - 64, None), backend="triton"), x[:, -64:])


@pytest.mark.parametrize(
    "columns",
    [slice(0, 32), slice(32, 128), slice(64, 64), slice(0, 256), slice(-64, None), slice(0, 128, 2)],
)
@pytest.mark.parametrize("carries", [False, True])
def test_columns_that_cannot_be_unpacked_are_refused(columns, carries):
    x = random24(64, 128, torch.float16)
    sparse = Compressed24(pack24_reference(x), 64, 128, dense=x if carries else None)
    with pytest.raises(ValueError, match=r"columns slice.* of 128"):
        unpack24(sparse, columns)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 3), st.integers(0, 2**31), st.floats(0, 0.9))
def test_pack_keeps_a_24_matrix_and_its_padding_is_zero(rows, tiles, seed, zeros):
    x = random24(rows, 64 * tiles, torch.float16, seed=seed)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    buffer = pack24_reference(x)
    assert torch.equal(unpack24_reference(buffer, rows, 64 * tiles), x)
    assert not parts(buffer, 64 * tiles)[0][rows:].any()


def test_a_mask_names_positions_of_zeros():
    x = torch.zeros(64, 64, dtype=torch.float16)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 2::4] = mask[:, 3::4] = True
    metadata = Compressed24(pack24_reference(x, mask), 64, 64).metadata
    assert (metadata == 0xEE).all()
    assert mask24(x)[0, :4].tolist() == [True, True, False, False]


def test_dense_form_is_returned_as_it_is():
    x = random24(64, 64, torch.float16)
    carried = Compressed24(pack24_reference(x), 64, 64).with_dense(x)
    assert unpack24(carried) is x
    wide = random24(64, 192, torch.float16)
    block = unpack24(Compressed24(pack24_reference(wide), 64, 192, dense=wide), slice(64, 192))
    assert torch.equal(block, wide[:, 64:]) and block._base is wide


def test_vendor_layout_is_opaque():
    opaque = Compressed24(pack24_reference(random24(64, 64, torch.float16)), 64, 64, "vendor")
    with pytest.raises(ValueError, match="vendor"):
        unpack24(opaque)
    with pytest.raises(ValueError, match="vendor"):
        opaque.metadata


def test_fit_config_divides_the_matrix():
    config = {"BANDS": 1, "GROUPS": 64, "num_warps": 4}
    assert fit_config(config, 64, 256) == ((1, 4), config)
    grid, fitted = fit_config(config, 65, 192)
    assert grid == (3, 8) and fitted["GROUPS"] == 16
    grid, fitted = fit_config(config, 2**21, 256)
    assert grid == (1, 2**15) and fitted["BANDS"] == 4


def test_layout_without_a_gpu():
    assert layout("cpu", torch.float16) == "sm90"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layout_is_the_librarys(dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the layout is Hopper's")
    assert layout("cuda", dtype) == "sm90"
    x = random24(256, 448, dtype, "cuda")
    x = torch.where(mask24(x) & (x == 0), torch.ones_like(x), x)
    theirs = torch._cslt_compress(x).view(-1).view(torch.int16)
    assert torch.equal(pack24_reference(x).view(-1).view(torch.int16), theirs)

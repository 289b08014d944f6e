"""Block kernels against dense attention, and against each other."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import dense_attention, random_qkv
from tokenring.kernels import KERNELS, backward_kernel, choose
from tokenring.kernels.reference import BLOCK_ROWS
from tokenring.segments import Tile

BANDS = [(None, None), (None, 0), (None, 3), (-2, None), (-3, 2), (0, 0)]


def band(rows: int, keys: int, lower: int | None, upper: int | None) -> torch.Tensor:
    difference = torch.arange(keys)[None, :] - torch.arange(rows)[:, None]
    return (difference >= (lower if lower is not None else -keys - rows)) & (
        difference <= (upper if upper is not None else keys)
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("bounds", BANDS)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)])
def test_every_kernel_equals_dense_attention_on_every_band(kernel, bounds, heads) -> None:
    for rows, keys in ((1, 1), (7, 5), (BLOCK_ROWS + 9, 40)):
        q, k, v = random_qkv(2, rows, *heads, 16, torch.float64, kv_length=keys)
        allowed = band(rows, keys, *bounds)
        use = allowed.any(1)
        tile = Tile(0, rows, 0, keys, *bounds).trim()
        if tile is None:
            continue
        out, lse = kernel.forward(q, k, v, [tile], (0, rows), 0.25, None)
        want_out, want_lse = dense_attention(q, k, v, allowed, scale=0.25)
        torch.testing.assert_close(out.double(), want_out, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[:, :, use].double(), want_lse[:, :, use], rtol=0, atol=1e-12)
        assert torch.isneginf(lse[:, :, ~use]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_private_operator_equals_the_reference(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, 33, 8, 2, 64, dtype, kv_length=50)
    for bounds in BANDS:
        tile = Tile(0, 33, 0, 50, *bounds).trim()
        assert tile is not None
        results = [kernel.forward(q, k, v, [tile], (tile.q_start, tile.q_stop), 0.125, None) for kernel in KERNELS]
        assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(results[0][0].float(), results[1][0].float(), rtol=0, atol=tolerance)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=tolerance)


def test_many_tiles_merge_to_one_attention_and_rows_without_a_tile_are_empty() -> None:
    q, k, v = random_qkv(1, 10, 2, 1, 8, torch.float64)
    tiles = [Tile(1, 5, 0, 4), Tile(1, 5, 6, 10), Tile(4, 9, 4, 6)]
    allowed = torch.zeros(10, 10, dtype=torch.bool)
    for tile in tiles:
        allowed[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] = True
    want_out, want_lse = dense_attention(q, k, v, allowed, scale=0.5)
    for kernel in KERNELS:
        out, lse = kernel.forward(q, k, v, tiles, (0, 10), 0.5, None)
        torch.testing.assert_close(out, want_out, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


def test_different_value_dims_and_softcap_fall_to_the_reference() -> None:
    q, _, v = random_qkv(1, 4, 2, 2, 8, torch.float32, v_dim=6)
    assert choose("auto", q, v, None).name == "reference"
    assert choose("auto", q, q, 2.0).name == "reference"
    assert choose("auto", q, q, None).name == "cpu_flash"
    with pytest.raises(ValueError, match="needs one head dim for keys and values, not 8 and 6"):
        choose("cpu_flash", q, v, None)
    with pytest.raises(ValueError, match=r"takes float16.*not torch\.int32"):
        choose("cpu_flash", q.int(), q.int(), None)


def test_a_kernel_that_is_unknown_or_unable_is_refused_with_what_is_allowed() -> None:
    q = torch.zeros(1, 4, 2, 8)
    of_gpus = "flash_attn, flash_attn4, flash_attn3, cuda_sdpa, flash_attn2"
    names = f"auto, cpu_flash, reference, or for CUDA devices {of_gpus}"
    with pytest.raises(ValueError, match=f"kernel is 'fast'; give one of {names}"):
        choose("fast", q, q, None)
    with pytest.raises(ValueError, match=r"kernel 'cuda_sdpa' cannot take this call: .*on cpu; use kernel=.auto"):
        choose("cuda_sdpa", q, q, None)
    with pytest.raises(ValueError, match=r"flash_attn4: it takes .*flash_attn3: it takes .*flash_attn2: it takes"):
        choose("flash_attn", q, q, None)
    for name in ("cpu_flash", "reference"):
        chosen = choose(name, q, q, None)
        assert chosen.name == name and backward_kernel(chosen, q, q, None) is chosen


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_an_autocast_region_changes_no_kernel(kernel) -> None:
    q, k, v = random_qkv(1, 12, 4, 2, 16, torch.float32)
    tiles = [Tile(0, 12, 0, 12, None, 0)]
    plain = kernel.forward(q, k, v, tiles, (0, 12), 0.25, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kernel.forward(q, k, v, tiles, (0, 12), 0.25, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


def test_a_window_reads_only_the_keys_that_its_rows_see() -> None:
    rows = 3 * BLOCK_ROWS
    q, k, v = random_qkv(1, rows, 2, 1, 8, torch.float64)
    v[:, : rows - BLOCK_ROWS - 5] = torch.nan
    tile = Tile(0, rows, 0, rows, -4, 2)
    out, lse = KERNELS[1].forward(q, k, v, [tile], (0, rows), 0.25, None)
    late = slice(rows - BLOCK_ROWS, rows)
    want_out, want_lse = dense_attention(q, k, v.nan_to_num(0.0), band(rows, rows, -4, 2), scale=0.25)
    torch.testing.assert_close(out[:, late], want_out[:, late], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse[:, :, late], want_lse[:, :, late], rtol=0, atol=1e-12)

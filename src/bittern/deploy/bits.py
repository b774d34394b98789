"""Codes in the bytes of a file, and back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bittern.errors import ModelError
from bittern.quantizers import code_range
from bittern.recipe import Format


def bytes_per_row(columns: int, fmt: Format) -> int:
    """Bytes that a row of `columns` codes takes: 5 ternary codes a byte for base3, else `bits` bits a code."""
    return -(-columns // 5) if fmt.storage == "base3" else -(-columns * fmt.bits // 8)


def pack_codes(codes: Tensor, fmt: Format) -> Tensor:
    """Integer codes (rows, columns) → uint8 (rows, bytes), counted from the lowest, the first code in the low bits.

    Codes of more than 8 bits are two parts side by side: the low bytes of all, then their high bits packed.

    >>> pack_codes(torch.tensor([[-1, 0, 1, 1, 0]]), Format(kind="ternary"))
    tensor([[164,   1]], dtype=torch.uint8)
    """
    low, high = code_range(fmt)
    unsigned = (codes.to(torch.int64) - low) // (2 if fmt.kind == "binary" else 1)
    impossible_zero = fmt.kind == "binary" and not codes.all()
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high or impossible_zero):
        raise ModelError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {fmt}")
    if fmt.storage == "base3":
        digits = F.pad(unsigned, (0, -codes.shape[1] % 5)).unflatten(1, (-1, 5))
        number: Tensor = (digits * 3 ** torch.arange(5, device=codes.device)).sum(-1)
        return number.to(torch.uint8)
    return _pack_bits(unsigned, fmt.bits)


def _pack_bits(unsigned: Tensor, bits: int) -> Tensor:
    if bits > 8:
        return torch.cat([_pack_bits(unsigned & 255, 8), _pack_bits(unsigned >> 8, bits - 8)], 1)
    digit, byte = (torch.arange(n, device=unsigned.device) for n in (8, bits))
    columns = unsigned.shape[1]
    unsigned = F.pad(unsigned, (0, -columns % 8)).unflatten(1, (-1, 8))
    words: Tensor = (unsigned << (bits * digit)).sum(-1, keepdim=True)  # 8 codes in `bits` bytes
    return ((words >> (8 * byte)) & 255).to(torch.uint8).flatten(1)[:, : -(-columns * bits // 8)].contiguous()


def unpack_codes(packed: Tensor, columns: int, fmt: Format) -> Tensor:
    """The inverse of `pack_codes`: uint8 (rows, bytes) → float32 codes (rows, columns), on the device of `packed`."""
    low = code_range(fmt)[0]
    if fmt.storage == "base3":
        powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=packed.device)
        digits = packed.unsqueeze(-1).div(powers, rounding_mode="floor").remainder_(3).flatten(1)[:, :columns]
    else:
        digits = _unpack_bits(packed, columns, fmt.bits)
    codes = digits.to(torch.float32)
    return codes.mul_(2).add_(low) if fmt.kind == "binary" else codes.add_(low)


def _unpack_bits(packed: Tensor, columns: int, bits: int) -> Tensor:
    if bits > 8:
        return packed[:, :columns].to(torch.int64) + (_unpack_bits(packed[:, columns:], columns, bits - 8).long() << 8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        digits = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    else:
        whole = F.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits)).to(torch.int64)
        words = (whole << (8 * torch.arange(bits, device=packed.device))).sum(-1, keepdim=True)
        digits = (words >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    codes: Tensor = digits.flatten(1)[:, :columns]
    return codes

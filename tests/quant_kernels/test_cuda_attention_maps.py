"""Where the Hopper attention kernels put codes: every byte once, no bank twice, slots in place."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from quant_kernels.packing import KV_PAGE
from tests.quant_kernels.test_cuda_attention import DIMS


def test_every_byte_becomes_its_codes(simulator):
    bytes_ = torch.arange(256, dtype=torch.uint8)
    words = bytes_.repeat_interleave(4)
    e4m3, halves = (torch.zeros(512, dtype=torch.int32) for _ in range(2))
    simulator.quant_attention_codes(
        ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(256),
        ctypes.c_void_p(e4m3.data_ptr()), ctypes.c_void_p(halves.data_ptr()),
    )  # fmt: skip
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), dim=1).int()
    codes = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    found = e4m3.view(torch.float8_e4m3fn).float().view(256, 2, 4) * 512
    assert torch.equal(found, codes.unsqueeze(-1).expand(256, 2, 4))
    unit = torch.tensor([2.0**-24, 2.0**-20]).view(1, 2, 1)  # of low nibbles, of high ones
    found = halves.view(torch.float16).float().view(256, 2, 2) / unit - 8
    assert torch.equal(found, codes.unsqueeze(-1).expand(256, 2, 2))


def layout(simulator, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tables = (
        torch.zeros(KV_PAGE, dtype=torch.int32),
        torch.zeros(KV_PAGE, dtype=torch.int32),
        torch.zeros(KV_PAGE * dim // 32, 2, dtype=torch.int32),
        torch.zeros(dim // 64, 32, dtype=torch.int32),
    )
    simulator.quant_prefill_layout(dim, *(ctypes.c_void_p(t.data_ptr()) for t in tables))
    return tables


def test_slots_of_p_are_columns_of_s(simulator):
    tokens, columns, _, _ = layout(simulator, 64)
    assert sorted(tokens.tolist()) == list(range(KV_PAGE))
    assert sorted(columns.tolist()) == list(range(KV_PAGE))
    # PTX: accumulator register i of 4 j + i of lane q: columns 8 j + 2 q + i % 2. Operand register
    # r, byte b: k = 16 (r / 2) + 4 q + b. P's byte (r, b) of step s is packed of S's registers
    # 4 (4 s + 2 (r / 2) + b / 2) + b % 2 (row g): the same slot.
    for step in range(2):
        for q in range(4):
            for h in range(2):
                for b in range(4):
                    j = 4 * step + 2 * h + b // 2
                    slot = 32 * step + 16 * h + 4 * q + b
                    assert int(columns[slot]) == 8 * j + 2 * q + b % 2


def banks(addresses: list[int], width: int) -> list[int]:
    return [(address // 4 + i) % 32 for address in addresses for i in range(width // 4)]


@pytest.mark.parametrize("dim", DIMS)
def test_unpacking_touches_every_byte_once_and_no_bank_twice(simulator, dim):
    tokens, columns, chunks, words = layout(simulator, dim)
    slot_of = tokens.argsort()
    assert len({tuple(chunk) for chunk in chunks.tolist()}) == len(chunks)
    assert int(chunks[:, 0].max()) == KV_PAGE - 1
    assert int(chunks[:, 1].max()) == dim // 32 - 1
    for eight in chunks.view(-1, 8, 2).tolist():  # 16 bytes each: eight lanes at a time
        read = banks([token * dim // 2 + 16 * chunk for token, chunk in eight], 16)
        assert len(set(read)) == 32
        rows = [(int(columns[slot_of[token]]), 16 * chunk) for token, chunk in eight]
        for first in (0, dim // 2):
            placed = [row * 128 + ((byte + first) % 128 ^ row % 8 << 4) for row, byte in rows]
            assert len(set(banks(placed, 16))) == 32
    for round_ in words.tolist():
        for i in range(16):  # 4 bytes each: a warp at a time
            place = [
                int(tokens[lane % 4 * 16 + i]) * dim // 2 + 4 * word
                for lane, word in enumerate(round_)
            ]
            assert len(set(banks(place, 4))) == 32
        for begin in range(0, 32, 8):
            for byte in range(4):
                lanes = range(begin, begin + 8)
                rows = [(4 * round_[lane] + byte, lane % 4 * 16) for lane in lanes]
                placed = [row * 128 + (column ^ row % 8 << 4) for row, column in rows]
                assert len(set(banks(placed, 16))) == 32
    found = {(lane % 4, word) for round_ in words.tolist() for lane, word in enumerate(round_)}
    assert len(found) == 4 * dim // 8

"""The shapes that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes: hidden H, intermediate F, query and KV heads of dimension D."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The fused linears of a block as (N, K)."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = (
    ModelShape("Llama-3-8B", 4096, 14336, 32, 8, 128),
    ModelShape("Llama-2-7B", 4096, 11008, 32, 32, 128),
    ModelShape("Qwen3-8B", 4096, 12288, 32, 8, 128),
    ModelShape("Qwen3-32B", 5120, 25600, 64, 8, 128),
)
# Tokens: decode batches, then prefill chunks.
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

# For correctness: tokens around every tile's edge, and rows (N) that no tile divides.
EDGE_TOKENS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257)
EDGE_ROWS = (16, 40, 72, 136, 264, 384)
EDGE_COLUMNS = (64, 128, 192, 384, 512, 576)
GQA_RATIOS = (1, 3, 4, 8)
HEAD_DIMS = (64, 96, 128, 256)


def fitting_groups(columns: int) -> list[int]:
    """The group sizes that divide K = columns, -1 (per channel) among them."""
    return [*(g for g in (32, 64, 128) if columns % g == 0), -1]

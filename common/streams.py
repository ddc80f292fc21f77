"""Independent random streams of one seed: a draw depends on (seed, stream, index), not on what was drawn before."""

import hashlib

import torch


def key(seed: int, stream: int, index: int = 0) -> int:
    """A 32-bit seed for one (seed, stream, index)."""
    # hashed, because PyTorch's CPU generator reads only the low 32 bits of its seed
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generator(seed: int, stream: int, index: int = 0) -> torch.Generator:
    """A CPU generator for one (seed, stream, index); distinct triples give unrelated streams."""
    return torch.Generator().manual_seed(key(seed, stream, index))

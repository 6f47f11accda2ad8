"""Texts as vectors: how the ledger keeps them, likeness by cosine, and clusters."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from nemotron4.errors import DataError

F32 = NDArray[np.float32]
_BLOCK = 2048
_ROUNDS = 25  # of k-means; by then few texts change their cluster


def pack_vector(vector: Sequence[float]) -> str:
    """Of unit length, so that a product of two is their cosine."""
    values = np.asarray(vector, np.float32)
    norm = float(np.linalg.norm(values))
    return base64.b64encode((values / norm if norm else values).tobytes()).decode("ascii")


def unpack_vectors(packed: Sequence[bytes]) -> F32:
    """One row per text; all of one length."""
    lengths = {len(vector) for vector in packed}
    if len(lengths) > 1:
        raise DataError(
            f"vectors of {len(lengths)} lengths: {sorted(length // 4 for length in lengths)}",
            hint="they are of several models; let one `embed` stage make all of them",
        )
    return np.frombuffer(b"".join(packed), np.float32).reshape(len(packed), -1)


def find_alike(
    vectors_ND: F32, threshold: float, differ: Callable[[int, int], bool] = lambda later, kept: False
) -> dict[int, tuple[int, float]]:
    """later text -> (kept earlier text, cosine); every pair is looked at, a block of products at a time.

    ``differ`` says of two texts that they are not the same, whatever their vectors say.
    """
    found: dict[int, tuple[int, float]] = {}
    kept: list[int] = []
    for start in range(0, len(vectors_ND), _BLOCK):
        block = vectors_ND[start : start + _BLOCK]
        earlier = vectors_ND[kept] @ block.T if kept else np.zeros((0, len(block)), np.float32)
        inside = block @ block.T
        new: list[int] = []
        for column in range(len(block)):
            scores = np.concatenate([earlier[:, column], inside[new, column]])
            above = np.flatnonzero(scores >= threshold)
            for at in above[np.argsort(-scores[above], kind="stable")]:
                other = kept[at] if at < len(kept) else start + new[at - len(kept)]
                if not differ(start + column, other):
                    found[start + column] = (other, float(scores[at]))
                    break
            else:
                new.append(column)
        kept += [start + column for column in new]
    return found


def cluster(vectors_ND: F32, num_clusters: int, seed: int = 0) -> tuple[NDArray[np.intp], F32]:
    """(cluster, cosine with its centre) of each text, by spherical k-means from drawn texts."""
    draw = np.random.default_rng(seed)
    num = min(num_clusters, len(vectors_ND))
    centres_KD = vectors_ND[np.sort(draw.choice(len(vectors_ND), num, replace=False))].copy()
    labels_N = np.full(len(vectors_ND), -1)
    for _ in range(_ROUNDS):
        new_N = np.concatenate(
            [(vectors_ND[i : i + _BLOCK] @ centres_KD.T).argmax(1) for i in range(0, len(vectors_ND), _BLOCK)]
        )
        if (new_N == labels_N).all():
            break
        labels_N = new_N
        for k in range(num):
            members = vectors_ND[labels_N == k]
            if len(members):
                mean = members.mean(0)
                centres_KD[k] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return labels_N, np.einsum("nd,nd->n", vectors_ND, centres_KD[labels_N])

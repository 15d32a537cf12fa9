"""Residual codes against loops from the equations."""

from __future__ import annotations

import pytest
import torch

from transformers_gsrq import ResidualQuantizer
from transformers_gsrq.ops.reference import encode_vectors, rotate, unrotate

HEADS, HEAD_DIM = 4, 8
# Smaller than a head, a head, two heads, all heads.
WIDTHS = (2, 8, 16, 32)


def make_centroids(width: int, stages: int = 3, count: int = 16) -> torch.Tensor:
    scale = 0.5 ** torch.arange(stages).view(1, stages, 1, 1)
    return torch.randn(HEADS * HEAD_DIM // width, stages, count, width) * scale


def oracle_encode(vector: torch.Tensor, stages: torch.Tensor) -> list[int]:
    """Greedy residual codes of one vector, by distances in float64."""
    residual, codes = vector.double(), []
    for table in stages.double():
        distances = [float(((residual - c) ** 2).sum()) for c in table]
        codes.append(distances.index(min(distances)))
        residual = residual - table[codes[-1]]
    return codes


@pytest.mark.parametrize("width", WIDTHS)
def test_codes_and_states_are_the_equations(width: int) -> None:
    centroids = make_centroids(width)
    quantizer = ResidualQuantizer(centroids, HEADS)
    states = torch.randn(2, HEADS, 5, HEAD_DIM)
    codes = quantizer.encode(states)
    assert codes.shape == (2, centroids.shape[0], 3, 5) and codes.dtype == torch.uint8
    decoded = quantizer.decode(codes)
    for b in range(2):
        for t in range(5):
            flat = states[b, :, t].flatten()
            made = torch.zeros(HEADS * HEAD_DIM)
            for m in range(centroids.shape[0]):
                part = slice(m * width, (m + 1) * width)
                assert codes[b, m, :, t].tolist() == oracle_encode(flat[part], centroids[m])
                made[part] = sum(centroids[m, r, int(codes[b, m, r, t])] for r in range(3))
            torch.testing.assert_close(decoded[b, :, t].flatten(), made)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_prefix_of_stages_is_the_coarser_code(width: int) -> None:
    centroids = make_centroids(width)
    states = torch.randn(1, HEADS, 9, HEAD_DIM)
    codes = ResidualQuantizer(centroids, HEADS).encode(states)
    coarse = ResidualQuantizer(centroids[:, :2].contiguous(), HEADS)
    assert torch.equal(coarse.encode(states), codes[:, :, :2])
    torch.testing.assert_close(
        ResidualQuantizer(centroids, HEADS).decode(codes[:, :, :2]), coarse.decode(codes[:, :, :2])
    )


def test_beam_of_one_is_greedy_and_wider_is_never_worse() -> None:
    centroids = make_centroids(8, stages=5)
    vectors = torch.randn(4, 200, 8)
    greedy = encode_vectors(vectors, centroids)
    assert torch.equal(encode_vectors(vectors, centroids, beam_width=1), greedy)
    errors = [
        reconstruction_error(vectors, centroids, encode_vectors(vectors, centroids, width)) for width in (1, 2, 8)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_exhaustive_beam_finds_the_best_sum() -> None:
    centroids = make_centroids(8, stages=2, count=5)[:1]
    vectors = torch.randn(1, 50, 8)
    codes = encode_vectors(vectors, centroids, beam_width=25)[0].long()
    sums = centroids[0, 0][:, None] + centroids[0, 1][None]
    best = torch.cdist(vectors[0], sums.flatten(0, 1)).argmin(-1)
    assert torch.equal(codes[0] * 5 + codes[1], best)


def reconstruction_error(vectors: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> float:
    made = torch.zeros_like(vectors)
    for m in range(codes.shape[0]):
        made[m] = sum(centroids[m, r, codes[m, r].long()] for r in range(codes.shape[1]))
    return (vectors - made).square().sum().item()


def test_blocks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    centroids, vectors = make_centroids(8), torch.randn(4, 100, 8)
    whole = [encode_vectors(vectors, centroids, width) for width in (1, 3)]
    monkeypatch.setattr("transformers_gsrq.ops.reference.MAX_SCORES", 4 * 16 * 7)
    assert torch.equal(encode_vectors(vectors, centroids, 1), whole[0])
    assert torch.equal(encode_vectors(vectors, centroids, 3), whole[1])


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_unrotate_undoes_rotate(scaling: float) -> None:
    states = torch.randn(2, HEADS, 6, HEAD_DIM)
    angles = torch.randn(2, 6, 3)
    cos_sin = (angles.cos() * scaling, angles.sin() * scaling)
    rotated = rotate(states, cos_sin)
    torch.testing.assert_close(unrotate(rotated, cos_sin), states)
    # Partial rotary: the last channels are not touched; the first are.
    assert torch.equal(rotated[..., 6:], states[..., 6:])
    assert not torch.allclose(rotated[..., :6], states[..., :6], atol=0.1)


def test_rotated_keys_are_encoded_before_rotation() -> None:
    quantizer = ResidualQuantizer(make_centroids(8), HEADS)
    states, angles = torch.randn(1, HEADS, 7, HEAD_DIM), torch.randn(1, 7, 4)
    cos_sin = (angles.cos(), angles.sin())
    codes = quantizer.encode(rotate(states, cos_sin), cos_sin)
    assert torch.equal(codes, quantizer.encode(states))
    torch.testing.assert_close(quantizer.decode(codes, cos_sin), rotate(quantizer.decode(codes), cos_sin))


def test_codes_need_no_gradient() -> None:
    """Centroids that were made in inference mode cannot be part of a graph, and codes have none."""
    with torch.inference_mode():
        quantizer = ResidualQuantizer(make_centroids(8), HEADS)
    states = torch.randn(1, HEADS, 7, HEAD_DIM, requires_grad=True)
    assert torch.equal(quantizer.encode(states), quantizer.encode(states.detach()))


def test_bad_input_is_named() -> None:
    quantizer = ResidualQuantizer(make_centroids(8), HEADS, label="layer 7 key")
    states = torch.randn(1, HEADS, 3, HEAD_DIM)
    with pytest.raises(ValueError, match="4 heads of 8 channels, got states of 4 heads of 6"):
        quantizer.encode(states[..., :6])
    with pytest.raises(ValueError, match="beam_width must be at least 1, got 0"):
        quantizer.encode(states, beam_width=0)
    for bad in (float("nan"), float("inf")):
        states[0, 1, 2, 3] = bad
        with pytest.raises(ValueError, match="layer 7 key"):
            quantizer.encode(states)
    with pytest.raises(ValueError, match="backend"):
        ResidualQuantizer(make_centroids(8), HEADS, backend="cuda").encode(torch.randn(1, HEADS, 3, HEAD_DIM))

"""Rotary positions against complex numbers, and the places of candidates."""

import torch

from gr.ops.backend import force_backend
from gr.ops.rope import places, rope_tables, rotate

THETA = 100.0


def test_rotation_is_a_product_of_complex_numbers() -> None:
    x_THQ = torch.randn(7, 3, 8, dtype=torch.float64)
    place_T = torch.tensor([0, 1, 2, 5, 0, 1, 300])
    turned = rotate(x_THQ, *rope_tables(place_T, 8, THETA, torch.float64))
    frequency = THETA ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(7, 4, dtype=torch.float64), place_T[:, None] * frequency)[:, None]
    product = torch.complex(x_THQ[..., :4], x_THQ[..., 4:]) * turn
    torch.testing.assert_close(turned, torch.cat([product.real, product.imag], dim=-1), rtol=0, atol=1e-13)


def test_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 6, dtype=torch.float64)
    score = [
        (
            rotate(q, *rope_tables(torch.tensor([i]), 6, THETA, torch.float64))
            * rotate(k, *rope_tables(torch.tensor([j]), 6, THETA, torch.float64))
        ).sum()
        for i, j in [(7, 4), (107, 104), (8, 4)]
    ]
    torch.testing.assert_close(score[0], score[1])
    assert not torch.allclose(score[0], score[2])


def test_places_restart_in_each_sequence_and_candidates_share_one() -> None:
    offsets = torch.tensor([0, 3, 3, 7])
    assert places(offsets, 7).tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert places(offsets, 7, torch.tensor([0, 0, 2])).tolist() == [0, 1, 2, 0, 1, 2, 2]


def test_the_cpp_turns_as_the_reference_and_its_gradient_turns_back() -> None:
    """float32, of heads that are a part of wider rows, as a joint product of q, k and v makes them."""
    rows_THQ = torch.randn(70, 5, 6)
    place_T, grad_THQ = torch.randint(0, 300, (70,)), torch.randn(70, 2, 6)
    tables = rope_tables(place_T, 6, THETA, torch.float32)
    results = []
    for backend in ("native", "torch"):
        x_THQ = rows_THQ.clone().requires_grad_()
        with force_backend(backend):
            turned = rotate(x_THQ[:, 1:3], *tables)
            results.append((turned, *torch.autograd.grad(turned, x_THQ, grad_THQ)))
    for native, composed in zip(*results, strict=True):
        torch.testing.assert_close(native, composed, rtol=1e-6, atol=1e-6)
    spread_TQH = torch.randn(7, 6, 2)
    with force_backend("native"):
        turned = rotate(spread_TQH.transpose(1, 2), *(table[:7] for table in tables))
    with force_backend("torch"):
        torch.testing.assert_close(turned, rotate(spread_TQH.transpose(1, 2), *(table[:7] for table in tables)))


def test_a_token_has_the_same_bits_alone_and_among_many_of_its_place() -> None:
    """Many tokens of few places share a row for each place."""
    place_T = torch.tensor([3, 0, 3, 2, 1, 3])
    alone = [rope_tables(place_T[t : t + 1], 8, THETA, torch.float32) for t in range(len(place_T))]
    for many, single in zip(rope_tables(place_T, 8, THETA, torch.float32), zip(*alone, strict=True), strict=True):
        assert torch.equal(many, torch.cat(single))

"""Rotary positions against complex numbers, and the places of candidates."""

import torch

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

"""The cover that stands for a full product of options holds every two of them."""

import itertools

import pytest
from covering import all_pairs


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (3, 2, 3), (4, 2, 7), (3, 3, 3, 3), (2, 5, 2, 3)])
def test_every_two_options_meet(sizes):
    factors = [[f"{letter}{i}" for i in range(n)] for letter, n in zip("abcd", sizes, strict=False)]
    cover = all_pairs(*factors)
    assert len(cover) == len(set(cover))
    assert set(cover) <= set(itertools.product(*factors))
    for one, other in itertools.combinations(range(len(sizes)), 2):
        met = {(case[one], case[other]) for case in cover}
        assert met == set(itertools.product(factors[one], factors[other]))


def test_a_cover_is_small():
    assert len(all_pairs(range(3), range(2), range(3))) == 9  # of 18; 9 pairs of the largest two
    assert len(all_pairs(range(4), range(2), range(7))) == 28  # of 56
    assert len(all_pairs(range(3), range(3), range(3), range(3))) <= 12  # of 81

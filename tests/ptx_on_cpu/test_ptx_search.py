"""The searches' compiled Triton kernels: the edges that the operators' own tests name, neighbours against brute force, and every way through them."""

import pytest
import torch

from ptx_suite import Emulator, emulated, missing

if missing("triton"):
    pytest.skip(missing("triton"), allow_module_level=True)

from memcore.functional import knn_lookup, knn_search
from memcore.kernels import _triton
from test_knn_lookup import test_all_dictionaries_in_one_call, test_any_width_of_the_kernel, test_edges, test_values as test_values_of_the_read
from test_knn_search import (
    brute_force, drawn, test_a_query_that_is_no_number, test_cosine_of_zero_and_of_next_to_nothing, test_count, test_distances_that_overflow,
    test_keys_that_are_no_numbers_come_last, test_lowest_index_wins_a_tie, test_padding_and_nothing_at_all, test_values,
)  # fmt: skip

__all__ = [
    "test_a_query_that_is_no_number", "test_all_dictionaries_in_one_call", "test_any_width_of_the_kernel", "test_cosine_of_zero_and_of_next_to_nothing",
    "test_count", "test_distances_that_overflow", "test_edges", "test_keys_that_are_no_numbers_come_last", "test_lowest_index_wins_a_tie",
    "test_padding_and_nothing_at_all", "test_values", "test_values_of_the_read",
]  # fmt: skip


@pytest.fixture
def backend():
    with emulated(Emulator("triton", 80, orders=("lockstep",), races=False)):
        yield "triton"

"""Phrases are drawn in proportion to their loss, the same after a resume and on any number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from samdistill.jobs.text import sampling
from samdistill.jobs.text.sampling import PhraseSampler


def taught(sampler: PhraseSampler, losses: list[float]) -> PhraseSampler:
    sampler.record(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_without_a_share_every_epoch_has_every_phrase() -> None:
    sampler = taught(PhraseSampler(4, passes=2), [9.0, 0, 0, 0])
    assert [sorted(sampler.order(epoch)) for epoch in (0, 1)] == [sorted([*range(4)] * 2)] * 2
    assert sampler.state() == {}


def test_phrases_that_come_once_have_the_last_numbers() -> None:
    assert sorted(PhraseSampler(2, passes=3, once=2).order(0)) == [0, 0, 0, 1, 1, 1, 2, 3]
    sampler = PhraseSampler(2, passes=1, hard=0.5, once=2)
    sampler.record(torch.arange(4), torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert sampler.order(1).count(3) >= 2  # they are drawn by loss too


def test_the_share_goes_to_phrases_in_proportion_to_their_loss() -> None:
    sampler = PhraseSampler(4, passes=500, hard=0.5)
    assert Counter(sampler.order(0)) == dict.fromkeys(range(4), 500)  # no loss is known yet
    sampler.record(torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0.2, 0.4, 0.1, 0.0, 0.6]))
    drawn = Counter(sampler.order(1))
    assert sum(drawn.values()) == 2000
    expected = torch.tensor([0.3, 0.1, 0.0, 0.6]) * 1000 + 250
    for number, count in enumerate(expected.tolist()):
        assert drawn[number] == pytest.approx(count, abs=80)


def test_a_phrase_that_was_not_seen_keeps_its_loss() -> None:
    sampler = taught(PhraseSampler(3, hard=0.5), [0.5, 0.25, 1.0])
    sampler.order(1)
    sampler.record(torch.tensor([1]), torch.tensor([0.75]))
    sampler.order(2)
    assert sampler.losses.tolist() == [0.5, 0.75, 1.0]


def test_the_state_gives_the_same_draws_in_the_middle_and_at_the_end_of_an_epoch() -> None:
    whole, losses = PhraseSampler(6, passes=4, hard=0.5, seed=3), [0.1, 0.9, 0.2, 0.3, 0.8, 0.4]
    taught(whole, losses).order(1)
    taught(whole, losses[::-1])
    again = PhraseSampler(6, passes=4, hard=0.5, seed=3)
    again.load_state([{key: value.clone() for key, value in whole.state().items()}], 0, 1)
    assert again.order(1) == whole.order(1)
    for sampler in (whole, again):
        taught(sampler, losses)
    assert again.order(2) == whole.order(2) and torch.equal(again.losses, whole.losses)


def test_ranks_pool_their_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [PhraseSampler(2, hard=0.5) for _ in range(2)]
    taught(ranks[0], [0.2, 0.4])
    taught(ranks[1], [0.6, 0.4])
    sums = [(rank.sums, rank.seen) for rank in ranks]
    monkeypatch.setattr(sampling, "gather", lambda own: sums)
    orders = [rank.order(1) for rank in ranks]
    assert orders[0] == orders[1] and ranks[0].losses.tolist() == pytest.approx([0.4, 0.4])


def test_a_checkpoint_of_two_ranks_can_be_continued_by_one() -> None:
    two = [taught(PhraseSampler(2, hard=0.5), [0.2, 0.4]), taught(PhraseSampler(2, hard=0.5), [0.6, 0.4])]
    one = PhraseSampler(2, hard=0.5)
    one.load_state([rank.state() for rank in two], 0, 1)
    one.order(1)
    assert one.losses.tolist() == pytest.approx([0.4, 0.4])

import math
from itertools import chain, pairwise

import pytest

from samdistill.config import TrainConfig
from samdistill.engine.schedule import GlobalBatches, Phases, Schedule, Shard, stream_seed
from samdistill.types import UserError


def config(**changes):
    return TrainConfig.model_validate({"epochs": 10, "warmup_epochs": 2, "batch_size": 64} | changes)


@pytest.mark.parametrize("per_epoch", [1, 7, 50])
def test_rate_has_exact_ends_and_never_rises_after_warm_up(per_epoch):
    s = Schedule.of(config(lr_batch=None), per_epoch)
    rates = [s(i) for i in range(s.total + 5)]
    assert s.total == 10 * per_epoch and s.warmup == 2 * per_epoch
    assert rates[0] == 1e-6 and rates[s.warmup] == 1e-3 and set(rates[s.total - 1 :]) == {1e-5}
    assert all(a < b for a, b in pairwise(rates[: s.warmup + 1]))
    assert all(a >= b for a, b in pairwise(rates[s.warmup :]))


def test_rate_is_half_way_in_the_middle_of_warm_up_and_cosine():
    s = Schedule(total=111, warmup=10, base=1.0, start=0.2, minimum=0.0)
    assert s(5) == pytest.approx(0.6)
    assert s(60) == pytest.approx(0.5) and s(35) == pytest.approx(math.cos(math.pi / 8) ** 2)


def test_all_three_rates_scale_with_the_batch():
    plain, scaled = Schedule.of(config(lr_batch=None), 5), Schedule.of(config(lr_batch=512), 5)
    assert [scaled(i) for i in range(50)] == pytest.approx([plain(i) / 8 for i in range(50)])


def test_no_warm_up_starts_at_the_base_rate():
    assert Schedule.of(config(warmup_epochs=0, lr_batch=None), 5)(0) == 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup_epochs": 10}, ["train.warmup_epochs=10", "train.epochs=10"]),
        ({"min_lr": 0.1}, ["train.min_lr=0.1", "train.lr=0.001"]),
        ({"warmup_lr": 0.1}, ["train.warmup_lr=0.1"]),
    ],
)
def test_settings_that_contradict_are_refused(changes, words):
    with pytest.raises(UserError) as error:
        Schedule.of(config(**changes), 5)
    assert all(word in str(error.value) for word in words)


def in_phases(*phases, **changes):
    return TrainConfig.model_validate({"batch_size": 64, "lr_batch": None, "phases": phases} | changes)


FIRST = {"name": "first", "epochs": 2, "lr": 1.0, "warmup_steps": 4, "warmup_lr": 0.2, "min_lr": 0.1}
SECOND = {"name": "second", "epochs": 1, "lr": 0.4}


def test_each_phase_has_its_own_warm_up_base_and_minimum():
    """Ten steps and five, every rate halved by the batch; the values by hand."""
    rate = Phases.of(in_phases(FIRST, SECOND, lr_batch=128), 5)
    assert rate.total == 15
    first = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5, 9: 0.05}
    assert {step: rate(step) for step in first} == pytest.approx(first)
    assert rate(5) == pytest.approx(0.05 + 0.45 * (1 + math.cos(0.2 * math.pi)) / 2)
    second = {10: 0.2, 11: 0.1 * (1 + math.sqrt(0.5)), 12: 0.1, 13: 0.1 * (1 - math.sqrt(0.5)), 14: 0.0, 99: 0.0}
    assert {step: rate(step) for step in second} == pytest.approx(second, abs=1e-12)


@pytest.mark.parametrize("lr_batch", [None, 512])
def test_one_phase_is_the_schedule_of_a_run_without_phases(lr_batch):
    plain = config(lr_batch=lr_batch)
    only = {"name": "all", "epochs": 10, "lr": 1e-3, "warmup_steps": 14, "warmup_lr": 1e-6, "min_lr": 1e-5}
    one, none = Phases.of(in_phases(only, lr_batch=lr_batch), 7), Phases.of(plain, 7)
    assert one == none == Phases((Schedule.of(plain, 7),)) and one.total == 70
    assert [none(step) for step in range(75)] == [Schedule.of(plain, 7)(step) for step in range(75)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"warmup_steps": 5}, ["'second'", "5 steps", "warm-up of 5"]),
        ({"min_lr": 0.5}, ["'second'", "min_lr=0.5", "lr=0.4"]),
        ({"warmup_lr": 0.5}, ["'second'", "warmup_lr=0.5", "lr=0.4"]),
    ],
)
def test_a_phase_that_contradicts_itself_is_refused_by_name(change, words):
    with pytest.raises(UserError) as error:
        Phases.of(in_phases(FIRST, SECOND | change), 5)
    assert all(word in str(error.value) for word in words), error.value
    assert Phases.of(in_phases(FIRST, SECOND | {"warmup_steps": 4, "min_lr": 0.4, "warmup_lr": 0.4}), 5)(14) == 0.4


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 3), (3, 4)])
def test_ranks_and_micro_batches_together_are_the_single_process_batch(world, accumulate):
    items, size = 100, 12
    single = list(GlobalBatches(items, Shard(size), seed=3, epoch=2))
    shards = [Shard(size, accumulate, rank, world) for rank in range(world)]
    parts = [list(GlobalBatches(items, shard, seed=3, epoch=2)) for shard in shards]
    assert len(single) == 8 == shards[0].steps_per_epoch(items)
    for step, whole in enumerate(single):
        micro = [part[step * accumulate + m] for part in parts for m in range(accumulate)]
        assert {len(m) for m in micro} == {shards[0].local}
        assert sorted(chain(*micro)) == sorted(whole)
    assert len(set(chain(*single))) == 96, "no image twice in an epoch"


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def order(seed, epoch):
        return list(GlobalBatches(40, Shard(8), seed, epoch))

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert stream_seed(1, 23) != stream_seed(12, 3) and 0 <= stream_seed(0) < 2**63


def test_skip_is_the_tail_of_the_epoch():
    shard = Shard(8, 2, 1, 2)
    whole = list(GlobalBatches(50, shard, 0, 1))
    tail = GlobalBatches(50, shard, 0, 1, skip=4)
    assert list(tail) == whole[8:] and len(tail) == len(whole) - 8


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(UserError, match=r"train.batch_size=10 .* 2 rank\(s\) x train.accumulate=3; try 12"):
        Shard(10, 3, 0, 2)


def test_fewer_images_than_a_batch_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"7 image\(s\).*train.batch_size=8"):
        Shard(8).steps_per_epoch(7)

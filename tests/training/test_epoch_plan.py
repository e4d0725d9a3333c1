"""An epoch's order, groups and passes."""

from dse.training.epoch_plan import epoch_order


def test_the_order_changes_by_epoch_and_seed_and_holds_every_row():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert tuple(epoch_order(50, 1, 0)) == orders[0]

"""SyncBatchNorm is planned wherever a plan is made: with a process group, which ranks have, and without."""

from __future__ import annotations

from torch import nn

from credit_domain import convert_to_domain_parallel, granularity_of, plan_domain_parallel
from credit_domain.verification import verify_domain_parallel
from credit_halo.testing import run_threads
from credit_mesh import initialize_domain_parallel


def make():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, 2, 1),
        nn.SyncBatchNorm(8),
        nn.SyncBatchNorm(8, track_running_stats=False),
        nn.Conv2d(8, 2, 1),
    )


def test_planned_with_a_process_group():
    alone = str(plan_domain_parallel(make(), (1, 2, 12, 8), 2))

    def rank_main(rank):
        net = make()
        assert str(plan_domain_parallel(net, (1, 2, 12, 8), 2)) == alone
        assert granularity_of(net, input_shape=(1, 2, 12, 8)) == 2
        manager = initialize_domain_parallel(2, 2)
        convert_to_domain_parallel(net, manager, input_shape=(1, 2, 12, 8))
        assert all(part.training for part in net.modules())

    run_threads(rank_main, 2)


def test_verified():
    report = verify_domain_parallel(make, (2, 2, 12, 8), 3)
    assert report, str(report)

"""HaloExchange: the padded tensors of all ranks are slices of the whole padded tensor."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from halo_reference import padded_rows, partitions, shard, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from credit_halo import EdgeRule, HaloExchange, plan_halo
from credit_halo.halo_exchange import _HaloExchangeFunction
from credit_halo.testing import ThreadGroup, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

UNEVEN = RowPartition((3, 1, 4, 2))


@settings(max_examples=40)
@given(
    st.data(),
    partitions(least=2, most=5),
    st.sampled_from(["zeros", "replicate", "circular", "constant"]),
    st.booleans(),
)
def test_convolution_after_it_is_exact(data: st.DataObject, partition: RowPartition, name: str, declare: bool) -> None:
    before, after = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    rule = EdgeRule(name, value=7.0) if name == "constant" else EdgeRule(name)
    kernel = before + after + 1
    whole = torch.randn(1, 2, partition.rows, 4, dtype=torch.float64)
    weight = torch.randn(3, 2, kernel, 3, dtype=torch.float64)
    factor = torch.randn(1, 3, partition.rows, 4, dtype=torch.float64)

    def rank_main(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        manager = initialize_domain_parallel(partition.ranks, partition.ranks)
        if declare:
            manager.declare(partition)
        halo = HaloExchange((before, after), edge=rule)
        w = weight.clone().requires_grad_()
        for _ in range(2):  # learns in the first call, knows in the second
            x = shard(whole, partition, rank).clone().requires_grad_()
            w.grad = None
            out = F.conv2d(halo(x), w, padding=(0, 1))
            (out * shard(factor, partition, rank)).sum().backward()
        return out.detach(), x.grad, w.grad

    results = run_threads(rank_main, partition.ranks)
    x, w = whole.clone().requires_grad_(), weight.clone().requires_grad_()
    rows = list(range(-before, partition.rows + after))
    out = F.conv2d(padded_rows(x, rows, name), w, padding=(0, 1))
    (out * factor).sum().backward()
    for rank, (part, grad, _) in enumerate(results):
        torch.testing.assert_close(part, shard(out.detach(), partition, rank))
        torch.testing.assert_close(grad, shard(x.grad, partition, rank))
    torch.testing.assert_close(sum(grad for _, _, grad in results), w.grad)


@pytest.mark.parametrize("world", [0, 1])
def test_one_rank_pads_its_edges(world: int) -> None:
    """So that a convolution without padding after it keeps its rows, as on many ranks."""
    whole = torch.randn(2, 3, 5, 4, dtype=torch.float64)

    def rank_main(rank: int = 0) -> None:
        x = whole.clone().requires_grad_()
        out = HaloExchange(2)(x)
        assert torch.equal(out, F.pad(whole, (0, 0, 2, 2)))
        out.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(whole))
        assert torch.equal(
            HaloExchange((1, 0), -1, edge="circular")(whole), F.pad(whole, (1, 0, 0, 0), mode="circular")
        )
        assert torch.equal(_HaloExchangeFunction.apply(whole, 1, -2, None), F.pad(whole, (0, 0, 1, 1)))

    if world:
        run_threads(lambda rank: (initialize_domain_parallel(1, 1), rank_main()), 1)
    else:
        rank_main()


def test_the_autograd_function_of_the_reference() -> None:
    whole = whole_numbers((1, 2, 10, 3))
    factor = whole_numbers((1, 2, 14 + 2 * 3, 3))

    def rank_main(rank: int) -> None:
        manager = initialize_domain_parallel(4, 4)
        x = shard(whole, UNEVEN, rank).clone().requires_grad_()
        out = _HaloExchangeFunction.apply(x, 1, -2, manager)
        rows = slice(UNEVEN.offsets[rank], UNEVEN.offsets[rank + 1] + 2)
        assert torch.equal(out, F.pad(whole, (0, 0, 1, 1))[:, :, rows])
        (grad,) = torch.autograd.grad(out, x, factor[:, :, rows], create_graph=True)
        reference = whole.clone().requires_grad_()
        padded = F.pad(reference, (0, 0, 1, 1))
        total = sum(
            (padded[:, :, a : b + 2] * factor[:, :, a : b + 2]).sum()
            for a, b in zip(UNEVEN.offsets, UNEVEN.offsets[1:], strict=False)
        )
        total.backward()
        assert torch.equal(grad, shard(reference.grad, UNEVEN, rank))

    run_threads(rank_main, 4)


def test_trim_undoes_it() -> None:
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(HaloExchange.trim(HaloExchange((2, 1))(x), 2, 1), x)
    assert HaloExchange.trim(x, 0, 0).data_ptr() == x.data_ptr()
    assert HaloExchange.trim(x, 1, 1, dim=-1).shape == (2, 3, 5, 2)
    with pytest.raises(ValueError, match="cannot trim 3 and 3 rows off the 5 of dim -2"):
        HaloExchange.trim(x, 3, 3)
    with pytest.raises(ValueError, match="cannot trim -1"):
        HaloExchange.trim(x, -1, 0)


def test_several_heights_one_layer_and_checkpointing() -> None:
    """A layer that is called at two levels of a network, under recomputation, with the input's partition declared."""
    whole = torch.randn(1, 2, 26, 4, dtype=torch.float64)
    partition = RowPartition.even(26, 3, 2)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)

    def net(x: torch.Tensor, pad) -> torch.Tensor:
        fine = F.conv2d(pad(x), weight, padding=(0, 1)).sin()
        coarse = F.avg_pool2d(fine, (2, 1))
        coarse = F.conv2d(pad(coarse), weight, padding=(0, 1)).sin()
        return fine + coarse.repeat_interleave(2, dim=2)

    def rank_main(rank: int, reentrant: bool) -> tuple[torch.Tensor, torch.Tensor]:
        initialize_domain_parallel(3, 3).declare(partition)
        halo = HaloExchange(1)
        for _ in range(2):
            x = shard(whole, partition, rank).clone().requires_grad_()
            out = checkpoint(net, x, halo, use_reentrant=reentrant)
            out.square().sum().backward()
        return out.detach(), x.grad

    reference = whole.clone().requires_grad_()
    out = net(reference, lambda t: F.pad(t, (0, 0, 1, 1)))
    out.square().sum().backward()
    for reentrant in (False, True):
        for rank, (part, grad) in enumerate(run_threads(rank_main, 3, reentrant)):
            torch.testing.assert_close(part, shard(out.detach(), partition, rank))
            torch.testing.assert_close(grad, shard(reference.grad, partition, rank))


@pytest.mark.parametrize("declare", [False, True])
def test_heights_that_change_between_calls(declare: bool) -> None:
    """Some ranks hold as many rows as before and could not know by themselves that the partition changed."""

    def rank_main(rank: int) -> None:
        manager = initialize_domain_parallel(3, 3)
        halo = HaloExchange(1)
        for height in (8, 9, 10, 8):
            partition = RowPartition.even(height, 3)
            if declare:
                manager.declare(height)
            whole = whole_numbers((1, 1, height, 2), seed=height)
            rows = slice(partition.offsets[rank], partition.offsets[rank + 1] + 2)
            assert torch.equal(halo(shard(whole, partition, rank)), F.pad(whole, (0, 0, 1, 1))[:, :, rows])

    run_threads(rank_main, 3)


def test_a_declared_partition_is_learned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0] * 3
    original = ThreadGroup.all_gather

    def counted(*args, **kwargs):
        count[dist.get_rank()] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(ThreadGroup, "all_gather", counted)

    def rank_main(rank: int) -> list[int]:
        initialize_domain_parallel(3, 3).declare(8)
        halo = HaloExchange(1)
        seen = []
        for _ in range(4):
            x = torch.ones(1, 1, RowPartition.even(8, 3).sizes[rank], 2, requires_grad=True)
            halo(x).sum().backward()
            seen.append(count[rank])
        return seen

    for seen in run_threads(rank_main, 3):
        assert seen[0] > 0
        assert seen[0] == seen[-1], "no metadata moves in steady state"


def test_it_is_an_ordinary_module() -> None:
    halo = HaloExchange((1, 2), edge="reflect")
    assert repr(halo) == "HaloExchange((1, 2), dim=-2, edge='reflect')"
    assert halo.halo_width == (1, 2)
    assert (HaloExchange(3).halo_width, HaloExchange(3).dim, HaloExchange(3, 2).dim) == (3, -2, 2)
    assert halo.state_dict() == {}
    x = torch.randn(1, 1, 5, 2)
    assert torch.equal(copy.deepcopy(halo)(x), halo(x))


@pytest.mark.parametrize("width", [-1, True, 1.5, (1, -1), (1, 2, 3), "1"])
def test_bad_widths_are_refused(width: object) -> None:
    with pytest.raises(ValueError, match="halo_width must be an integer >= 0 or a pair"):
        HaloExchange(width)  # type: ignore[arg-type]


def test_reflection_wider_than_the_tensor_is_refused_on_every_rank() -> None:
    def rank_main(rank: int) -> None:
        initialize_domain_parallel(3, 3)
        halo = HaloExchange(8, edge="reflect")
        with pytest.raises(ValueError, match="'reflect' reaches 7 rows beyond a tensor of 8 rows"):
            halo(torch.ones(1, 1, RowPartition.even(8, 3).sizes[rank], 2))

    run_threads(rank_main, 3)
    with pytest.raises(ValueError, match="reaches 7 rows"):
        plan_halo(RowPartition((8,)), 8, 8, rank=0, edge="reflect")

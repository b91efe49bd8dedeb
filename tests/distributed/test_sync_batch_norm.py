"""Two gloo ranks against torch's own batch norm of the union of their inputs."""

import copy

import pytest
import torch
from torch import nn

from mgd_det.distributed.sync_batch_norm import CPUSyncBatchNorm, use_cpu_sync_batch_norm


def sync_batch_norm(**options):
    torch.manual_seed(0)
    layer = nn.SyncBatchNorm(5, **options).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def inputs():
    """Of the first and of the second rank: other numbers of images, other sizes, other means."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(3, 5, 4, 6, generator=generator, dtype=torch.float64) + 100
    return [first, 2 * torch.randn(1, 5, 7, 2, generator=generator, dtype=torch.float64) + 99]


def loss(y):
    # Neither the mean nor the mean square, whose gradients are zero behind a batch norm.
    return (y**3).sum()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_ranks_are_one_batch_norm_of_all_values(run_ranks, momentum):
    original = sync_batch_norm(momentum=momentum)

    def rank_step(rank):
        layer = copy.deepcopy(original)
        use_cpu_sync_batch_norm(layer)
        x = inputs()[rank].requires_grad_()
        for _ in range(2):
            y = layer(x)
        loss(y).backward()
        gradients = (x.grad, layer.weight.grad, layer.bias.grad)
        return y.detach(), gradients, layer.state_dict(), layer.eval()(x).detach()

    ranks = run_ranks(rank_step, 2)

    reference = nn.BatchNorm1d(5, momentum=momentum).double()
    reference.load_state_dict(original.state_dict())
    xs = [x.requires_grad_() for x in inputs()]
    values = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, 5) for x in xs])
    for _ in range(2):
        y = reference(values)
    loss(y).backward()
    evaluated = reference.eval()(values)
    counts = [x.numel() // 5 for x in xs]
    for x, (y_rank, (x_grad, _, _), state, eval_rank), expected, expected_eval in zip(
        xs, ranks, y.split(counts), evaluated.split(counts)
    ):
        torch.testing.assert_close(y_rank.permute(0, 2, 3, 1).reshape(-1, 5), expected.detach())
        torch.testing.assert_close(eval_rank.permute(0, 2, 3, 1).reshape(-1, 5), expected_eval.detach())
        torch.testing.assert_close(x_grad, x.grad)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(state[name], value, msg=name)
    # Parameters get their gradients of each rank's values; DistributedDataParallel adds them up.
    for i, parameter in ((1, reference.weight), (2, reference.bias)):
        torch.testing.assert_close(ranks[0][1][i] + ranks[1][1][i], parameter.grad)


def test_the_layer_itself_stays(run_ranks):
    layer, plain = sync_batch_norm(), nn.BatchNorm2d(3)
    model = nn.Sequential(layer, plain)
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(1))
    parameters, keys = list(model.parameters()), list(model.state_dict())
    use_cpu_sync_batch_norm(model)
    assert type(model[0]) is CPUSyncBatchNorm and type(model[1]) is nn.BatchNorm2d
    assert all(a is b for a, b in zip(parameters, model.parameters())) and list(model.state_dict()) == keys

    def rank_forward(rank):
        layer(inputs()[0])
        return seen

    assert run_ranks(rank_forward, 1) == [[1]]


def test_half_precision_is_normalised_in_float32(run_ranks):
    layer = sync_batch_norm().bfloat16().float()
    use_cpu_sync_batch_norm(layer)

    def rank_forward(rank):
        return layer(inputs()[rank].bfloat16())

    first, second = run_ranks(rank_forward, 2)
    assert first.dtype == torch.bfloat16
    xs = [x.bfloat16().float().permute(0, 2, 3, 1).reshape(-1, 5) for x in inputs()]
    values = torch.cat(xs)
    expected = nn.functional.batch_norm(values, None, None, layer.weight, layer.bias, training=True)
    got = torch.cat([y.float().permute(0, 2, 3, 1).reshape(-1, 5) for y in (first, second)])
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)


def test_one_value_is_not_enough(run_ranks):
    layer = sync_batch_norm()
    use_cpu_sync_batch_norm(layer)

    def rank_forward(rank):
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(torch.zeros(1 - rank, 5, 1, 1, dtype=torch.float64))
        return True

    assert run_ranks(rank_forward, 2) == [True, True]

"""The masked layer, the diversity loss and the adaptive coefficient against plain loops in float64."""

from collections import deque

import pytest
import torch

import kalei_matd3_mamujoco as script
from benchmark import plain_loops
from experiment.mask_pictures import mask_difference


def network(dtype=torch.float64, masks=5, layer_norm=True, bias=1.0, sharing="kaleidoscope"):
    torch.manual_seed(0)
    return script.MaskedMLP(masks, (6, 16, 2), sharing, (4.0, bias), layer_norm).to(dtype)


def test_weights_start_as_linear_and_thresholds_in_their_range():
    torch.manual_seed(0)
    layer = script.MaskedLinear(3, 64, 100, "kaleidoscope", threshold_scale=5.0, threshold_bias=2.0)
    bound = 64**-0.5
    for tensor in (layer.weight, layer.bias):
        assert -bound <= tensor.min() < -0.9 * bound and 0.9 * bound < tensor.max() <= bound
    assert -7.0 <= layer.thresholds.min() < -6.9 and -2.1 < layer.thresholds.max() <= -2.0


def test_effective_weight_is_the_soft_threshold_of_the_paper():
    layer = network().layers[1]
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
    effective, _ = layer.effective()
    for k, row, column in [(0, 0, 0), (0, 3, 5), (2, 7, 1), (4, 15, 15), (1, 2, 3)]:
        weight, threshold = layer.weight[row, column].item(), layer.thresholds[k, row, column].item()
        size = max(abs(weight) - 1 / (1 + torch.e**-threshold), 0.0)
        assert effective[k, row, column].item() == pytest.approx(size if weight > 0 else -size, abs=1e-12)
    assert torch.equal(effective != 0, layer.masks())
    assert 0.05 < layer.masks().double().mean() < 0.95, "masks that keep all or nothing would test nothing"


@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_all_masks_at_once_equal_one_after_the_other(layer_norm, sharing):
    net = network(layer_norm=layer_norm, sharing=sharing)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    together = net(x, net.effective_layers())
    apart = torch.stack([plain_loops.forward(net, x, k) for k in range(5)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(together)
    inputs = [x, *net.parameters()]
    fast = torch.autograd.grad((together * pull).sum(), inputs)
    plain = torch.autograd.grad((apart * pull).sum(), inputs)
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masks", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 1e4])  # 1e4: gradients at which tanh is far from the identity
def test_diversity_equals_the_tensor_of_all_pairs(masks, weighted, scale):
    net = network(masks=masks)
    values, gradients = [], []
    for loss in (script.diversity_loss, plain_loops.diversity_loss):
        value = loss(net, (1.0, 2.0, 4.0), weighted)
        net.zero_grad()
        (scale * value).backward()
        values.append(value.detach())
        gradients.append([layer.thresholds.grad for layer in net.layers])
        assert all(layer.weight.grad is None for layer in net.layers)
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    assert masks == 1 or values[0] < 0
    for fast, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-15)


def test_diversity_gradient_is_not_autograds_of_the_closed_form():
    """A guard of the test above: the straightforward O(n) code has the right value and another gradient."""
    net = network()
    layer = net.layers[1]
    thresholds = layer.thresholds.detach().requires_grad_()
    masks = plain_loops.Step.apply(layer.weight.detach().abs() - torch.sigmoid(thresholds))
    count = masks.sum(0)
    closed_form = (2 * count * (len(masks) - count) * layer.weight.detach().abs()).sum()
    ours = script.PairwiseMaskDifference.apply(layer.thresholds, layer.weight.detach(), True)
    torch.testing.assert_close(closed_form, ours)
    autograd = torch.autograd.grad(closed_form, thresholds)[0]
    assert not torch.allclose(autograd, torch.autograd.grad(ours, layer.thresholds)[0])


def test_mask_difference_is_the_mean_over_pairs():
    net = network()
    different = total = 0
    for layer in net.layers:
        masks = layer.masks()
        for i in range(5):
            for j in range(5):
                if i != j:
                    different += int((masks[i] != masks[j]).sum())
                    total += masks[i].numel()
    assert mask_difference(net).item() == pytest.approx(different / total)


def test_adaptive_coefficient_averages_the_latest_losses():
    torch.manual_seed(0)
    coefficient = script.AdaptiveCoefficient(0.1, 4, torch.device("cpu"))
    coefficient.losses = coefficient.losses.double()
    histories = deque(maxlen=4), deque(maxlen=4)
    for step in range(11):
        rl_loss, diversity = torch.randn((), dtype=torch.float64), -torch.rand((), dtype=torch.float64)
        histories[0].append(rl_loss.item())
        histories[1].append(diversity.item())
        expected = plain_loops.coefficient(0.1, *histories)
        assert coefficient(rl_loss, diversity).item() == pytest.approx(expected, rel=1e-9), f"step {step}"


def test_adaptive_coefficient_is_beta_where_there_is_no_diversity():
    coefficient = script.AdaptiveCoefficient(0.3, 4, torch.device("cpu"))
    assert coefficient(torch.tensor(5.0), torch.tensor(0.0)).item() == pytest.approx(0.3)

"The network: sizes for any plan, weights counted by hand, thick axes left alone at the top."
import pytest, torch
from torch import nn
from hypothesis import given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.planning.planner import make_plan
from autounet_nb.planning.rules import sketch_fingerprint
from autounet_nb.training.unet import UNet, build_unet

@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 200), st.integers(8, 400), st.integers(8, 400)), st.floats(.5, 6), st.integers(1, 3), st.integers(1, 4))
def test_every_planned_network_keeps_the_size_and_learns(shape, thickness, channels, classes):
    "On the meta device: shapes are followed through forward and backward without computing"
    plan = make_plan(sketch_fingerprint(shape, (thickness, 1, 1), modalities=['MRI'] * channels, classes=classes), 'gpu-12gb')
    for c in plan.models.values():
        with torch.device('meta'):
            net = build_unet(c)
            y = net(torch.zeros(c.batch_size, c.in_channels, *c.patch_size))
            y.sum().backward()
        assert y.shape == (c.batch_size, c.classes, *c.patch_size)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())

def test_weights_counted_by_hand():
    net = UNet(3, 1, 2, (4, 8), ((3, 3, 3),) * 2, ((1, 1, 1), (2, 2, 2)))
    block = lambda i, o: 27 * i * o + 2 * o + 27 * o * o + 2 * o # two convolutions without bias, two affine norms
    assert sum(p.numel() for p in net.parameters()) == block(1, 4) + block(4, 8) + 8 * 8 * 4 + block(8, 4) + 4 * 2 + 2

def test_an_axis_with_kernel_1_is_not_looked_across():
    "What happens in one slice of a level with kernels 1×3×3 changes no other slice, but for the norms, which see all of it"
    net = UNet(3, 1, 2, (4, 8), ((1, 3, 3),) * 2, ((1, 1, 1), (1, 2, 2))).double()
    for m in net.modules():
        if isinstance(m, torch.nn.InstanceNorm3d): m.forward = lambda x: x
    x = torch.randn(1, 1, 6, 8, 8, dtype=torch.double); changed = x.clone(); changed[:, :, 2] += 1
    d = (net(x) - net(changed)).abs().amax((0, 1, 3, 4))
    assert d[2] > 0 and d[[0, 1, 3, 4, 5]].max() == 0

def test_the_networks_parts_are_the_papers():
    net = build_unet(make_plan(sketch_fingerprint((36, 50, 35), n=260, classes=2), 'gpu-12gb').models['3d'])
    count = lambda kind: sum(isinstance(m, kind) for m in net.modules())
    assert count(nn.Conv3d) == 2 * (4 + 3) + 1 and count(nn.InstanceNorm3d) == 14 and count(nn.ConvTranspose3d) == 3
    assert net.encoder[0].conv1.out_channels == 30 and net.encoder[-1].conv2.out_channels == 240
    x = torch.randn(1, 1, 40, 56, 40)
    half = net.encoder[0](x)
    assert (half < 0).any(), 'leaky, not plain, ReLU'

def test_level_sizes_are_told_for_drawing():
    rows = build_unet(make_plan(sketch_fingerprint((20, 320, 319), (3.6, .625, .625)), 'gpu-12gb').models['3d']).structure((20, 320, 320))
    assert [r['size'] for r in rows[:4]] == [[20, 320, 320], [20, 160, 160], [20, 80, 80], [10, 40, 40]]
    assert rows[0]['kernel'] == [1, 3, 3] and sum(r['parameters'] for r in rows) > 10**6

def test_deep_supervision_and_strided_pooling_are_options():
    args = (2, 1, 3, (4, 8, 16), ((3, 3),) * 3, ((1, 1), (2, 2), (2, 2)))
    net, x = UNet(*args, deep_supervision=True, pool='conv', residual=True), torch.randn(2, 1, 16, 16)
    assert [tuple(y.shape) for y in net.train()(x)] == [(2, 3, 16, 16), (2, 3, 8, 8)]
    assert net.eval()(x).shape == (2, 3, 16, 16)

def test_what_does_not_fit_is_said():
    net = UNet(2, 1, 2, (4, 8), ((3, 3),) * 2, ((1, 1), (2, 2)))
    for x, words in ((torch.zeros(1, 1, 7, 8), 'multiple of 2×2'), (torch.zeros(1, 2, 8, 8), '1 channels, not 2'), (torch.zeros(1, 1, 8), 'axes')):
        with pytest.raises(InputError, match=words): net(x)
    with pytest.raises(InputError, match='top level'): UNet(2, 1, 2, (4,), ((3, 3),), ((2, 2),))

@pytest.mark.parametrize('size,layout', [((2, 5, 6, 7), torch.channels_last), ((2, 5, 4, 6, 7), torch.channels_last_3d)])
def test_the_quick_instance_norm_is_torchs(size, layout):
    "Forward and gradients of the path for channels that lie side by side, against the plain one"
    from autounet_nb.training.unet import _InstanceNorm
    norm = _InstanceNorm(5).double()
    torch.nn.init.normal_(norm.weight); torch.nn.init.normal_(norm.bias)
    results = []
    for x in (torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(0)).mul(3).add(2) for _ in range(2)):
        x = (x.contiguous(memory_format=layout) if not results else x).requires_grad_()
        y = norm(x) if not results else torch.nn.functional.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)
        norm.zero_grad(); (y * torch.arange(y.numel(), dtype=torch.double).view(size).sin()).sum().backward()
        results.append([y.detach(), x.grad, norm.weight.grad.clone(), norm.bias.grad.clone()])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*results))

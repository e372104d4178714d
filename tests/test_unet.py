"The network: shapes for many configurations, weights counted by hand, what sees what, precision and devices"
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from autounet_nb.data import DataError
from autounet_nb.plan import make_plan, pooling, sketch_fingerprint
from autounet_nb.unet import ConvBlock, UNet, build_unet, describe


@st.composite
def configs(draw):
    "A network as a plan could have it, and a patch that fits"
    dim = draw(st.sampled_from([2, 3]))
    levels, halved = draw(st.integers(1, 4)), [1] * dim
    strides, kernels, kernel = [(1,) * dim], [], [draw(st.sampled_from([1, 3])) for _ in range(dim)]
    kernels.append(tuple(kernel))
    for _ in range(levels - 1):
        stride = draw(st.lists(st.sampled_from([1, 2]), min_size=dim, max_size=dim).filter(lambda s: 2 in s))
        kernel = [3 if k == 3 or s == 2 else draw(st.sampled_from([1, 3])) for k, s in zip(kernel, stride)]
        strides.append(tuple(stride)); kernels.append(tuple(kernel))
        halved = [h * s for h, s in zip(halved, stride)]
    features = [draw(st.integers(1, 4)) for _ in range(levels)]
    patch = [h * draw(st.integers(2, 3)) for h in halved]
    return dict(dim=dim, in_channels=draw(st.integers(1, 3)), classes=draw(st.integers(2, 4)), features=features, kernels=kernels, strides=strides), patch


def by_hand(c, pool='max'):
    "Number of weights, counted from the configuration alone"
    f, n = c['features'], 0
    block = lambda i, o, k: (i * o + o * o) * math.prod(k) + 4 * o
    for l, (i, o) in enumerate(zip([c['in_channels'], *f], f)): n += block(i, o, c['kernels'][l])
    for l in range(len(f) - 1): n += f[l + 1] * f[l] * math.prod(c['strides'][l + 1]) + block(2 * f[l], f[l], c['kernels'][l])
    return n + f[0] * c['classes'] + c['classes']


@settings(max_examples=40, deadline=None)
@given(configs(), st.sampled_from(['max', 'conv']), st.integers(1, 2))
def test_shapes_and_weights(config, pool, batch):
    c, patch = config
    net = UNet(**c, pool=pool)
    x = torch.randn(batch, c['in_channels'], *patch)
    out = net(x)
    assert out.shape == (batch, c['classes'], *patch) and out.isfinite().all()
    assert sum(p.numel() for p in net.parameters()) == by_hand(c)
    assert sum(r['parameters'] for r in net.structure()) == by_hand(c)
    assert net.structure(patch)[-1]['size'] == [n // math.prod(s) for n, s in zip(patch, zip(*c['strides']))]


@settings(max_examples=15, deadline=None)
@given(configs(), st.booleans())
def test_every_weight_learns(config, residual):
    c, patch = config
    net = UNet(**c, residual=residual, deep_supervision=True).train()
    torch.manual_seed(0)
    outs = net(torch.randn(2, c['in_channels'], *patch))
    sizes = [list(patch)]
    for s in c['strides'][1:-1]: sizes.append([n // k for n, k in zip(sizes[-1], s)])
    assert [list(o.shape[2:]) for o in outs] == sizes
    sum(o.square().sum() for o in outs).backward()
    for name, p in net.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), name
    assert torch.is_tensor(net.eval()(torch.randn(1, c['in_channels'], *patch)))


def test_paper_hippocampus():
    c = make_plan(sketch_fingerprint((36, 50, 35), n=260, classes=2), 'gpu-12gb').models['3d']
    with torch.device('meta'):
        net = build_unet(c)
        assert net(torch.empty(c.batch, 1, *c.patch)).shape == (9, 3, 40, 56, 40)
    assert [r['features'] for r in net.structure()] == [30, 60, 120, 240]
    assert [r['size'] for r in net.structure(c.patch)] == [[40, 56, 40], [20, 28, 20], [10, 14, 10], [5, 7, 5]]
    assert sum(p.numel() for p in net.parameters()) == by_hand(vars(c)) == 4_922_943
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv3d)]
    assert len(convs) == 2 * 4 + 2 * 3 + 1 and sum(isinstance(m, torch.nn.ConvTranspose3d) for m in net.modules()) == 3


def test_state_dict_names():
    net = UNet(2, 1, 2, (2, 4), [(3, 3)] * 2, [(1, 1), (2, 2)])
    assert {k.split('.')[0] for k in net.state_dict()} == {'encoder', 'up', 'decoder', 'head'}
    assert 'encoder.1.conv2.weight' in net.state_dict() and 'decoder.0.norm1.bias' in net.state_dict()
    other = UNet(2, 1, 2, (2, 4), [(3, 3)] * 2, [(1, 1), (2, 2)])
    other.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(net(x), other(x))


def no_norm(net):
    for m in net.modules():
        if isinstance(m, ConvBlock): m.norm1 = m.norm2 = torch.nn.Identity()
    return net


@pytest.mark.parametrize('flat', [True, False])
def test_flat_levels_keep_slices_apart(flat):
    k = (1, 3, 3) if flat else (3, 3, 3)
    net = no_norm(UNet(3, 1, 2, (3, 4, 4), [k] * 3, [(1, 1, 1), (1, 2, 2), (1, 2, 2)]))
    torch.manual_seed(0)
    x = torch.randn(1, 1, 5, 16, 16)
    changed = x.clone(); changed[:, :, 2] += 1
    touched = ((net(x) - net(changed)).abs().amax((0, 1, 3, 4)) > 1e-6).tolist()
    assert touched == ([False, False, True, False, False] if flat else [True] * 5)


def test_thick_slices_from_the_plan():
    c = make_plan(sketch_fingerprint((20, 320, 319), (3.6, .625, .625), n=32), 'gpu-12gb').models['3d']
    with torch.device('meta'): rows = build_unet(c).structure(c.patch)
    assert [r['kernel'] for r in rows[:3]] == [[1, 3, 3], [1, 3, 3], [3, 3, 3]] and rows[1]['sees'][0] == 1 < rows[2]['sees'][0]
    assert pooling((20, 320, 319), (3.6, .625, .625)).kernels == c.kernels


@pytest.mark.parametrize('dim', [2, 3])
def test_norm_equals_torch(dim):
    "In channels-last memory the norm is our own: it must give what PyTorch's gives, and its slopes"
    torch.manual_seed(0)
    last = torch.channels_last if dim == 2 else torch.channels_last_3d
    block = ConvBlock(dim, 2, 6, (3,) * dim).to(memory_format=last)
    with torch.no_grad(): block.norm1.weight.uniform_(.5, 2); block.norm1.bias.uniform_(-1, 1)
    x = (5 + 3 * torch.randn(3, 6, *(7, 8, 9)[:dim])).contiguous(memory_format=last)
    g, results = torch.randn_like(x), []
    for f in (block.norm1, lambda v: F.instance_norm(v, weight=block.norm1.weight, bias=block.norm1.bias)):
        v = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = f(v)
        results.append((y.detach(), *torch.autograd.grad(y, (v, block.norm1.weight, block.norm1.bias), g)))
    assert results[0][0].is_contiguous(memory_format=last) and not F.instance_norm(x).is_contiguous(memory_format=last)
    for ours, theirs in zip(*results): torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_norm_of_nothing_to_norm():
    "A constant map, and one far from zero, stay finite"
    norm = ConvBlock(2, 1, 2, (3, 3)).norm1
    x = torch.full((1, 2, 4, 4), 7.); x[:, 1] = 1e4 + torch.randn(4, 4)
    y = norm(x.contiguous(memory_format=torch.channels_last).requires_grad_())
    y.sum().backward()
    assert torch.equal(y[:, 0].detach(), torch.zeros(1, 4, 4)) and abs(y[:, 1].std(correction=0).item() - 1) < .01


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('last', [True, False])
def test_half_precision(dtype, last):
    torch.manual_seed(0)
    net = UNet(3, 1, 2, (4, 8), [(3, 3, 3)] * 2, [(1, 1, 1), (2, 2, 2)])
    x = torch.randn(2, 1, 16, 16, 16)
    if last: net, x = net.to(memory_format=torch.channels_last_3d), x.contiguous(memory_format=torch.channels_last_3d)
    exact = net(x)
    with torch.autocast('cpu', dtype): out = net(x)
    out.float().sum().backward()
    assert out.dtype == dtype and (out.float() - exact).abs().mean() < .05
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters())


def test_learns_a_square():
    "Sixty steps on two images: the network can fit"
    torch.manual_seed(0)
    y = torch.zeros(2, 16, 16, dtype=torch.long); y[0, 3:9, 4:12] = 1; y[1, 8:14, 2:7] = 1
    x = y[:, None] + .3 * torch.randn(2, 1, 16, 16)
    net = UNet(2, 1, 2, (4, 8), [(3, 3)] * 2, [(1, 1), (2, 2)])
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60): loss = F.cross_entropy(net(x), y); loss.backward(); opt.step(); opt.zero_grad()
    assert loss < .05 and (net(x).argmax(1) == y).float().mean() > .98


def test_first_weights():
    "He et al. for leaky ReLUs: standard deviation sqrt(2 / (1 + slope²) / fan-in)"
    torch.manual_seed(0)
    w = UNet(3, 1, 2, (32, 64), [(3, 3, 3)] * 2, [(1, 1, 1), (2, 2, 2)]).encoder[1].conv2.weight
    assert abs(w.std().item() / math.sqrt(2 / (1 + 1e-4) / (64 * 27)) - 1) < .02


def test_bad_input():
    net = UNet(3, 2, 2, (2, 4), [(3, 3, 3)] * 2, [(1, 1, 1), (1, 2, 2)])
    assert net(torch.zeros(1, 2, 5, 8, 8)).shape == (1, 2, 5, 8, 8)
    with pytest.raises(DataError, match='5×8×9 must be a multiple of 1×2×2'): net(torch.zeros(1, 2, 5, 8, 9))
    with pytest.raises(DataError, match='2 channels, not 1'): net(torch.zeros(1, 1, 4, 8, 8))
    with pytest.raises(DataError, match='3D network'): net(torch.zeros(2, 2, 8, 8))
    with pytest.raises(DataError, match='dim 2 or 3'): UNet(4, 1, 2, (2,), [(3,) * 4], [(1,) * 4])


def test_describe_says_it():
    text = describe(UNet(2, 1, 2, (4, 8), [(3, 3)] * 2, [(1, 1), (2, 2)]), (16, 20))
    assert '8×10' in text and '1,678 weights' in text and '14×14' in text

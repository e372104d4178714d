"Augmentation: one draw, one interpolation; directions, borders, flat patches, determinism"
from dataclasses import replace
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.linalg import expm
from scipy.ndimage import map_coordinates
from fastai.callback.progress import no_bar # gives Learner its no_bar # noqa: F401
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from autounet_nb.augment import Augment, Drawn, augment, augment_2d, augment_3d, draw, flat_axis, gamma, mirror, spatial, step_generator
from autounet_nb.augment import _bspline, _grid, _points
from autounet_nb.data import DataError

gen = lambda seed=0: torch.Generator().manual_seed(seed)
off = dict(p_rotation=0., p_scaling=0., p_elastic=0., p_gamma=0., p_mirror=0.)


def drawn(patch, angle=None, size=1., sd=0., b=1, c=1):
    "What is done to each sample, written by hand"
    plane = [n for i, n in enumerate(patch) if i != flat_axis(patch)]
    bumps = sd * torch.randn(b, *(_points(n, 16) for n in plane), len(plane), generator=gen())
    angle = torch.tensor([angle or [0.] * (3 if len(plane) == 3 else 1)] * b)
    return Drawn(angle, torch.full((b,), float(size)), bumps, torch.ones(b, c), torch.zeros(b, len(patch), dtype=torch.bool))


def batch(patch, b=2, c=1, seed=0):
    x = torch.randn(b, c, *patch, generator=gen(seed))
    return x, torch.randint(0, 4, (b, *patch), generator=gen(seed + 1))


patches = st.one_of(st.tuples(*[st.integers(4, 24)] * 2), st.tuples(*[st.integers(3, 14)] * 3))


@settings(max_examples=40, deadline=None)
@given(patches, st.integers(1, 3), st.integers(1, 2), st.integers(0, 10**6))
def test_any_batch(patch, b, c, seed):
    "Shapes, types and classes stay; the input is left alone; the same draws give the same result"
    x, y = batch(patch, b, c, seed)
    before = x.clone(), y.clone()
    params = replace(augment_2d if len(patch) == 2 else augment_3d, p_rotation=.7, p_scaling=.7, p_elastic=.7, p_gamma=.7)
    (x1, y1), (x2, y2) = augment(x, y, gen(seed), params), augment(x, y, gen(seed), params)
    assert x1.shape == x.shape and y1.shape == y.shape and x1.dtype == x.dtype and y1.dtype == y.dtype
    assert x1.isfinite().all() and set(y1.unique().tolist()) <= set(y.unique().tolist())
    assert torch.equal(x1, x2) and torch.equal(y1, y2)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert augment(x, y, gen(seed), replace(params, **off))[0] is x


def test_another_seed_differs():
    x, y = batch((12, 12, 12))
    assert not torch.equal(augment(x, y, gen(1))[0], augment(x, y, gen(2))[0])


@pytest.mark.parametrize('patch', [(18, 26), (14, 18, 12)])
def test_against_scipy(patch):
    "The one interpolation, done again with map_coordinates: matrix, bumps, borders and both orders"
    x, y = batch(patch, b=1)
    d = drawn(patch, [.4, -.3, .2] if len(patch) == 3 else [.5], 1.25, sd=2.)
    # in scipy's terms: places in voxels, the bumps blown up axis by axis, the rotation as a matrix exponential
    move = d.bumps[0].numpy().astype(float)
    for a, n in enumerate(patch): move = np.moveaxis(np.tensordot(_bspline(n, move.shape[a]).numpy(), move, (1, a)), 0, a)
    if len(patch) == 2: R = np.array([[math.cos(.5), -math.sin(.5)], [math.sin(.5), math.cos(.5)]])
    else: R = expm([[0, -.2, -.3], [.2, 0, -.4], [.3, .4, 0]]) # of the vector (.4, -.3, .2)
    p = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in patch], indexing='ij'), -1)
    place = p @ R / 1.25 + move + (np.array(patch) - 1) / 2
    xs, ys = spatial(x, y, d)
    linear = map_coordinates(x[0, 0].numpy().astype(float), np.moveaxis(place, -1, 0), order=1, mode='nearest')
    nearest = np.stack([np.clip(np.rint(place[..., a]), 0, n - 1).astype(int) for a, n in enumerate(patch)])
    assert np.abs(xs[0, 0].numpy() - linear).max() < 1e-4
    assert (ys[0].numpy() == y[0].numpy()[tuple(nearest)]).mean() > .999


@pytest.mark.parametrize('axis', [0, 1, 2])
def test_quarter_turns(axis):
    "A positive angle about an axis turns the next axis towards the one after"
    angle = [0.] * 3; angle[axis] = math.pi / 2
    x, y = batch((11, 11, 11), c=2)
    xs, ys = spatial(x, y, drawn((11, 11, 11), angle, b=2, c=2))
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    torch.testing.assert_close(xs, x.rot90(1, (i + 2, j + 2)), atol=1e-4, rtol=0)
    assert torch.equal(ys, y.rot90(1, (i + 1, j + 1)))


def test_size_means_larger():
    y = torch.zeros(1, 32, 32, 32, dtype=torch.long); y[:, 12:20, 12:20, 12:20] = 1
    assert [spatial(y[:, None].float(), y, drawn((32,) * 3, size=s))[1].sum().item() for s in (2., .5)] == [16**3, 4**3]


@pytest.mark.parametrize('patch', [(40, 48), (24, 32, 28), (8, 40, 40)])
def test_image_and_mask_stay_together(patch):
    "An image that is its mask is still its mask, up to the border, whatever is done to it"
    g = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in patch], indexing='ij'))
    y = torch.from_numpy(((g - .2)**2).sum(0) < .45).long().repeat(12, *[1] * len(patch))
    params = replace(augment_3d if len(patch) == 3 and flat_axis(patch) is None else augment_2d, p_rotation=1., p_scaling=1., p_elastic=1., p_gamma=0.)
    xs, ys = augment(y[:, None].float(), y, gen(3), params)
    found = xs[:, 0] > .5
    assert not torch.equal(ys, y)
    assert 2 * (found & (ys == 1)).sum() / (found.sum() + ys.sum()) > .975


def test_borders_repeat():
    x = torch.ones(1, 1, 20, 20); y = torch.full((1, 20, 20), 3)
    xs, ys = spatial(x, y, drawn((20, 20), [.6], .7))
    assert (ys == 3).all() and (xs - 1).abs().max() < 1e-5


@pytest.mark.parametrize('patch,axis', [((5, 24, 24), 0), ((24, 5, 24), 1), ((24, 24, 5), 2)])
def test_flat_patches_stay_in_their_plane(patch, axis):
    "Slices move alike, none is mixed with another; mirroring goes along every axis"
    assert flat_axis(patch) == axis
    x, y = batch(patch, b=3, c=2)
    params = replace(augment_2d, **(off | dict(p_rotation=1., p_scaling=1., p_elastic=1.)))
    xs, ys = augment(x, y, gen(1), params)
    d = draw(params, x.shape, gen(1))
    assert d.angle.shape == (3, 1) and d.bumps.shape[-1] == 2 and d.flip.shape == (3, 3)
    for k in range(5):
        alone = spatial(x.select(2 + axis, k), y.select(1 + axis, k), d._replace(flip=d.flip[:, :2]))
        torch.testing.assert_close(xs.select(2 + axis, k), alone[0]); assert torch.equal(ys.select(1 + axis, k), alone[1])
    flipped = augment(x, y, gen(1), replace(augment_2d, **(off | dict(p_mirror=1.))))
    assert torch.equal(flipped[0], x.flip((2, 3, 4))) and torch.equal(flipped[1], y.flip((1, 2, 3)))


def test_which_set():
    assert [flat_axis(p) for p in ((20, 40, 40), (20, 41, 40), (40, 40), (80, 10), (1, 5, 5))] == [None, 0, None, None, 0]
    x, y = batch((6, 20, 20), b=40)
    assert torch.equal(augment(x, y, gen(4))[0], augment(x, y, gen(4), augment_2d)[0]) # flat: the 2D set
    x, y = batch((12, 12, 12), b=40)
    assert torch.equal(augment(x, y, gen(4))[0], augment(x, y, gen(4), augment_3d)[0])
    x, y = batch((12, 12), b=40)
    assert torch.equal(augment(x, y, gen(4))[0], augment(x, y, gen(4), augment_2d)[0])


def test_ranges_and_frequencies():
    d = draw(augment_3d, (20_000, 1, 8, 8, 8), gen())
    turned, resized, bent = (d.angle != 0).any(1), d.size != 1, (d.bumps != 0).flatten(1).any(1)
    for happened, p in ((turned, .2), (resized, .2), (bent, .2), (d.gamma != 1, .3), (d.flip, .5)): assert abs(happened.float().mean() - p) < .012
    assert abs((turned & resized).float().mean() - .04) < .006 # one doesn't depend on the other
    assert math.radians(29.9) < d.angle.abs().max() <= math.radians(30)
    for v, (low, high) in ((d.size, (.7, 1.4)), (d.gamma, (.7, 1.5))):
        assert low <= v.min() < low + .01 and high - .01 < v.max() <= high and abs((v < 1).sum() / (v != 1).sum() - .5) < .03


def test_elastic_strength():
    d = draw(replace(augment_3d, **(off | dict(p_elastic=1., elastic=4.))), (400, 1, 32, 32, 32), gen())
    still = _grid(drawn((32,) * 3), [32] * 3, 'cpu')
    moves = (_grid(d, [32] * 3, 'cpu') - still) * 16
    assert abs(moves.square().mean().sqrt().item() / (4 / math.sqrt(3)) - 1) < .1 # sd uniform in 0 … 4


@settings(max_examples=30, deadline=None)
@given(st.floats(.7, 1.5), st.floats(1e-2, 1e3), st.floats(-1e3, 1e3), st.integers(0, 1000))
def test_gamma(power, scale, shift, seed):
    x = scale * torch.randn(1, 2, 9, 9, generator=gen(seed)) + shift
    d = drawn((9, 9), c=2)._replace(gamma=torch.tensor([[power, 1.]]))
    out = gamma(x, d)
    tol = 1e-3 * scale + 1e-5 * abs(shift)
    assert abs(out[0, 0].mean() - x[0, 0].mean()) < tol and abs(out[0, 0].std() - x[0, 0].std()) < tol
    assert torch.equal(out[0, 1], x[0, 1])
    v = x[0, 0].double(); w = ((v - v.min()) / (v.max() - v.min()))**power # by the book
    w = (w - w.mean()) / w.std() * v.std() + v.mean()
    assert (out[0, 0] - w).abs().max() < 10 * tol


def test_gamma_of_a_constant():
    x = torch.full((1, 1, 5, 5), -2.)
    assert torch.equal(gamma(x, drawn((5, 5))._replace(gamma=torch.tensor([[.7]]))), x)


def test_gamma_leaves_masks_alone():
    "One-hot channels, as in the second stage of a cascade, only have 0 and 1"
    x = (torch.rand(1, 1, 8, 8, generator=gen()) > .5).float()
    torch.testing.assert_close(gamma(x, drawn((8, 8))._replace(gamma=torch.tensor([[1.4]]))), x, atol=1e-5, rtol=0)


def test_mirror_each_sample_by_itself():
    x, y = batch((4, 5, 6), b=8)
    flips = torch.tensor([[bool(i & 1), bool(i & 2), bool(i & 4)] for i in range(8)])
    xs, ys = mirror(x, y, drawn((4, 5, 6), b=8)._replace(flip=flips))
    for i in range(8):
        axes = [a for a in range(3) if flips[i, a]]
        assert torch.equal(xs[i], x[i].flip([a + 1 for a in axes])) and torch.equal(ys[i], y[i].flip(axes))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_moves_nothing(dtype):
    x, y = batch((24, 28, 24))
    params = replace(augment_3d, p_rotation=1., p_elastic=1.)
    plain = augment(x, y, gen(), params)
    with torch.autocast('cpu', dtype): mixed = augment(x, y, gen(), params)
    torch.testing.assert_close(mixed[0], plain[0]); assert torch.equal(mixed[1], plain[1])
    assert augment(x.to(dtype), y, gen(), params)[0].dtype == dtype


def test_layout_is_kept():
    x, y = batch((12, 14, 12), c=2)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    params = replace(augment_3d, p_rotation=1., p_gamma=1.)
    out = augment(last, y, gen(), params)[0]
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(out, augment(x, y, gen(), params)[0])


def test_bad_input():
    with pytest.raises(DataError, match='need classes of shape'): augment(*[batch((8, 8))[0]] * 2)
    with pytest.raises(DataError, match='dim is 2 or 3'): Augment(4)


class Items:
    def __len__(self): return 6
    def __getitem__(self, i): return torch.full((1, 12, 12), float(i)) + torch.arange(12.), torch.zeros(12, 12, dtype=torch.long)


def seen_in_training(step=0, seed=0, epochs=1):
    "What a network is given in training and in validation"
    seen = {True: [], False: []}
    dls = DataLoaders(*(DataLoader(Items(), bs=2) for _ in range(2)))
    net = torch.nn.Conv2d(1, 2, 1)
    net.register_forward_pre_hook(lambda m, i: seen[m.training].append(i[0].clone()))
    learn = Learner(dls, net, loss_func=torch.nn.CrossEntropyLoss(), cbs=[aug := Augment(2, seed=seed)])
    aug.step = step
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    assert aug.step == step + 3 * epochs
    return torch.stack(seen[True]), torch.stack(seen[False])


def test_callback():
    train, valid = seen_in_training()
    plain = torch.stack([Items()[i][0] for i in range(6)]).view(3, 2, 1, 12, 12)
    assert torch.equal(valid, plain) and not torch.equal(train, plain)
    assert torch.equal(seen_in_training()[0], train) and not torch.equal(seen_in_training(seed=1)[0], train)
    both = seen_in_training(epochs=2)[0]
    assert torch.equal(both[:3], train) and torch.equal(both[3:], seen_in_training(step=3)[0]) and not torch.equal(both[3:], train)


def test_steps_are_independent():
    first = torch.stack([torch.rand(4, generator=step_generator(s, k)) for s in range(20) for k in range(50)])
    assert len(first[:, 0].unique()) == 1000
    assert torch.equal(torch.rand(4, generator=step_generator(3, 7)), first[3 * 50 + 7])

"Augmentation: parameters are sampled before they are applied, image and mask move together, by as much as was sampled."
from dataclasses import replace
import math
import pytest, torch
from autounet_nb.core.errors import InputError
from autounet_nb.training.augment import SampledParams, augment, augment_2d, augment_3d, sample_params, flat_axis, gamma, mirror, spatial, step_generator

def nothing(shape, params=augment_3d):
    "Parameters that change nothing"
    return sample_params(replace(params, p_rotation=0, p_scaling=0, p_elastic=0, p_gamma=0, p_mirror=0), shape, torch.Generator().manual_seed(0))

def ball(size=(32, 36, 40), center=(16., 18., 20.), radius=8.):
    "A ball as image (soft) and mask, batch of one"
    at = torch.stack(torch.meshgrid(*(torch.arange(n) + .5 for n in size), indexing='ij'))
    r = (at - torch.tensor(center)[:, None, None, None]).norm(dim=0)
    return torch.sigmoid(radius - r)[None, None], (r < radius).long()[None]

def center_of(mask): return (mask[0].nonzero().float() + .5).mean(0)

def test_nothing_drawn_nothing_changed():
    x, y = torch.randn(2, 1, 8, 9, 10), torch.randint(0, 3, (2, 8, 9, 10))
    d = nothing(x.shape)
    assert torch.equal(spatial(x, y, d)[0], x) and torch.equal(gamma(x, d), x) and torch.equal(mirror(x, y, d)[1], y)

def test_the_same_draw_gives_the_same_batch_and_leaves_the_input_alone():
    x, y = torch.randn(4, 2, 16, 20, 16), torch.randint(0, 3, (4, 16, 20, 16))
    before = x.clone()
    a, b, c = (augment(x, y, step_generator(0, s)) for s in (5, 5, 6))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0]) and torch.equal(x, before)

@pytest.mark.parametrize('scale', [.8, 1.33])
def test_scaling_makes_things_larger_by_the_factor(scale):
    x, y = ball()
    d = nothing(x.shape)._replace(size=torch.tensor([scale]))
    _, y2 = spatial(x, y, d)
    assert abs((y2.sum() / y.sum()).item() - scale**3) < .08 * scale**3

def test_rotation_turns_about_the_axis_by_the_angle():
    x, y = ball(center=(16., 18., 30.), radius=5.)
    d = nothing(x.shape)._replace(angle=torch.tensor([[math.radians(30), 0., 0.]])) # about z
    before, after = center_of(y) - torch.tensor([16., 18., 20.]), center_of(spatial(x, y, d)[1]) - torch.tensor([16., 18., 20.])
    assert abs(after[0]) < .3 and abs(after.norm() - before.norm()) < .3
    assert abs(abs(math.degrees(math.atan2(after[1], after[2]))) - 30) < 2

def test_image_and_mask_stay_together():
    "A mask made from the image after the move is the moved mask"
    x, y = ball()
    g = torch.Generator().manual_seed(1)
    always = replace(augment_3d, p_rotation=1, p_scaling=1, p_elastic=1)
    for _ in range(5):
        x2, y2 = spatial(x, y, sample_params(always, x.shape, g))
        a, b = x2[0, 0] > .5, y2[0] > 0
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > .93 and not torch.equal(y2, y)
        assert set(y2.unique().tolist()) <= {0, 1}

def test_flat_patches_are_bent_in_their_plane_only():
    assert flat_axis((20, 64, 64)) == 0 and flat_axis((64, 20, 64)) == 1 and flat_axis((32, 64, 64)) is None and flat_axis((8, 64)) is None
    x, y = torch.randn(1, 1, 8, 40, 40), torch.zeros(1, 8, 40, 40, dtype=torch.long)
    y[:, 3, 10:30, 10:30] = 1
    always = replace(augment_2d, p_rotation=1, p_scaling=1, p_elastic=1, p_mirror=0)
    d = sample_params(always, x.shape, torch.Generator().manual_seed(0))
    _, y2 = spatial(x, y, d)
    assert d.angle.shape == (1, 1) and y2[:, 3].any() and not y2[:, [0, 1, 2, 4, 5, 6, 7]].any()

@pytest.mark.parametrize('patch', [(16, 20, 18), (24, 30), (5, 40, 36)])
@pytest.mark.parametrize('piece', [200, 2**17])
def test_each_sample_of_a_batch_moves_as_it_would_alone(patch, piece, monkeypatch):
    monkeypatch.setattr('autounet_nb.training.augment.VOXELS_AT_ONCE', piece) # a few slices at a time, or all of them
    x, y = torch.randn(4, 2, *patch), torch.randint(0, 3, (4, *patch))
    d = sample_params(replace(augment_3d, p_rotation=1, p_scaling=1, p_elastic=1), x.shape, torch.Generator().manual_seed(0))
    for v, still in zip(d, nothing(x.shape)): v[[0, 2]] = still[[0, 2]]
    x2, y2 = spatial(x, y, d)
    for i in range(4):
        x1, y1 = spatial(x[i:i + 1], y[i:i + 1], SampledParams(*(v[i:i + 1] for v in d)))
        assert torch.allclose(x2[i], x1[0], atol=1e-5) and torch.equal(y2[i], y1[0]) and torch.equal(x2[i], x[i]) == (i in (0, 2))

def test_gamma_keeps_mean_sd_and_order():
    x = torch.rand(2, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0)) * 5 - 1 # two values that round to one would have no order
    out = gamma(x, nothing(x.shape)._replace(gamma=torch.full((2, 1), 1.4)))
    for a, b in zip(x, out):
        assert torch.isclose(a.mean(), b.mean(), atol=1e-4) and torch.isclose(a.std(), b.std(), atol=1e-3) and not torch.allclose(a, b, atol=.05)
        assert torch.equal(a.flatten().argsort(), b.flatten().argsort())

def test_mirror_flips_the_drawn_axes_of_the_drawn_samples():
    x, y = torch.randn(2, 1, 4, 5, 6), torch.randint(0, 3, (2, 4, 5, 6))
    x2, y2 = mirror(x, y, nothing(x.shape)._replace(flip=torch.tensor([[True, False, True], [False] * 3])))
    assert torch.equal(x2[0], x[0].flip(1, 3)) and torch.equal(y2[0], y[0].flip(0, 2)) and torch.equal(x2[1], x[1])

def test_how_often_things_happen():
    d = sample_params(augment_3d, (4000, 1, 8, 8, 8), torch.Generator().manual_seed(0))
    assert abs((d.angle != 0).any(1).float().mean() - augment_3d.p_rotation) < .03
    assert abs((d.size != 1).float().mean() - augment_3d.p_scaling) < .03 and .7 <= d.size.min() and d.size.max() <= 1.4
    assert abs(d.flip.float().mean() - .5) < .02 and d.angle.abs().max() <= math.radians(augment_3d.rotation)

def test_a_mask_of_another_size_is_refused():
    with pytest.raises(InputError, match=r'batch: images of shape \(1, 1, 8, 8\) need classes of shape \(1, 8, 8\)'): augment(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 9, dtype=torch.long))

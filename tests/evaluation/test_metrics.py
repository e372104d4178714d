"The metrics against MONAI's, what must hold for any masks, and how long a large scan takes."
import time, warnings
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import binary_erosion, gaussian_filter
from autounet_nb.core.errors import InputError
from autounet_nb.evaluation import metrics
from autounet_nb.evaluation.metrics import METRICS, case_metrics, dice, hd95, jaccard, precision, sensitivity
from autounet_nb.evaluation.metrics import surface_dice, surface_distances, volume_difference

def blobs(rng, shape, smooth=2., part=.3):
    "A mask of some smooth pieces"
    v = gaussian_filter(rng.standard_normal(shape), smooth)
    return v > np.quantile(v, 1 - part)

def pair(seed, shape):
    "Two masks that are alike here and not there"
    rng = np.random.default_rng(seed)
    a, other = blobs(rng, shape, rng.uniform(1, 3), rng.uniform(.1, .5)), blobs(rng, shape, 1.)
    return a, np.where(np.arange(shape[-1]) < shape[-1]//2, a, other)

SHAPES = [((14, 23, 31), (2.5, .7, 1.1)), ((30, 20, 10), (1., 1., 1.)), ((9, 40, 40), (5., .5, .5)), ((37, 45), (.7, 1.3)), ((64, 64), (1., 1.))]

@pytest.mark.parametrize('shape,spacing', SHAPES)
@pytest.mark.parametrize('seed', range(4))
def test_same_as_monai(shape, spacing, seed):
    warnings.simplefilter('ignore')
    monai = pytest.importorskip('monai.metrics')
    a, b = pair(seed, shape)
    x, y = (torch.tensor(m, dtype=torch.float)[None, None] for m in (a, b))
    kw = dict(include_background=True)
    assert dice(a, b) == pytest.approx(monai.compute_dice(x, y, **kw).item(), abs=1e-6)
    assert jaccard(a, b) == pytest.approx(monai.compute_iou(x, y, **kw).item(), abs=1e-6)
    counts = monai.get_confusion_matrix(x, y, include_background=True)
    for f, name in ((sensitivity, 'sensitivity'), (precision, 'precision')):
        assert f(a, b) == pytest.approx(monai.compute_confusion_matrix_metric(name, counts).item(), abs=1e-6)
    assert hd95(a, b, spacing) == pytest.approx(monai.compute_hausdorff_distance(x, y, percentile=95, spacing=spacing, **kw).item(), abs=1e-4)
    for t in (0., spacing[0], spacing[-1], 1., 2.3, 2*spacing[0]):
        assert surface_dice(a, b, spacing, t) == pytest.approx(monai.compute_surface_dice(x, y, [t], spacing=spacing, **kw).item(), abs=1e-6)

@pytest.mark.parametrize('near,many', [(0, 0), (0, 10**9), (10**9, 0)])
@pytest.mark.parametrize('shape,spacing', SHAPES)
def test_the_way_it_is_counted_makes_no_difference(monkeypatch, shape, spacing, near, many):
    "A map for all, the tree for all, and every pair"
    monkeypatch.setattr(metrics, 'NEAR', near); monkeypatch.setattr(metrics, 'MANY', many)
    for a, b in (pair(9, shape), pair(9, shape)[::-1]):
        at, to = (np.argwhere(m & ~binary_erosion(m))*np.array(spacing) for m in (a, b))
        want = np.linalg.norm(at[:, None] - to[None], axis=-1)
        got = surface_distances(a, b, spacing)
        for d, w in zip(got, (want.min(1), want.min(0))): assert np.allclose(np.sort(d), np.sort(w), atol=1e-4)

def test_far_voxels_are_found(monkeypatch):
    "One stray voxel at each end of a long scan"
    for many in (0, 10**6):
        monkeypatch.setattr(metrics, 'MANY', many)
        a = np.zeros((100, 12, 12), bool); a[50:53, 4:7, 4:7] = True
        b = a.copy(); b[0, 0, 0] = b[-1, -1, -1] = True
        there, back = surface_distances(a, b, (3., 1., 1.))
        assert there.max() == 0 and np.allclose(np.sort(back)[-2:], sorted(np.linalg.norm(p) for p in ((150, 4, 4), (141, 5, 5))), atol=1e-3)

masks = st.builds(lambda seed, shape: pair(seed, shape), st.integers(0, 9999), st.sampled_from([s for s, _ in SHAPES]))
space = st.floats(.2, 5)

@settings(max_examples=30, deadline=None)
@given(masks, st.tuples(space, space, space), st.lists(st.floats(0, 20), min_size=2, max_size=2).map(sorted))
def test_what_must_hold(ab, spacing, tolerances):
    a, b = ab
    spacing = spacing[:a.ndim]
    low, high = (surface_dice(a, b, spacing, t) for t in tolerances)
    assert 0 <= low <= high <= 1 # a larger tolerance
    for f in (dice, jaccard): assert f(a, b) == f(b, a) and f(a, a) == 1
    assert sensitivity(a, b) == precision(b, a)
    assert hd95(a, b, spacing) == pytest.approx(hd95(b, a, spacing)) and surface_dice(a, b, spacing) == surface_dice(b, a, spacing)
    assert hd95(a, a, spacing) == 0 and surface_dice(a, a, spacing, 0) == 1
    assert hd95(a, b, [2*s for s in spacing]) == pytest.approx(2*hd95(a, b, spacing), rel=1e-5)
    there, back = surface_distances(a, b, spacing)
    assert 0 <= hd95(a, b, spacing) <= max(there.max(), back.max())

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.tuples(space, space, space), st.tuples(*[st.integers(3, 9)]*3))
def test_moved_by_one_voxel(axis, spacing, size):
    "All distances of a moved cuboid are 0 or the spacing; the moved faces are more than a twentieth"
    a = np.zeros((14, 14, 14), bool); a[tuple(slice(2, 2 + n) for n in size)] = True
    b = np.roll(a, 1, axis)
    assert hd95(a, b, spacing) == pytest.approx(spacing[axis])
    assert surface_dice(a, b, spacing, spacing[axis]) == 1 and surface_dice(a, b, spacing, .99*spacing[axis]) < 1
    assert volume_difference(a, b) == 0

def test_a_border_voxel_of_the_scan_is_surface():
    a = np.ones((5, 6, 7), bool)
    assert len(surface_distances(a, a, (1, 1, 1))[0]) == 5*6*7 - 3*4*5

def test_empty_masks():
    a, e = np.ones((3, 4, 5), np.uint8), np.zeros((3, 4, 5), np.uint8)
    full = dict(dice=0, jaccard=0, sensitivity=0, precision=None, volume_difference=-1, hd95=None, surface_dice=0)
    assert case_metrics(e, a, (1, 1, 1), {'x': 1, 'y': 2}) == {'x': full, 'y': dict.fromkeys(METRICS)}
    assert case_metrics(a, e, (1, 1, 1), {'x': 1})['x'] == full | dict(sensitivity=None, precision=0, volume_difference=None)
    assert case_metrics(e, e, (1, 1, 1)) == {}

@pytest.mark.parametrize('kind', [np.uint8, np.int16, np.uint16, np.int64])
def test_one_slice_is_measured_in_its_plane(kind):
    y, p = np.zeros((2, 1, 40, 50), kind)
    y[0, 10:30, 10:30] = 1; p[0, 10:30, 13:33] = 1
    m = case_metrics(p, y, (1., 2., .5), {'x': 1}, tolerance=1.4)['x']
    assert m['hd95'] == pytest.approx(1.5) and m['surface_dice'] < 1
    for axis in (1, 2): assert case_metrics(*(np.moveaxis(v, 0, axis) for v in (p, y)), np.insert([2., .5], axis, 9.), {'x': 1}, tolerance=1.4)['x'] == m
    thick = case_metrics(np.repeat(p, 2, 0), np.repeat(y, 2, 0), (1., 2., .5), {'x': 1})['x']
    assert thick['surface_dice'] > m['surface_dice'] # two slices have a top and a bottom, whose inside is shared

def test_a_class_of_one_slice_in_a_scan_stays_a_volume():
    y = np.zeros((5, 20, 20), np.uint8); y[2, 5:15, 5:15] = 1
    p = np.roll(y, 1, 0)
    assert case_metrics(p, y, (4., 1., 1.))[1]['hd95'] == 4

@pytest.mark.parametrize('spacing', [(1., 1.), (1., 1., 0.), (1., -1., 1.), (1., float('nan'), 1.), (1., float('inf'), 1.)])
def test_spacing_that_cannot_be(spacing):
    a = np.ones((3, 4, 5), np.uint8)
    with pytest.raises(InputError, match='spacing'): hd95(a, a, spacing)
    with pytest.raises(InputError, match='spacing'): case_metrics(a, a, spacing)

def test_a_large_scan_with_small_organs_is_quick():
    y = np.zeros((300, 512, 512), np.uint8)
    for v in range(1, 11): y[20*v:20*v + 40, 150:200, 30*v:30*v + 50] = v
    p = np.roll(y, (1, 2, 2), (0, 1, 2))
    start = time.monotonic()
    found = case_metrics(p, y, (1.5, .8, .8))
    assert len(found) == 10 and time.monotonic() - start < 10, 'it takes 1 to 2 s on two cores'

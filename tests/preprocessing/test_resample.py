"Resampling against SciPy, and what must hold for any shape."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from autounet_nb.core.errors import InputError
from autounet_nb.preprocessing.resample import resample, resample_labels, resampled_shape, spline_operator

def scipy_zoom(x, shape, order=3):
    return ndimage.zoom(np.asarray(x, float), np.divide(shape, x.shape), order=order, mode='nearest', grid_mode=True)

def volume(shape, seed=0, mean=300, sd=50): return np.random.default_rng(seed).normal(mean, sd, shape)

shapes = st.tuples(*[st.integers(1, 24)]*3)
EXAMPLES = [ # up, down, mixed, anisotropic, sizes of 1, longer than a block of the operator
    ((9, 11, 13), (18, 23, 25)), ((18, 23, 25), (9, 11, 13)), ((20, 7, 30), (5, 29, 30)), ((6, 90, 70), (31, 61, 83)),
    ((1, 60, 50), (1, 77, 41)), ((40, 1, 1), (17, 5, 1)), ((5, 6, 7), (1, 1, 1)), ((1, 1, 1), (3, 4, 5)), ((3, 200, 3), (3, 131, 3)), ((3, 3, 131), (3, 3, 200))]

@pytest.mark.parametrize('order', (3, 1))
@pytest.mark.parametrize('old,new', EXAMPLES)
def test_equals_scipy(old, new, order):
    x = volume(old)
    assert np.abs(resample(x, new, order) - scipy_zoom(x, new, order)).max() <= 1e-3*50

@settings(max_examples=60, deadline=None)
@given(shapes, shapes, st.integers(0, 10**6))
def test_equals_scipy_for_any_shape(old, new, seed):
    x = volume(old, seed)
    y = resample(x, new)
    assert y.shape == new and y.dtype == np.float32
    assert np.abs(y - scipy_zoom(x, new)).max() <= 1e-3*50

@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from((1, 3)))
def test_rows_of_the_operator_sum_to_one(n, k, order):
    m = spline_operator(n, k, order)
    assert m.shape == (k, n) and m.dtype == np.float32
    assert np.abs(m.sum(1) - 1).max() < 1e-5
    if n == k: assert (m == np.eye(n)).all()
    if order == 1: assert m.min() >= 0 and ((m > 0).sum(1) <= 2).all()

def test_the_shared_operator_cannot_be_changed():
    with pytest.raises(ValueError): spline_operator(4, 7)[0, 0] = 9

@settings(deadline=None)
@given(shapes, shapes, st.floats(-1e6, 1e6))
def test_a_constant_stays_constant(old, new, value):
    assert np.abs(resample(np.full(old, value), new) - value).max() <= 2e-6*abs(value) + 1e-30

@settings(deadline=None)
@given(shapes)
def test_the_same_shape_changes_nothing(shape):
    x = volume(shape).astype(np.float32)
    assert (resample(x, shape) == x).all()
    assert (resample_labels(x.astype(int), shape) == x.astype(int)).all()

def test_channels_are_resampled_each_by_itself():
    x = volume((3, 10, 11, 12))
    y = resample(x, (7, 15, 9))
    for a, b in zip(x, y): assert np.abs(resample(a, (7, 15, 9)) - b).max() < 1e-3

def test_any_memory_layout_gives_the_same_and_the_input_is_left_alone():
    x = volume((30, 40, 50)).astype(np.float32)
    part = (slice(3, 20), slice(5, 33), slice(1, 44))
    for view in (x[part], np.asfortranarray(x[part]), x[part][::-1, :, ::-1], x[part].transpose(2, 0, 1), x[part].astype('>f4'), x[part].astype(int)):
        before = view.copy()
        new = tuple(n + 5 - 7*(i == 1) for i, n in enumerate(view.shape))
        assert np.abs(resample(view, new) - resample(np.ascontiguousarray(view, np.float32), new)).max() < 1e-2
        assert (view == before).all()

@settings(deadline=None)
@given(shapes, shapes, st.integers(0, 10**6))
def test_probabilities_stay_probabilities(old, new, seed):
    p = np.random.default_rng(seed).dirichlet([.2]*4, old).transpose(3, 0, 1, 2)
    q = resample(p, new, order=1)
    assert q.min() >= -1e-6 and q.max() <= 1 + 1e-5
    assert np.abs(q.sum(0) - 1).max() < 1e-4

@settings(deadline=None)
@given(shapes, shapes, st.sampled_from((np.uint8, np.int16, np.int64)))
def test_labels_keep_their_values_and_type(old, new, dtype):
    y = np.random.default_rng(0).choice([0, 1, 4, 100], old).astype(dtype)
    z = resample_labels(y, new)
    assert z.shape == new and z.dtype == dtype
    assert set(np.unique(z)) <= set(np.unique(y))
    if all(k >= n for n, k in zip(old, new)): assert set(np.unique(z)) == set(np.unique(y))

@given(st.integers(1, 60), st.integers(1, 60))
def test_a_label_comes_from_the_voxel_in_which_its_middle_lies(n, k):
    j = resample_labels(np.arange(n).reshape(1, 1, n), (1, 1, k)).ravel()
    middle = (2*np.arange(k) + 1)*n # in units of 1/2nk of the axis
    assert (2*k*j <= middle).all() and (middle < 2*k*(j + 1)).all()

def test_labels_equal_scipy():
    y = np.random.default_rng(0).integers(0, 5, (11, 30, 17))
    for new in ((11, 30, 17), (22, 41, 50), (7, 19, 5)): assert (resample_labels(y, new) == scipy_zoom(y, new, order=0)).all()

@given(shapes, st.tuples(*[st.floats(.1, 10)]*3), st.tuples(*[st.floats(.1, 10)]*3))
def test_the_shape_keeps_the_extent(shape, old, new):
    for n, s, k, t in zip(shape, old, resampled_shape(shape, old, new), new):
        assert k >= 1 and (abs(k*t - n*s) <= t/2*(1 + 1e-6) or k == 1)
    assert resampled_shape(shape, old, old) == shape

def test_halves_are_rounded_up(): assert resampled_shape((5, 7, 1), (1, 1, 1), (2, 2, 4)) == (3, 4, 1)

@pytest.mark.parametrize('call,message', [
    (lambda: resample(np.zeros((2, 2, 2)), (2, 2)), 'three sizes'), (lambda: resample(np.zeros((2, 2, 2)), (0, 2, 2)), 'three sizes'),
    (lambda: resample_labels(np.zeros((2, 2, 2), int), (2, -1, 2)), 'three sizes'), (lambda: resample(np.zeros((2, 2, 2)), (3, 2, 2), order=2), 'order'),
    (lambda: resampled_shape((2, 2, 2), (1, 1, 1), (1, 0, 1)), 'positive'), (lambda: resampled_shape((2, 2, 2), (1, float('nan'), 1), (1, 1, 1)), 'positive')])
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(InputError, match=message): call()

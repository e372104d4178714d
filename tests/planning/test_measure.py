"Measuring a case: counted values against NumPy, boxes and masks against SciPy, and what is kept between two runs."
import math, os, random
import numpy as np, pytest
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_fill_holes
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.planning.measure import (CaseFacts, ValueCounts, measure_classes, fingerprint_case, key_of_files, nonzero_box, nonzero_mask,
                                          round_values)

BOUND = 2.**-14
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
parts = st.lists(arrays(np.float32, st.integers(0, 40), elements=floats), min_size=1, max_size=6).filter(lambda o: sum(map(len, o)))
few = settings(max_examples=60, deadline=None)

def counted(xs):
    c = ValueCounts()
    for x in xs: c = c.merge(ValueCounts().add(x))
    return c

def same(a, b): return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ('values', 'counts', 'total', 'squares', 'min', 'max'))

# --- counted values

@few
@given(parts, st.floats(0, 100))
def test_percentiles_within_the_stated_bound(xs, q):
    x, c = np.concatenate(xs).astype(np.float64), counted(xs)
    ref = np.percentile(x, q)
    i = q/100*(len(x) - 1)
    near = np.sort(x)[[math.floor(i), math.ceil(i)]]
    assert abs(c.percentile(q) - ref) <= np.abs(near).max()*BOUND*(1 + 1e-9)
    assert (c.min, c.max, c.n) == (x.min(), x.max(), len(x))
    assert c.mean == pytest.approx(x.mean(), rel=1e-9, abs=1e-9*np.abs(x).max())
    assert c.sd == pytest.approx(x.std(), rel=1e-6, abs=1e-6*np.abs(x).max())

@few
@given(st.lists(st.integers(-16384, 16384), min_size=1, max_size=200), st.floats(0, 100))
def test_whole_numbers_are_exact(x, q):
    c = ValueCounts().add(x)
    assert c.percentile(q) == pytest.approx(np.percentile(x, q), rel=1e-12, abs=1e-9)
    assert (c.mean, c.n) == (pytest.approx(np.mean(x), rel=1e-12), len(x))

@few
@given(parts, st.randoms())
def test_order_of_merging_does_not_matter(xs, rnd):
    cs = [ValueCounts().add(x) for x in xs]
    rnd.shuffle(cs)
    while len(cs) > 1: cs.append(cs.pop(rnd.randrange(len(cs))).merge(cs.pop(rnd.randrange(len(cs)))))
    assert same(cs[0], counted(xs))

@few
@given(arrays(np.float32, 50, elements=floats))
def test_rounding_error(x):
    r = round_values(x).astype(float)
    assert (np.abs(r - x) <= np.abs(x.astype(float))*BOUND).all() and np.isfinite(r).all()
    assert np.array_equal(round_values(round_values(x)), round_values(x))

def test_table_stays_small():
    x = np.random.default_rng(0).lognormal(5, 1, 400_000).astype(np.float32)
    c = counted(np.split(x, 20))
    assert len(np.unique(x)) > 200_000 and len(c.values) <= 8192*math.ceil(math.log2(x.max()/x.min()) + 1)
    assert c.counts.sum() == len(x)

def test_inputs_are_left_alone():
    x = np.array([3., 1., 2.], np.float32)
    c = ValueCounts().add(x)
    before = c.values.copy(), c.counts.copy()
    c.merge(c); c.add(x)
    assert x.tolist() == [3, 1, 2] and np.array_equal(before, (c.values, c.counts))

# --- box and mask

images = arrays(np.float32, st.tuples(st.integers(1, 2), st.integers(2, 5), st.integers(2, 6), st.integers(2, 6)), elements=st.sampled_from([0., 0., 0., 1., -2.]))

@few
@given(images)
def test_box_is_the_smallest(image):
    m, box = (image != 0).any(0), nonzero_box(image)
    if not m.any(): assert m[box].shape == m.shape; return
    assert m[box].sum() == m.sum()
    for axis in range(3):
        for end in (0, -1): assert m[box].take(end, axis).any(), 'a face of the box is empty'

@few
@given(images)
def test_mask_is_filled(image):
    m = nonzero_mask(image)
    assert np.array_equal(m, binary_fill_holes((image != 0).any(0)))
    assert m[(image != 0).any(0)].all() and m.dtype == bool

def test_mask_of_a_picture_is_filled_in_its_plane():
    a = np.zeros((1, 1, 7, 7)); a[..., 1:6, 1:6] = 1; a[..., 3, 3] = 0
    assert nonzero_mask(a).sum() == 25
    flat = np.zeros((1, 3, 7, 7)); flat[:, 1] = a[:, 0]
    assert nonzero_mask(flat).sum() == 24 # a sheet in a volume has a hole that is open to both sides

# --- what is kept of a case

@pytest.fixture(scope='module')
def heads(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp('in a folder')/'heads', n=5, shape=(12, 30, 26), skull_stripped=True, seed=3)

def test_a_series_is_looked_into(heads, tmp_path):
    series = tmp_path/'series'
    series.mkdir()
    for i in range(3): (series/f'{i}.dcm').write_bytes(b'x')
    case = replace(heads[0], images=(str(series),))
    before = key_of_files(case)
    assert key_of_files(case) == before
    (series/'1.dcm').write_bytes(b'longer')
    assert key_of_files(case) != before

def test_damaged_facts_are_measured_again(heads, tmp_path):
    case, rnd = heads[0], random.Random(0)
    whole = fingerprint_case(case, tmp_path)
    path, key = tmp_path/f'{case.id}.npz', key_of_files(case)
    good = path.read_bytes()
    damaged = [b'', b'PK', good[:len(good)//2], good[:-1], b'\0'*len(good), b'{"key": 1}']
    for i in rnd.sample(range(len(good)), 200): damaged.append(good[:i] + bytes([good[i] ^ (1 << rnd.randrange(8))]) + good[i + 1:])
    for b in damaged:
        path.write_bytes(b)
        kept = CaseFacts.load(path, key)
        assert kept is None or (kept[:6] == whole[:6] and same(kept.counts[0], whole.counts[0]))
    path.write_bytes(good[:50])
    assert same(fingerprint_case(case, tmp_path).counts[0], whole.counts[0])
    assert CaseFacts.load(path, key) is not None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_nothing_is_unpickled(heads, tmp_path):
    path, key = tmp_path/f'{heads[0].id}.npz', key_of_files(heads[0])
    np.savez(path, head=np.array(Trap(str(tmp_path/'sprung')), dtype=object))
    assert CaseFacts.load(path, key) is None and not (tmp_path/'sprung').exists()

def test_corners_connect():
    y = np.zeros((4, 4, 4), np.uint8)
    for i in range(4): y[i, i, i] = 3
    assert measure_classes(y) == ({3: 4}, {3: 1})
    y[2, 2, 2] = 0
    assert measure_classes(y) == ({3: 3}, {3: 2})

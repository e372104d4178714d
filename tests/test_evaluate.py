"Dice against NumPy, what is said where it is undefined, and files that do not fit."
import json
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from autounet_nb.data import Case, DataError, Geometry, write_json, write_like
from autounet_nb.evaluate import Scores, dice, evaluate, plot_scores, show_scored
from autounet_nb.phantom import make_phantoms

def grid(shape, spacing=(1., 1., 1.)): return Geometry(shape, spacing, (0., 0., 0.), (1., 0., 0., 0., 1., 0., 0., 0., 1.))

def save(path, y, **kw):
    y = np.asarray(y); write_like(y, grid(y.shape, **kw), path); return path

def plain_dice(a, b): # with Python's sets
    a, b = ({tuple(i) for i in np.argwhere(m)} for m in (a, b))
    return 2*len(a & b)/(len(a) + len(b)) if a or b else None

masks = hnp.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3))

@given(masks, masks)
def test_dice(a, b):
    for k in (1, 2, 3):
        assert dice(a == k, b == k) == plain_dice(a == k, b == k)
        assert dice(a == k, b == k) == dice(b == k, a == k)
    if (a == 1).any(): assert dice(a == 1, a == 1) == 1 and dice(a == 1, a == 9) == 0

@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(masks, masks), min_size=1, max_size=3))
def test_evaluate_equals_dice_class_by_class(tmp_path_factory, pairs):
    tmp = tmp_path_factory.mktemp('masks')
    for i, (p, y) in enumerate(pairs): save(tmp/'p'/f'{i}.mha', p); save(tmp/'y'/f'{i}.mha', y)
    if not any(m.any() for pair in pairs for m in pair):
        with pytest.raises(DataError, match='but background'): evaluate(tmp/'p', tmp/'y')
        return
    s = evaluate(tmp/'p', tmp/'y')
    assert s.names == [str(k) for k in (1, 2, 3) if any((m == k).any() for pair in pairs for m in pair)]
    for i, (p, y) in enumerate(pairs): assert s.cases[str(i)] == {n: plain_dice(p == int(n), y == int(n)) for n in s.names}
    means = [np.mean([v for v in (c[n] for c in s.cases.values()) if v is not None]) for n in s.names]
    assert np.isclose(s.mean, np.mean(means)) and np.allclose(list(s.classes.values()), means)

def test_both_empty_is_said_and_left_out(tmp_path):
    y = np.zeros((2, 3, 4), np.uint8); y[0] = 1
    both = y.copy(); both[1] = 2
    save(tmp_path/'y'/'a.nrrd', y); save(tmp_path/'p'/'a.nrrd', y)
    save(tmp_path/'y'/'b.nrrd', both); save(tmp_path/'p'/'b.nrrd', y)
    save(tmp_path/'y'/'c.nrrd', y); save(tmp_path/'p'/'c.nrrd', both)
    s = evaluate(tmp_path/'p', tmp_path/'y', names={'organ': 1, 'lesion': 2, 'never': 3})
    assert [s.cases[k]['lesion'] for k in 'abc'] == [None, 0., 0.] # a miss and an invention are 0
    assert s.classes == {'organ': 1., 'lesion': 0., 'never': None} and s.mean == .5
    d = json.loads(json.dumps(s.to_json()))
    assert d['cases'][0] == {'id': 'a', 'organ': {'dice': 1.}, 'lesion': {'dice': None}, 'never': {'dice': None}}
    assert d['mean'] == {'dice': .5} and d['classes']['lesion'] == {'dice': 0., 'both_empty': 1} and d['classes']['never'] == {'dice': None, 'both_empty': 3}
    for text in (str(s), s._repr_html_()): assert 'both empty' in text and 'lesion: prediction and label are both empty in 1 of 3 cases' in text
    assert 'nan' not in str(s).lower() and 'NaN' not in json.dumps(d)

def test_a_missing_prediction_is_an_error_that_names_it(tmp_path):
    for k in 'abc': save(tmp_path/'y'/f'{k}.nrrd', np.ones((1, 2, 2), int))
    save(tmp_path/'p'/'a.nrrd', np.ones((1, 2, 2), int))
    with pytest.raises(DataError, match=r'no prediction for b, c \(2 of 3 labels\)'): evaluate(tmp_path/'p', tmp_path/'y')

def test_an_extra_prediction_is_a_warning(tmp_path):
    for k in 'ab': save(tmp_path/'p'/f'{k}.nii.gz', np.ones((1, 2, 2), int))
    save(tmp_path/'y'/'a.nrrd', np.ones((1, 2, 2), int)) # another format
    s = evaluate(tmp_path/'p', tmp_path/'y')
    assert list(s.cases) == ['a'] and 'b' in s.warnings[0] and 'no label' in str(s) and s.to_json()['warnings'] == list(s.warnings)

def test_other_files_are_passed_over(tmp_path):
    for d in 'py': save(tmp_path/d/'a.nrrd', np.ones((1, 2, 2), int)); write_json(tmp_path/d/'scores.json', {}); (tmp_path/d/'.b.nrrd').write_bytes(b'x'); (tmp_path/d/'probabilities').mkdir()
    assert evaluate(tmp_path/'p', tmp_path/'y').mean == 1 and not evaluate(tmp_path/'p', tmp_path/'y').warnings

def test_sizes_have_to_fit(tmp_path):
    for d, n in (('p', 2), ('y', 3)): save(tmp_path/d/'a.nrrd', np.ones((1, 2, n), int)); save(tmp_path/d/'b.nrrd', np.ones((1, 2, 2), int))
    with pytest.raises(DataError) as e: evaluate(tmp_path/'p', tmp_path/'y')
    for words in ('case a', str(tmp_path/'p'/'a.nrrd'), '(1, 2, 2)', str(tmp_path/'y'/'a.nrrd'), '(1, 2, 3)'): assert words in str(e.value)
    assert 'case b' not in str(e.value)

def test_another_place_in_the_room_is_said(tmp_path):
    save(tmp_path/'p'/'a.nrrd', np.ones((1, 2, 2), int), spacing=(3., 1., 1.)); save(tmp_path/'y'/'a.nrrd', np.ones((1, 2, 2), int))
    s = evaluate(tmp_path/'p', tmp_path/'y')
    assert s.mean == 1 and 'spacing' in s.warnings[0] and 'case a' in s.warnings[0]

def test_all_broken_files_are_named(tmp_path):
    for k in 'abc': save(tmp_path/'y'/f'{k}.nii.gz', np.ones((1, 20, 20), int)); save(tmp_path/'p'/f'{k}.nii.gz', np.arange(400).reshape(1, 20, 20))
    for k in 'ac': f = tmp_path/'p'/f'{k}.nii.gz'; f.write_bytes(f.read_bytes()[:-40])
    with pytest.raises(DataError) as e: evaluate(tmp_path/'p', tmp_path/'y')
    assert 'case a: ' in str(e.value) and 'case c: ' in str(e.value) and 'case b: ' not in str(e.value)

def test_names(tmp_path):
    save(tmp_path/'y'/'a.nrrd', [[[1, 2, 3]]]); save(tmp_path/'p'/'a.nrrd', [[[1, 2, 9]]])
    assert evaluate(tmp_path/'p', tmp_path/'y').names == ['1', '2', '3', '9']
    write_json(tmp_path/'dataset.json', dict(labels={'background': 0, 'liver': 1, 'spleen': 2}))
    assert evaluate(tmp_path/'p', tmp_path/'y').names == ['liver', 'spleen', '3', '9'] # above
    write_json(tmp_path/'y'/'dataset.json', dict(labels={'0': 'nothing', '1': 'x', '3': 'z'}))
    assert evaluate(tmp_path/'p', tmp_path/'y').cases['a'] == {'x': 1., 'z': 0., '2': 1., '9': 0.} # beside
    assert evaluate(tmp_path/'p'/'a.nrrd', tmp_path/'y'/'a.nrrd').names[0] == 'x'
    with pytest.raises(DataError, match='called "id"'): evaluate(tmp_path/'p', tmp_path/'y', names={'id': 1})

def test_two_files_of_different_names(tmp_path):
    assert evaluate(save(tmp_path/'mine.nrrd', [[[0, 1]]]), save(tmp_path/'truth.mha', [[[1, 1]]])).cases == {'truth': {'1': 2/3}}

def test_a_case_without_label_and_twins(tmp_path):
    f = save(tmp_path/'a.nrrd', [[[0, 1]]])
    with pytest.raises(DataError, match='case a: has no label'): evaluate(tmp_path, [Case('a', (str(f),))])
    save(tmp_path/'a.mha', [[[0, 1]]])
    with pytest.raises(DataError, match='both be case a'): evaluate(tmp_path, f)
    with pytest.raises(DataError, match='no such file or folder'): evaluate(tmp_path/'nowhere', f)
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='no mask'): evaluate(tmp_path/'empty', f)

def test_several_processes_give_the_same(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4): save(tmp_path/'p'/f'{i}.nrrd', rng.integers(0, 3, (3, 4, 5))); save(tmp_path/'y'/f'{i}.nrrd', rng.integers(0, 3, (3, 4, 5)))
    a, b = (evaluate(tmp_path/'p', tmp_path/'y', workers=n) for n in (1, 2))
    assert a == b and list(b.cases) == ['0', '1', '2', '3']

def test_ranking():
    s = Scores({'a': {'x': .9, 'y': None}, 'b': {'x': None, 'y': None}, 'c': {'x': .5, 'y': .7}, 'd': {'x': 0., 'y': 1.}})
    assert s.ranked() == ['d', 'c', 'a', 'b']

def test_pictures(tmp_path):
    import matplotlib; matplotlib.use('agg')
    truth = make_phantoms(tmp_path, n=3, shape=(10, 20, 20))
    for i, c in enumerate(truth):
        from autounet_nb.data import read_label
        y, g = read_label(c.label); write_like(np.roll(y, i, 1), g, tmp_path/'p'/f'{c.id}.nrrd')
    s = evaluate(tmp_path/'p', truth)
    assert s.ranked()[-1] == truth[0].id and s.mean < 1
    assert show_scored(s, tmp_path/'p', truth, 'best').get_suptitle().startswith(truth[0].id)
    assert show_scored(s, tmp_path/'p', truth, 'worst').get_suptitle().startswith(s.ranked()[0])
    assert len(plot_scores(s).axes[0].collections) == 2
    with pytest.raises(DataError, match="no case 'x'"): show_scored(s, tmp_path/'p', truth, 'x')

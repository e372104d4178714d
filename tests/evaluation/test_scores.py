"Dice against NumPy, what is said where there is nothing to compare, and the scores as files."
import csv, json
import numpy as np, pytest
import SimpleITK as sitk
from hypothesis import given, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.evaluation.metrics import dice
from autounet_nb.evaluation.evaluate import evaluate
from autounet_nb.evaluation.scores import Scores
from autounet_nb.evaluation.metrics import METRICS, case_metrics

def write(path, y, spacing=1., origin=0.):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = sitk.GetImageFromArray(np.asarray(y, np.uint8)); im.SetSpacing((spacing,) * 3); im.SetOrigin((origin, 0., 0.)); sitk.WriteImage(im, str(path))

@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_dice_is_twice_the_overlap_over_the_sizes(seed, p, q):
    rng = np.random.default_rng(seed)
    a, b = rng.random((4, 5, 6)) < p, rng.random((4, 5, 6)) < q
    assert dice(a, b) == (2 * (a * b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else None)

@pytest.fixture
def pair(tmp_path):
    "Three cases with two classes: class 2 is in one case nowhere, in one only predicted"
    rng = np.random.default_rng(0)
    for i in range(3):
        y, p = (rng.integers(0, 3, (4, 5, 6)) for _ in range(2))
        if i == 1: y[y == 2] = 0; p[p == 2] = 0
        if i == 2: y[y == 2] = 0
        write(tmp_path/'labels'/f'c{i}.nii.gz', y); write(tmp_path/'predictions'/f'c{i}.nii.gz', p)
    return tmp_path/'predictions', tmp_path/'labels'

def test_json_is_as_promised(pair):
    d = json.loads(json.dumps(evaluate(*pair).to_json()))
    cases = {c['id']: c for c in d['cases']}
    assert set(cases) == {'c0', 'c1', 'c2'} and cases['c1']['2']['dice'] is None and cases['c2']['2']['dice'] == 0
    ones, twos = [cases[c]['1']['dice'] for c in cases], [cases['c0']['2']['dice'], 0]
    assert abs(d['classes']['1']['dice'] - np.mean(ones)) < 1e-12 and abs(d['classes']['2']['dice'] - np.mean(twos)) < 1e-12
    assert abs(d['mean']['dice'] - np.mean([np.mean(ones), np.mean(twos)])) < 1e-12
    assert d['classes']['2']['both_empty'] == 1

def test_both_empty_is_said(pair):
    assert 'both empty' in repr(evaluate(*pair)) and 'both empty' in evaluate(*pair)._repr_html_()

def test_names_come_from_the_dataset(pair):
    (pair[1].parent/'dataset.json').write_text(json.dumps({'labels': {'background': 0, 'organ': 1, 'tumour': 2}}))
    assert set(evaluate(*pair).to_json()['classes']) == {'organ', 'tumour'}

def test_missing_and_misfitting_are_errors_extra_is_a_warning(pair):
    predictions, labels = pair
    write(predictions/'more.nii.gz', np.zeros((2, 2, 2)))
    assert 'more' in evaluate(predictions, labels).to_json()['warnings'][0]
    write(predictions/'c0.nii.gz', np.zeros((4, 5, 7)))
    with pytest.raises(InputError, match='c0'): evaluate(predictions, labels)
    (predictions/'c0.nii.gz').unlink()
    with pytest.raises(InputError, match='c0'): evaluate(predictions, labels)

@pytest.mark.parametrize('header,kinds', [({}, []), (dict(origin=.01, spacing=1.0001), []), (dict(origin=50.), ['origin']), (dict(spacing=2., origin=50.), ['spacing', 'origin'])])
def test_masks_in_another_place_are_scored_and_warned_of_first(tmp_path, header, kinds):
    y = np.random.default_rng(0).integers(0, 2, (4, 5, 6))
    for i in range(9): # more than are listed one by one
        write(tmp_path/'labels'/f'c{i}.nii.gz', y); write(tmp_path/'predictions'/f'c{i}.nii.gz', y, **(header if i else {}))
    s = evaluate(tmp_path/'predictions', tmp_path/'labels', workers=1)
    assert s.mean == 1 and s.to_json()['warnings'] == list(s.warnings) and len(s.warnings) == len(kinds)
    for kind, said, line in zip(kinds, s.warnings, repr(s).splitlines()):
        assert f'differ in {kind} in 8 of 9 cases, as in c1' in said and line == f'Warning: {said}'
    assert repr(s).splitlines()[len(kinds)].startswith('Dice') and s._repr_html_().startswith('<p><b>' if kinds else '<table>')

def test_every_metric_is_in_the_json(pair):
    s = evaluate(*pair)
    d = json.loads(json.dumps(s.to_json(), allow_nan=False))
    cases = {c.pop('id'): c for c in d['cases']}
    assert all(tuple(m) == METRICS for c in cases.values() for m in c.values()) and cases == s.metrics
    assert {k: {n: m['dice'] for n, m in c.items()} for k, c in cases.items()} == s.cases
    assert cases['c2']['2'] == dict(dice=0, jaccard=0, sensitivity=None, precision=0, volume_difference=None, hd95=None, surface_dice=0)
    for m in METRICS:
        means = {n: [c[n][m] for c in cases.values() if c[n][m] is not None] for n in '12'}
        assert all(abs(d['classes'][n][m] - np.mean(v)) < 1e-12 for n, v in means.items())
        assert abs(d['mean'][m] - np.mean([np.mean(v) for v in means.values()])) < 1e-12
    assert [d['classes'][n]['one_empty'] for n in '12'] == [0, 1] and d['tolerance'] == 1
    assert '2: prediction or label is empty in 1 of 3 cases' in repr(s) and 'HD95' in repr(s) and 'HD95' in s._repr_html_()

def test_many_classes_stay_readable(tmp_path):
    y = np.zeros((3, 8, 40)); y[1, 2:5] = np.arange(40)
    for name in 'ab': write(tmp_path/'labels'/f'{name}.nii.gz', y); write(tmp_path/'predictions'/f'{name}.nii.gz', np.where(y > 20, 0, y))
    text = repr(evaluate(tmp_path/'predictions', tmp_path/'labels', workers=1))
    assert text.splitlines()[0].split() == ['Dice', 'mean'] and max(map(len, text.splitlines())) < 160
    assert any(l.split()[:2] == ['7', '1.000'] for l in text.splitlines()) and text.count('prediction or label is empty') == 1
    assert '21, 22, 23, 24, 25 and 14 more: prediction or label is empty in 2 of 2 cases' in text

def test_a_metric_that_no_case_has_is_null(tmp_path):
    y = np.zeros((3, 8, 8)); y[1, 2:5, 2:5] = 1
    write(tmp_path/'labels'/'a.nii.gz', 0*y); write(tmp_path/'predictions'/'a.nii.gz', y)
    s = evaluate(tmp_path/'predictions', tmp_path/'labels', names={'organ': 1, 'other': 2})
    d = s.to_json()
    assert d['mean']['dice'] == 0 and d['mean']['hd95'] is None and set(d['cases'][0]['other'].values()) == {None} and '–' in repr(s)

def test_scores_come_back_from_json(pair):
    for s in (evaluate(*pair), evaluate(*pair, tolerance=2.5), evaluate(*pair, surface=False), Scores({'a': {'x': .5}, 'b': {'x': None}}, ('said',))):
        assert Scores.from_json(json.loads(json.dumps(s.to_json()))) == s
    for damaged in ({}, [], {'cases': 3}, {'cases': [{'id': 'a', 'x': {}}]}, {'cases': [{'id': 'a', 'x': .5}]}):
        with pytest.raises(InputError, match='list of cases'): Scores.from_json(damaged)

def test_csv_has_a_row_per_case_and_class(pair, tmp_path):
    s = evaluate(*pair, names={'the "organ", left': 1, 'tumour': 2})
    s.save_csv(tmp_path/'new'/'scores.csv')
    with open(tmp_path/'new'/'scores.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert [(r['case'], r['class']) for r in rows] == [(k, n) for k in s.cases for n in s.names]
    assert all({m: float(r[m]) if r[m] else None for m in METRICS} == s.metrics[r['case']][r['class']] for r in rows)
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['scores.csv']

def test_distances_are_in_the_millimetres_of_the_file(tmp_path):
    y = np.zeros((6, 10, 10)); y[2:4, 2:5, 2:5] = 1
    for name, m in (('labels', y), ('predictions', np.roll(y, 1, 0))):
        (tmp_path/name).mkdir()
        im = sitk.GetImageFromArray(m.astype(np.uint8)); im.SetSpacing((.5, .5, 4.)) # (x,y,z)
        sitk.WriteImage(im, str(tmp_path/name/'a.nii.gz'))
    found = evaluate(tmp_path/'predictions', tmp_path/'labels').metrics['a']['1']
    assert found == case_metrics(np.roll(y, 1, 0).astype(np.uint8), y.astype(np.uint8), (4., .5, .5))[1] and found['hd95'] == 4

def test_pictures_are_measured_in_their_plane(tmp_path):
    for name, at in (('labels', 5), ('predictions', 7)):
        (tmp_path/name).mkdir()
        y = np.zeros((30, 40), np.uint8); y[5:20, at:at + 20] = 1
        sitk.WriteImage(sitk.GetImageFromArray(y), str(tmp_path/name/'a.png'))
    m = evaluate(tmp_path/'predictions', tmp_path/'labels').metrics['a']['1']
    assert m['hd95'] == 2 and m['surface_dice'] < 1

def test_tolerance_and_the_choice_of_distances_reach_every_case(pair):
    loose, strict, none = evaluate(*pair, tolerance=3.), evaluate(*pair, tolerance=0.), evaluate(*pair, surface=False)
    assert loose.metrics['c0']['1']['surface_dice'] > strict.metrics['c0']['1']['surface_dice'] and '(3 mm)' in repr(loose)
    assert all(tuple(m) == METRICS[:-2] for c in none.metrics.values() for m in c.values()) and 'surface' not in repr(none)

"Splits: every case validated once, patients in one piece, whatever the ids, the order and the seed; and files that say otherwise."
import json
from collections import Counter
import pytest
from hypothesis import given, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.core.files import write_json
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.preprocessing.folds import kfold_splits, read_patients
from autounet_nb.preprocessing.splits import read_splits, work_splits

ID = st.text('abc019_-. é', min_size=1, max_size=8)
IDS = st.lists(ID, min_size=2, max_size=60, unique=True)
K, SEED = st.integers(2, 7), st.integers(0, 2**31)
sizes = lambda splits: [len(s['valid']) for s in splits]

@st.composite
def grouped(draw):
    "ids, and a patient for each, at least two"
    ids = draw(IDS)
    return ids, dict(zip(ids, [0, 1] + [draw(st.integers(0, 15)) for _ in ids[2:]]))

def is_cross_validation(splits, ids):
    "Each case is a validation case once, of a network that was trained on all other cases"
    assert sorted(i for s in splits for i in s['valid']) == sorted(ids)
    for s in splits: assert s['valid'] and s['train'] and sorted(s['train'] + s['valid']) == sorted(ids)

@given(IDS, K, SEED)
def test_every_case_is_a_validation_case_once(ids, k, seed):
    splits = kfold_splits(ids, k, seed)
    is_cross_validation(splits, ids)
    assert len(splits) == min(k, len(ids)) and max(sizes(splits)) - min(sizes(splits)) <= 1
    assert splits == kfold_splits(ids[::-1], k, seed) == kfold_splits(ids, k, seed, {i: n for n, i in enumerate(ids)})

def test_folds_of_earlier_versions_stay():
    ids = [f'c{i}' for i in range(7)]
    assert [s['valid'] for s in kfold_splits(ids)] == [['c0', 'c2'], ['c1', 'c4'], ['c3'], ['c6'], ['c5']]

@given(grouped(), K, SEED)
def test_patients_stay_together(cases, k, seed):
    ids, of = cases
    splits, most = kfold_splits(ids, k, seed, of), max(Counter(of.values()).values())
    is_cross_validation(splits, ids)
    assert len(splits) == min(k, len(set(of.values()))) and max(sizes(splits)) - min(sizes(splits)) <= most
    for s in splits: assert not {of[i] for i in s['train']} & {of[i] for i in s['valid']}
    renamed = {i: f'patient {99 - p}' for i, p in reversed(list(of.items()))}
    assert splits == kfold_splits(ids[::-1], k, seed, renamed) # what patients are called says nothing

@given(IDS, K, SEED, st.data())
def test_rare_classes_are_spread(ids, k, seed, data):
    classes = {i: data.draw(st.sets(st.integers(1, 4))) for i in ids}
    splits = kfold_splits(ids, k, seed, classes=classes)
    is_cross_validation(splits, ids)
    assert max(sizes(splits)) - min(sizes(splits)) <= 1
    count = Counter(c for v in classes.values() for c in v or {0})
    rarest = min(count, key=lambda c: (count[c], c))
    held = [sum(rarest in (classes[i] or {0}) for i in s['valid']) for s in splits]
    assert max(held) - min(held) <= 1
    assert splits == kfold_splits(ids[::-1], k, seed, classes=dict(reversed(list(classes.items()))))

@given(grouped(), K, SEED, st.data())
def test_classes_and_patients_at_once(cases, k, seed, data):
    ids, of = cases
    splits = kfold_splits(ids, k, seed, of, {i: data.draw(st.sets(st.integers(1, 3))) for i in ids})
    is_cross_validation(splits, ids)
    for s in splits: assert not {of[i] for i in s['train']} & {of[i] for i in s['valid']}
    assert max(sizes(splits)) - min(sizes(splits)) <= max(Counter(of.values()).values())

@given(st.lists(st.tuples(st.text('ab1', min_size=1, max_size=4), st.text('ab1_', max_size=4)), min_size=1, max_size=9))
def test_a_pattern_gives_back_what_the_ids_were_made_of(parts):
    ids = {f'{p}_{v}': p for p, v in parts}
    assert read_patients('{patient}_{visit}', ids) == ids

@given(grouped())
def test_a_table_gives_back_what_was_written(tmp_path_factory, cases):
    import csv
    ids, of = cases
    names = {i: f'Dr. "{p}", é' for i, p in of.items() if i == i.strip()}
    path = tmp_path_factory.mktemp('table')/'who.CSV'
    with open(path, 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([('age', 'Patient', 'Case'), *((7, p, i) for i, p in names.items())])
    assert read_patients(path, names) == names

@pytest.mark.parametrize('text,words', [
    ('case,patient\na,1\n', 'patient of case b'), ('case,patient\na,1\nb\n', 'patient of case b'), ('case,patient\na,1\nb,\n', 'patient of case b'), ('', 'no CSV'),
    ('case,who\na,1\n', "its first line is 'case, who'; its first line must name the columns case and patient"), ('id,patient\na,1\nb,2\na,3\n', 'of patient 1 and of patient 3'), (b'case,patient\na,\xff\n', 'UTF-8')])
def test_tables_that_are_none(tmp_path, text, words):
    (tmp_path/'who.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as e: read_patients(tmp_path/'who.csv', ['a', 'b'])
    assert 'who.csv' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('sep,end', [(',', '\n'), (';', '\r\n'), ('\t', '\n')])
def test_tables_as_programs_write_them(tmp_path, sep, end):
    (tmp_path/'who.csv').write_bytes(('\ufeff' + end.join(sep.join(r) for r in (('ID', 'patient'), ('a', ' x '), ('b', 'x'), ('', '')))).encode())
    assert read_patients(tmp_path/'who.csv', ['a', 'b']) == dict(a='x', b='x')

@pytest.mark.parametrize('custom', [7, {}, [7], [[]], [{}], [dict(train=['a'])], [dict(train='a', valid='b')], [dict(train=[1], valid=['b'])], [dict(train=['a'], valid=None)], []])
def test_files_that_hold_no_splits(tmp_path, custom):
    write_json(tmp_path/'own.json', custom)
    with pytest.raises(InputError, match='own.json: it (is not a list of folds|holds no fold)'): read_splits(tmp_path/'own.json', ['a', 'b'])

@given(IDS, K, SEED)
def test_custom_splits_in_both_spellings(ids, k, seed):
    splits = kfold_splits(ids, k, seed)
    assert read_splits([dict(train=s['train'][::-1], val=s['valid']) for s in splits], ids) == read_splits(splits, ids) == splits

def test_what_was_asked_for_stays_and_is_not_drawn_over(tmp_path, capsys):
    ids = [f'{p}_{v}' for p in 'abcdef' for v in (1, 2)]
    by_patient = work_splits(tmp_path, ids, patients='{patient}_{visit}')
    assert work_splits(tmp_path, ids[::-1]) == work_splits(tmp_path, ids, seed=3) == by_patient
    with pytest.raises(InputError, match='give --patients again'): work_splits(tmp_path, ids[1:])
    assert json.loads((tmp_path/'splits.json').read_text())[0]['by'] == 'patient'
    custom = [dict(train=ids[4:], valid=ids[:2])]
    assert work_splits(tmp_path, ids, custom=custom) == custom == work_splits(tmp_path, ids) == work_splits(tmp_path, [*ids, 'one_more'])
    with pytest.raises(InputError, match='give --splits again'): work_splits(tmp_path, ids[1:])
    assert work_splits(tmp_path, ids, patients='{patient}_{visit}') == by_patient
    assert 'trained again' not in capsys.readouterr().out # nothing was trained

def test_blind_folds_follow_the_cases(tmp_path, capsys):
    ids = [f'c{i}' for i in range(6)]
    work_splits(tmp_path, ids); (tmp_path/'models/3d/fold_0').mkdir(parents=True)
    assert capsys.readouterr().out == ''
    assert work_splits(tmp_path, ids[:3]) == kfold_splits(ids[:3])
    out = capsys.readouterr().out
    assert 'There are 3 cases, so there are 3 folds instead of 5.' in out and 'trained again' in out

def test_likely_pairs_are_named_where_they_are_apart(tmp_path, capsys):
    problems = [dict(kind='twice', case='b', other='a'), dict(kind='alike', case='d', other='c'), dict(kind='empty', case='a', other=''), dict(kind='alike', case='gone', other='a')]
    write_json(tmp_path/'check.json', dict(key='k', report=dict(problems=problems)))
    work_splits(tmp_path, 'abcdef', custom=[dict(train=list('abe'), valid=list('cd')), dict(train=list('ac'), valid=list('b'))])
    warning = capsys.readouterr().out.splitlines()[-1]
    assert 'a and b look like' in warning and 'c and d' not in warning and 'gone' not in warning
    work_splits(tmp_path, 'abcdef', patients=dict(zip('abcdef', '112233')))
    assert 'look like' not in capsys.readouterr().out

def test_a_run_by_patient_and_with_custom_splits(autounet, one_line, tmp_path):
    data = make_phantoms(tmp_path/'scans', n=4, shape=(12, 20, 20), layout='pairs', seed=1)
    go = lambda *args: autounet('run', tmp_path/'scans', tmp_path/'work', '--models', '2d', '--folds', '0', '--steps', '2', '--hardware', 'cpu', *args)
    one_line(go('--patients', '{patient}-{visit}'), 'phantom_001', 'does not fit the pattern')
    write_json(tmp_path/'own.json', [dict(train=['phantom_001'], val=['phantom_009'])])
    one_line(go('--splits', tmp_path/'own.json'), 'own.json', 'phantom_009')
    assert not (tmp_path/'work').exists() # said before anything was done
    (tmp_path/'who.csv').write_text('case,patient\n' + ''.join(f'{c.id},{n//2}\n' for n, c in enumerate(data)))
    p = go('--patients', tmp_path/'who.csv')
    assert p.returncode == 0 and 'There are 2 patients, so there are 2 folds instead of 5.' in p.stdout, p.stderr
    held_out = lambda: set(json.loads((tmp_path/'work/models/2d/fold_0/model.json').read_text())['recipe']['split']['valid'])
    assert held_out() in ({'phantom_001', 'phantom_002'}, {'phantom_003', 'phantom_004'})
    write_json(tmp_path/'own.json', [dict(train=['phantom_001', 'phantom_004'], val=['phantom_002'])])
    p = go('--splits', tmp_path/'own.json')
    assert p.returncode == 0 and 'what changed is the split' in p.stdout and '3 of 4 cases are validation cases of no fold' in p.stdout, p.stderr
    assert held_out() == {'phantom_002'} == {f.name[:11] for f in (tmp_path/'work/models/2d/fold_0/validation/masks').glob('*.nii.gz')}

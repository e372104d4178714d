"Files from somebody else: whatever stands in them, they are read or refused in one sentence, soon, and nothing leaves the folder."
import copy, json, math, time
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.core import records
from autounet_nb.data import cases
from autounet_nb.planning import rules
from autounet_nb.planning.planner import diff, planned_values
from autounet_nb.core.files import read_json, write_json
from autounet_nb.data.cases import Case, Dataset
from autounet_nb.planning.fingerprint import Fingerprint
from autounet_nb.planning.memory import count_weights, training_memory
from autounet_nb.planning.config import ModelConfig
from autounet_nb.planning.plan import Plan
from autounet_nb.planning.planner import make_plan
from autounet_nb.core.text import shape_text
from autounet_nb.planning.rules import Patch, fit_patch, pad_to_pools, pooling, proportional_shape, sketch_fingerprint

def sentence(e, *words):
    "The message of a InputError, which must be one short line"
    assert '\n' not in str(e.value) and len(str(e.value)) < 700
    for w in words: assert w in str(e.value)

# --- JSON

@pytest.mark.parametrize('text,words', [
    ('[' * 100_000, 'too deep'), ('{"a":' * 50_000, 'too deep'), ('{"a": NaN}', 'NaN is not a finite number'), ('[Infinity]', 'not a finite'), ('[-Infinity]', 'not a finite'), ('[1e999]', '1e999'),
    ('["\\ud800"]', 'no valid JSON'), ('9' * 5000, 'no valid JSON'), ('\xff', 'no valid JSON'), ('', 'no valid JSON')])
def test_what_is_no_json(text, words, tmp_path):
    (tmp_path/'x.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(InputError) as e: read_json(tmp_path/'x.json')
    sentence(e, 'x.json', words)

def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path/'x.json', 'wb') as f: f.truncate(10**12) # a hole, which takes no disk
    start = time.monotonic()
    with pytest.raises(InputError) as e: read_json(tmp_path/'x.json')
    sentence(e, 'x.json', 'more than 100 MB')
    assert time.monotonic() - start < 60 # hours, where a limit is missing

def test_a_file_that_is_none(tmp_path):
    for path, words in ((tmp_path, 'cannot be read'), (tmp_path/'none.json', 'no such file')):
        with pytest.raises(InputError) as e: read_json(path)
        sentence(e, words)

def test_what_is_written_can_be_read(tmp_path):
    write_json(tmp_path/'x.json', dict(loss=[float('nan'), float('inf'), 1.5], n={3: 'Hüfte \\u'}))
    assert read_json(tmp_path/'x.json') == dict(loss=[None, None, 1.5], n={'3': 'Hüfte \\u'})

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.integers(-10**40, 10**40) | st.floats() | st.text(max_size=8) | st.sampled_from(['../../x', 'ct', '3d', '2d', 'full', 10**9, 1e300, -1, 0, 0., 1., 5, 100_000, 'x' * 5000, '\n\x1b[2J', '<script>']),
                           lambda o: st.lists(o, max_size=4) | st.dictionaries(st.text(max_size=5), o, max_size=3), max_leaves=6)

@settings(max_examples=300, deadline=None)
@given(json_values, st.sampled_from([cases.DATASET_FORM, dict(a=records.TEXT, b=[(records.whole_number(0, 3),) * 2], c={str: records.FLAG})]))
def test_a_flaw_is_one_short_line(value, form):
    why = records.flaw(value, form)
    assert why is None or ('\n' not in why and len(why) < 700)

# --- anything at any place

FINGERPRINTS = [sketch_fingerprint((36, 50, 35), n=3, classes=2), sketch_fingerprint((200, 300, 300), (3, 1, 1), n=2, modalities=('CT', 'T1'), cropped=.7), sketch_fingerprint((1, 400, 500), n=2, modalities=('R', 'G', 'B'))]
PLANS = [make_plan(fp, hw, edits) for fp in FINGERPRINTS for hw, edits in (('cpu', None), ('gpu-12gb', {'2d.batch_size': 4, 'normalization': 'ct'}))]

def places(d, at=()):
    "Where in lists and dicts values stand"
    yield at
    for k, v in d.items() if isinstance(d, dict) else enumerate(d) if isinstance(d, list) else (): yield from places(v, (*at, k))

@st.composite
def changed(draw, objects):
    "JSON of an object with something else at one place, or nothing, or something more"
    d = copy.deepcopy(draw(st.sampled_from(objects)))
    at = draw(st.sampled_from(list(places(d))))
    if not at: return draw(json_values)
    inner, how = d, draw(st.sampled_from(['replace'] * 4 + ['delete', 'add', 'rename']))
    for k in at[:-1]: inner = inner[k]
    if how == 'replace': inner[at[-1]] = draw(json_values)
    elif how == 'delete': del inner[at[-1]]
    elif isinstance(inner, list): inner.append(draw(json_values))
    elif how == 'add': inner[draw(st.text(max_size=5))] = draw(json_values)
    else: inner[draw(st.text(max_size=5) | st.sampled_from(['../../x', '3d_lowres']))] = inner.pop(at[-1])
    return d

plain = lambda o: json.loads(json.dumps(o))
many = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture])

def write(d, path):
    path.write_text(json.dumps(d))
    return path

@many
@given(changed([plain(fp.__dict__) for fp in FINGERPRINTS]))
def test_a_changed_fingerprint_is_planned_soon_or_refused(tmp_path, d):
    start = time.monotonic()
    try: fp = Fingerprint.load(write(d, tmp_path/'f.json'))
    except InputError as e:
        assert '\n' not in str(e) and len(str(e)) < 700
        return
    try: assert make_plan(fp, 'cpu').why() and repr(fp) and fp._repr_html_()
    except InputError as e: assert '\n' not in str(e) and len(str(e)) < 700
    assert time.monotonic() - start < 60 # hours, where a limit is missing
    assert sorted(p.name for p in tmp_path.iterdir()) == ['f.json']

@many
@given(changed([plain(p.to_dict()) for p in PLANS]))
def test_a_changed_plan_is_read_or_refused(tmp_path, d):
    start = time.monotonic()
    try: plan = Plan.load(write(d, tmp_path/'p.json'))
    except InputError as e:
        assert '\n' not in str(e) and len(str(e)) < 900
        return
    assert repr(plan) and plan._repr_markdown_() and not diff(plan, plan)
    plan.why(); planned_values(plan); plan.save(tmp_path/'p.json')
    assert Plan.load(tmp_path/'p.json') == plan
    assert set(plan.models) <= {'2d', '3d', '3d_lowres', '3d_cascade'} and all(k == c.name for k, c in plan.models.items())
    for c in plan.models.values(): assert count_weights(c) <= 2e9 and sum(training_memory(c).values()) <= 1e13
    assert time.monotonic() - start < 60 # hours, where a limit is missing

@many
@given(changed([plain(Dataset('d', '/d', 'pairs', ('CT',), {'background': 0, 'a': 1}, (Case('a', ('/d/a.nii',), '/d/b.nii'), Case('b', ('/d/a.nii',))), {'x': 'why'}).__dict__ | dict(cases=[dict(id='a', images=['/d/a.nii'], label='/d/b.nii'), dict(id='b', images=['/d/a.nii'], label=None)]))]))
def test_a_changed_dataset_is_read_or_refused(tmp_path, d):
    try: ds = Dataset.load(write(d, tmp_path/'d.json'))
    except InputError as e:
        assert '\n' not in str(e) and str(tmp_path) in str(e)
        return
    assert repr(ds) and ds._repr_html_() and all(isinstance(c, Case) and isinstance(c.images, tuple) for c in ds) and '/' not in ''.join(c.id for c in ds)

# --- plans: what the generated changes hardly ever hit

@pytest.mark.parametrize('change,words', [
    (dict(modalities=5), 'modalities is 5'), (dict(label_values=[0, -5]), 'label_values[1] is -5'), (dict(label_values=[0, 2, 1]), 'label_values are'), (dict(labels={'background': 0, 'a': 1, 'b': 1}), 'values of their own'),
    (dict(labels={'x': 1, 'class_1': 2, 'class_2': 3}, label_values=[1, 2, 3]), 'a background of 0'), (dict(normalization=[]), '0 schemes for 1 channel'), (dict(normalization=[dict(scheme='none')]), "scheme is 'none' instead of 'ct' or 'zscore'"),
    (dict(normalization=[dict(scheme='zscore', inside_nonzero=1)]), 'inside_nonzero is 1'), (dict(normalization=[dict(scheme='ct', lower=2, upper=1, mean=0, sd=1)]), 'lower 2 above upper 1'), (dict(normalization=[dict(scheme='ct', lower=0, upper=1, mean=0, sd=-1)]), 'sd is -1'),
    (dict(normalization=[dict(scheme='ct', lower=float('nan'), upper=1, mean=0, sd=1)]), 'lower is nan'), (dict(normalization=[dict(scheme=['ct'])]), "scheme is ['ct']"), (dict(one_component={'class_1': True}), 'one_component has the classes'), (dict(one_component={'class_1': 1, 'class_2': True}), 'true or false'),
    (dict(reasons=5), 'reasons is 5'), (dict(reasons={'3d.patch_size': 'because'}), "reasons['3d.patch_size'] is 'because'"), (dict(reasons={'3d.colour': dict(rule='', because='', numbers={}, tried=[])}), 'names no value of the plan'),
    (dict(edits={'3d.batch_size': -1}), 'setting 3d.batch_size: it is -1; it has to be a whole number from 1 to 4096'), (dict(edits=[]), 'edits is []'), (dict(models={}), 'it has the models []'), (dict(models=[]), 'models is []'), (dict(dim=2), "for 2D data"), (dict(version=True), 'version is True'), (dict(name=['x']), "name is ['x']"), (dict(hardware=None), 'hardware is None')])
def test_a_plan_that_does_not_agree(change, words):
    with pytest.raises(InputError) as e: Plan.from_dict({**plain(PLANS[0].to_dict()), **change}, 'mine.json')
    sentence(e, 'mine.json', words)

def test_a_model_cannot_be_called_a_path():
    d = plain(PLANS[0].to_dict()) | dict(reasons={}, edits={})
    for key, name, words in (('../../ESC/x', '3d', "models['../../ESC/x'] is called 3d"), ('../../ESC/x', '../../ESC/x', "name is '../../ESC/x'"), ('3d', '../../ESC/x', "name is '../../ESC/x'"), ('3d_cascade', '3d', 'models'), ('3d', '2d', 'dimension 3')):
        with pytest.raises(InputError) as e: Plan.from_dict({**d, 'models': {key: d['models']['3d'] | dict(name=name)}})
        sentence(e, words)

def test_a_model_needs_the_one_before_it():
    d = plain(next(p for p in PLANS if '3d_cascade' in p.models).to_dict())
    del d['models']['3d_lowres']; d['reasons'] = {}; d['edits'] = {}
    with pytest.raises(InputError, match='it has the models'): Plan.from_dict(d)

def test_a_plan_without_reasons_says_so():
    d = plain(PLANS[0].to_dict())
    del d['reasons']
    plan = Plan.from_dict(d)
    assert 'the file gives no reason' in plan.why('spacing') and not diff(plan, plan) and diff(plan, make_plan(FINGERPRINTS[0], 'cpu', ['spacing=2,2,2'])).differences

def test_names_from_elsewhere_are_text():
    d = plain(PLANS[0].to_dict()) | dict(name='<script>a</script>')
    d['reasons']['3d.patch_size']['because'] = '<img src=x onerror=a>'
    shown = Plan.from_dict(d)._repr_markdown_()
    assert '<script' not in shown and '<img' not in shown and '&lt;img src=x' in shown

def test_a_model_file_with_an_absurd_network():
    "As it stands beside weights, from where it is read directly"
    c = plain(PLANS[1].to_dict())['models']['3d']
    assert ModelConfig(**c).name == '3d'
    for change in (dict(features_per_stage=[10**6] * len(c['features_per_stage'])), dict(patch_size=[10**6] * 3), dict(spacing=[1e-9] * 3), dict(batch_size=10**9), dict(classes='2'), dict(patch_size=None), dict(kernel_sizes=3)):
        with pytest.raises(InputError) as e: ModelConfig(**c | change)
        sentence(e, "model '3d'")

@pytest.mark.parametrize('edits', [{'3d.patch_size': [4096] * 3}, {'3d.features_per_stage': 2048, '3d.patch_size': [512] * 3}, {'2d.batch_size': 4096, '2d.features_per_stage': 2048}])
def test_what_is_too_large_by_hand_is_still_answered_with_what_fits(edits):
    with pytest.raises(InputError, match='the nearest that fits is') as e: make_plan(FINGERPRINTS[0], 'gpu-12gb', edits)
    sentence(e)

# --- shapes at the edge of what a fingerprint may hold

def one_by_one(median_shape, spacing, voxels, max_pools=None):
    "`fit_patch` that never leaps"
    shape, tried = proportional_shape(median_shape, voxels), []
    while True:
        pool = pooling(shape, spacing, max_pools)
        size = pad_to_pools(shape, pool.num_pool_per_axis)
        if math.prod(size) <= voxels: return Patch(size, pool, tuple(tried))
        axis = max(range(len(size)), key=lambda i: size[i] / median_shape[i] if size[i] > 1 else 0)
        shape = list(size); shape[axis] = max(1, size[axis] - 2**pool.num_pool_per_axis[axis])
        tried.append(f'{shape_text(size)} has {math.prod(size):,} voxels, more than {voxels:,}: axis {axis} is cut to {shape[axis]}')

axis = st.integers(1, 700) | st.integers(1, 4) | st.integers(1, 100_000)
@settings(max_examples=1000, deadline=None)
@given(st.lists(axis, min_size=2, max_size=3), st.lists(st.floats(.1, 9), min_size=3, max_size=3), st.sampled_from([128**3, 48**3, 21 * 2**16, 5000, 100]))
def test_leaping_finds_the_same_patch(shape, spacing, voxels):
    a, b = one_by_one(shape, spacing[:len(shape)], voxels), fit_patch(shape, spacing[:len(shape)], voxels)
    assert (a.size, a.pooling) == (b.size, b.pooling)
    assert a == b or len(a.tried) > 50

@pytest.mark.parametrize('hardware', ['cpu', 'gpu-12gb', '1GB'])
@pytest.mark.parametrize('shape,spacing', [((1, 1, 10**9), (1, 1, 1)), ((100_000, 2, 3), (1, 1, 1)), ((3, 100_000, 4), (1e-6, 1e-6, 1e4)), ((1, 1, 100_000), (1, 1, 1)), ((100_000,) * 3, (1e-6, 1, 1e4)), ((100_000, 2, 1), (5e-5, 3e-5, 1.9))])
def test_strips_are_planned_soon(shape, spacing, hardware, monkeypatch):
    "Pooling is counted hundreds of times, not millions"
    counted = []
    monkeypatch.setattr(rules, 'pooling', lambda *a: counted.append(a) or pooling(*a))
    try: make_plan(sketch_fingerprint(shape, spacing, 2), hardware)
    except InputError as e: assert '\n' not in str(e)
    assert 0 < len(counted) < 100_000

"Plans over many generated fingerprints: their networks run, they fit, what would change them does, and what is set by hand is kept or refused."
import math, re
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.planning.planner import diff, planned_values
from autounet_nb.planning.what_if import explain, with_one_changed, what_if
from autounet_nb.planning.memory import count_weights, training_memory
from autounet_nb.planning.design import dataset_statistics
from autounet_nb.planning.planner import decide, make_plan
from autounet_nb.planning.rules import read_hardware, sketch_fingerprint
from autounet_nb.planning.config import read_edits
from autounet_nb.training.unet import build_unet

shapes = st.one_of(st.tuples(st.integers(5, 40), st.integers(16, 400), st.integers(16, 400)), # slices
                   st.tuples(st.integers(8, 600), st.integers(8, 600), st.integers(8, 600)),
                   st.tuples(st.just(1), st.integers(16, 900), st.integers(16, 900)), # pictures
                   st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))) # tiny
spacings = st.tuples(st.floats(.3, 8), st.floats(.2, 3), st.floats(.2, 3))

def forward_and_backward(c, device):
    "One step of the network of a plan; the shape of what comes out"
    with torch.device(device):
        net = build_unet(c)
        out = net(torch.zeros(c.batch_size, c.in_channels, *c.patch_size))
    assert out.shape == (c.batch_size, c.classes, *c.patch_size)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == count_weights(c)

@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shapes, spacings, st.integers(1, 500), st.integers(1, 4), st.one_of(st.integers(1, 5), st.integers(100, 300)), st.sampled_from(['cpu', 'gpu-12gb', '4GB', '24GB']), st.data())
def test_every_plan_runs_fits_and_answers(shape, spacing, n, channels, classes, hardware, data):
    "A network of the plan goes forwards and backwards, a step fits the memory, and every answer to 'what would change it' holds"
    fp, hw = sketch_fingerprint(shape, spacing, n, ['MRI'] * channels, classes), read_hardware(hardware)
    plan = make_plan(fp, hardware)
    assert all(sum(training_memory(c, hw.precision).values()) <= hw.memory for c in plan.models.values())
    c = plan.models[data.draw(st.sampled_from(sorted(plan.models)))]
    forward_and_backward(c, 'meta')
    if math.prod(c.patch_size) * c.batch_size * c.features_per_stage[0] < 60_000 and count_weights(c) < 3e6: forward_and_backward(c, 'cpu')
    key = data.draw(st.sampled_from(sorted(planned_values(plan))))
    for change in what_if(fp, plan, key):
        assert planned_values(plan)[change.key] == change.value
        facts, other = with_one_changed(dataset_statistics(fp), hardware, change.fact, change.new)
        assert planned_values(decide(facts, other)).get(change.key) == change.becomes != change.value, str(change)

def test_a_change_is_the_nearest():
    "One case fewer than said, one voxel fewer than said: the value is still the same"
    fp = sketch_fingerprint((36, 50, 35), n=260, classes=2)
    plan, facts = make_plan(fp, 'gpu-12gb'), dataset_statistics(fp)
    checked = 0
    for c in what_if(fp, plan, '3d.'):
        if c.fact != 'cases' and not c.fact.startswith('median_shape'): continue
        nearer = c.new + (1 if c.new < c.old else -1)
        assert nearer == c.old or planned_values(decide(*with_one_changed(facts, 'gpu-12gb', c.fact, nearer)))[c.key] == c.value
        checked += 1
    assert checked > 5
    assert '\n        with 11 more cases (271): 10\n' in explain(fp, plan, '3d.batch_size')

axes = lambda low, high: st.lists(st.integers(low, high), min_size=3, max_size=3)
edits = st.fixed_dictionaries({}, optional={'3d.patch_size': axes(1, 300), '3d.batch_size': st.integers(1, 64), '3d.features_per_stage': st.integers(1, 200), '3d.num_pool_per_axis': axes(0, 6), '3d.batch_dice': st.booleans(),
                                            'cases': st.integers(1, 900), 'cascade': st.sampled_from(['yes', 'no']), 'normalization': st.sampled_from(['ct', 'zscore', 'nonzero'])})

@settings(max_examples=150, deadline=None)
@given(edits, st.sampled_from(['cpu', 'gpu-12gb']))
def test_what_is_set_by_hand_is_kept_or_refused_with_what_works(edits, hardware):
    fp = sketch_fingerprint((96, 160, 160), (2, 1, 1), n=40, classes=3)
    advised = dict(edits)
    try: plan = make_plan(fp, hardware, advised)
    except InputError as e:
        assert '\n' not in str(e)
        ways = [re.findall(r'(3d\w*\.\w+)=([\d,]+)', way) for way in str(e).split(' or ')]
        assert all(way and all(k in edits for k, _ in way) for way in ways), str(e)
        for way in ways: # each leads to a plan at once
            advised = edits | {key: [int(v) for v in value.split(',')] if ',' in value else int(value) for key, value in way}
            plan = make_plan(fp, hardware, advised)
    if advised != edits: return
    c = plan.models['3d']
    if '3d.patch_size' in edits: assert all(p >= q and p - q < 2**k for p, q, k in zip(c.patch_size, edits['3d.patch_size'], c.num_pool_per_axis)), 'padded to what pooling needs, and no more'
    if '3d.batch_size' in edits: assert c.batch_size == edits['3d.batch_size']
    if '3d.features_per_stage' in edits: assert c.features_per_stage[0] == edits['3d.features_per_stage']
    if '3d.num_pool_per_axis' in edits: assert all(a <= b for a, b in zip(c.num_pool_per_axis, edits['3d.num_pool_per_axis']))
    if '3d.batch_dice' in edits: assert c.batch_dice == edits['3d.batch_dice']
    assert ('3d_cascade' in plan.models) == (edits['cascade'] == 'yes') if 'cascade' in edits else True
    assert plan.edits == read_edits(edits) and ('set by hand' in repr(plan)) == bool(edits)
    assert all(plan.reasons[k]['rule'] == 'set by hand' for k in edits if k in plan.reasons)
    assert make_plan(fp, hardware, plan.edits).to_dict() == plan.to_dict()

@pytest.mark.parametrize('edits', [{'3d.patch_size': [160, 160, 160], '3d.batch_size': 2}, {'3d.batch_size': 60}, {'3d.features_per_stage': 240, '3d.patch_size': [40, 56, 40], '3d.batch_size': 30}, {'3d.patch_size': [512] * 3, '3d_cascade.batch_size': 3}])
def test_advice_holds_for_both_models_that_take_a_setting(edits):
    "150 classes: what fits the 3D network does not fit the cascade's second stage, which has as many channels more"
    fp = sketch_fingerprint((36, 50, 35), n=260, classes=150)
    edits = {'cascade': 'yes', **edits}
    with pytest.raises(InputError) as e: make_plan(fp, 'gpu-12gb', edits)
    ways = dict(re.findall(r'(3d\w*\.\w+)=([\d,]+)', str(e.value)))
    assert ways and all(k in edits and k.startswith('3d.') for k in ways), str(e.value)
    for key, value in ways.items(): assert make_plan(fp, 'gpu-12gb', read_edits({**edits, key: value})).edits[key] == read_edits([f'{key}={value}'])[key]

def test_what_is_set_for_the_second_stage_is_called_by_its_name():
    fp = sketch_fingerprint((36, 50, 35), n=260, classes=20)
    with pytest.raises(InputError, match='^3d_cascade: a training step .* fits is 3d_cascade.batch_size=81$'): make_plan(fp, 'gpu-12gb', {'cascade': 'yes', '3d.batch_size': 83, '3d_cascade.batch_size': 500})
    with pytest.raises(InputError, match='^3d_cascade: a training step .* fits is 3d.batch_size=81$'): make_plan(fp, 'gpu-12gb', {'cascade': 'yes', '3d.batch_size': 83})
    with pytest.raises(InputError, match='^3d.features_per_stage: it has 4 numbers, and the network of 3d_cascade has 2 levels'): make_plan(fp, 'gpu-12gb', {'cascade': 'yes', '3d.features_per_stage': [8, 9, 10, 11], '3d_cascade.num_pool_per_axis': 1})

def test_an_edited_plan_keeps_what_was_not_edited():
    fp = sketch_fingerprint((96, 160, 160), (2, 1, 1), n=40, classes=3)
    a, b = make_plan(fp, 'gpu-12gb'), make_plan(fp, 'gpu-12gb', ['2d.batch_size=3'])
    assert {d.key for d in diff(a, b).differences} == {'2d.batch_size'} and diff(a, b).redo == ('train 2d',)
    assert a.models['3d'] == b.models['3d'] and not a.edits and b.edits == {'2d.batch_size': 3}

def test_hypothetical_cases_are_like_real_ones():
    few, many = (sketch_fingerprint((36, 50, 35), n=n, classes=2) for n in (30, 260))
    assert make_plan(few, 'gpu-12gb', {'cases': 260}).models == make_plan(many, 'gpu-12gb').models != make_plan(few, 'gpu-12gb').models

@pytest.mark.parametrize('text,words', [('3d.patch_size=64,64', '3 whole numbers'), ('nothing', 'no setting'), ('3d.patch_size', '3 whole numbers'), ('3d.batch_size=0', 'from 1 to 4096'), ('3d.batch_size=1.5', 'whole number'),
                                        ('../x.patch_size=1,1,1', 'no setting'), ('spacing=nan,1,1', 'lengths'), ('3d.features_per_stage=1,2', 'one number per level'), ('3d_lowres.spacing=9,9,9', 'cascade=yes'), ('cases=1e9', 'whole number')])
def test_nonsense_is_refused_in_one_sentence(text, words):
    with pytest.raises(InputError, match=re.escape(words)) as e: make_plan(sketch_fingerprint((36, 50, 35), n=20), 'cpu', [text])
    assert '\n' not in str(e.value)

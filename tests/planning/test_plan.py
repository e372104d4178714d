"The planner against the paper's reference values, and its properties over many generated fingerprints."
import json, math
import pytest
from hypothesis import given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.core.text import shape_text
from autounet_nb.planning.memory import training_memory
from autounet_nb.planning.plan import Plan
from autounet_nb.planning.planner import make_plan
from autounet_nb.planning.rules import HARDWARE, MAX_FEATURES, MAX_POOLS, MIN_BATCH, lowres, needs_cascade, pooling, sketch_fingerprint

REFERENCE = [ # dataset, median shape, spacing, cases, median shape of the first stage
    ('Heart', (115, 320, 232), (1.37, 1.25, 1.25), 20, (58, 160, 116)),
    ('Liver', (482, 512, 512), (1., .77, .77), 131, (121, 128, 128)),
    ('Lung', (252, 512, 512), (1.24, .785, .785), 64, (126, 256, 256)),
    ('Pancreas', (96, 512, 512), (2.5, .8, .8), 282, (96, 256, 256)),
    ('BrainTumour', (138, 169, 138), (1, 1, 1), 484, None),
    ('Prostate', (20, 320, 319), (3.6, .625, .625), 32, None),
    ('Hippocampus', (36, 50, 35), (1, 1, 1), 260, None)]

@pytest.mark.parametrize('name,shape,spacing,n,stage_1', REFERENCE)
def test_reference_table(name, shape, spacing, n, stage_1):
    plan = make_plan(sketch_fingerprint(shape, spacing, n), 'gpu-12gb')
    assert ('3d_cascade' in plan.models) == ('3d_lowres' in plan.models) == (stage_1 is not None)
    if stage_1: assert plan.models['3d_lowres'].median_shape == stage_1
    assert plan.models['3d'].batch_dice == bool(stage_1)

def test_hippocampus():
    m = make_plan(sketch_fingerprint((36, 50, 35), n=260, classes=2), 'gpu-12gb').models
    assert (m['2d'].patch_size, m['2d'].batch_size, m['2d'].num_pool_per_axis) == ((56, 40), 366, (3, 3))
    assert (m['3d'].patch_size, m['3d'].batch_size, m['3d'].num_pool_per_axis) == ((40, 56, 40), 9, (3, 3, 3))
    assert m['3d'].features_per_stage == (30, 60, 120, 240) and m['3d'].classes == 3

shapes = st.tuples(st.integers(1, 700), st.integers(8, 700), st.integers(8, 700))
spacings = st.tuples(st.floats(.3, 8), st.floats(.2, 3), st.floats(.2, 3))

@settings(max_examples=300, deadline=None)
@given(shapes, spacings, st.integers(1, 400), st.sampled_from(sorted(HARDWARE)), st.integers(1, 4), st.integers(1, 5))
def test_every_plan_keeps_the_rules(shape, spacing, n, hardware, channels, classes):
    fp = sketch_fingerprint(shape, spacing, n, modalities=['MRI'] * channels, classes=classes)
    plan, hw = make_plan(fp, hardware), HARDWARE[hardware]
    assert set(plan.models) - {'3d_lowres', '3d_cascade'} == ({'2d'} if shape[0] == 1 else {'2d', '3d'})
    assert ('3d_cascade' in plan.models) == (shape[0] > 1 and math.prod(shape) > 4 * hw.step_3d // 2)
    for c in plan.models.values():
        step = hw.step_2d if c.dim == 2 else hw.step_3d
        seen = [i for i in range(3) if i != c.slice_axis]
        assert math.prod(c.patch_size) * MIN_BATCH <= step, 'two patches must fit'
        five_percent = math.floor(.05 * n * math.prod(c.median_shape) / math.prod(c.patch_size) + .5)
        assert sum(training_memory(c, hw.precision).values()) <= hw.memory, 'a step fits the hardware'
        by_rule = max(2, min(step // math.prod(c.patch_size), five_percent))
        if plan.reasons[f'{c.name}.batch_size']['tried']: # the rules asked for more memory than there is, and smaller steps were tried
            assert c.batch_size <= by_rule and 'would take' in plan.why(f'{c.name}.batch_size')
        else: assert c.batch_size == by_rule
        assert all(p % 2**k == 0 for p, k in zip(c.patch_size, c.num_pool_per_axis))
        assert max(c.num_pool_per_axis) <= MAX_POOLS[c.dim]
        bottom = [p // 2**k for p, k in zip(c.patch_size, c.num_pool_per_axis)]
        assert all(b >= 4 for b, k in zip(bottom, c.num_pool_per_axis) if k), 'no axis is halved below 4 voxels'
        if math.prod(c.median_shape[i] for i in seen) <= step // 2 and not plan.reasons[f'{c.name}.patch_size']['tried']:
            assert all(p >= c.median_shape[i] for p, i in zip(c.patch_size, seen)), 'what fits is seen whole'
        assert c.features_per_stage == tuple(min(hw.base_features * 2**l, MAX_FEATURES[c.dim]) for l in range(len(c.strides)))
        assert tuple(math.prod(s) for s in zip(*c.strides)) == tuple(2**p for p in c.num_pool_per_axis)
        assert all(a <= b for low, high in zip(c.kernel_sizes, c.kernel_sizes[1:]) for a, b in zip(low, high)), 'an axis that is convolved stays so'
        assert all(k == 3 for level, s in zip(c.kernel_sizes, c.strides[1:]) for k, st_ in zip(level, s) if st_ == 2), 'an axis is pooled only where it is convolved'
        assert c.in_channels == channels + (classes if c.name == '3d_cascade' else 0) and c.classes == classes + 1
        if c.dim == 2: assert c.spacing[c.slice_axis] == max(c.spacing) or shape[0] == 1
    if '3d_lowres' in plan.models:
        low, full = plan.models['3d_lowres'], plan.models['3d']
        assert not needs_cascade(low.median_shape, hw.step_3d // 2)
        assert all(abs(math.log2(b / a) - round(math.log2(b / a))) < 1e-9 for a, b in zip(full.spacing, low.spacing)), 'steps of two'
        assert not low.batch_dice and full.batch_dice
        assert plan.models['3d_cascade'].patch_size == full.patch_size or 'would take' in plan.why('3d_cascade.batch_size') # its additional channels take memory, too
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()
    fields = ('patch_size', 'batch_size', 'num_pool_per_axis', 'kernel_sizes', 'features_per_stage', 'batch_dice')
    assert {f'{m}.{f}' for m in plan.models for f in fields} <= set(plan.reasons)
    assert all(k in plan.why() for k in plan.reasons)
    assert plan.why('spacing').startswith(f'spacing = {shape_text(round(s, 3) for s in plan.models["2d"].spacing)}\n') and plan.why('cascade').startswith(f'cascade = {"yes" if "3d_lowres" in plan.models else "no"}')

@given(st.lists(st.integers(1, 600), min_size=2, max_size=3))
def test_equal_spacing_pools_down_to_4_to_7(shape):
    p = pooling(shape, [1.] * len(shape))
    for s, k in zip(shape, p.num_pool_per_axis):
        if s < 8: assert k == 0
        elif k < MAX_POOLS[len(shape)]: assert 4 <= s / 2**k < 8
    assert all(k == 3 for level in p.kernel_sizes for k in level)

def test_thick_slices_wait():
    p = pooling((40, 256, 256), (5, 1, 1))
    assert p.kernel_sizes[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3)) # 5 mm against 1, 2 and 4
    assert p.strides[:4] == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))

def test_finer_axes_are_coarsened_alone_first():
    low = lowres((60, 512, 512), (4, 1, 1), 128**3 // 8)
    assert low.spacing == (4, 4, 4) and low.median_shape == (60, 128, 128)

def test_normalization_follows_the_modality_and_the_crop():
    plan = make_plan(sketch_fingerprint((40, 40, 40), modalities=('T1', 'PET-CT', 'CTA'), cropped=.7), 'cpu')
    assert [n['scheme'] for n in plan.normalization] == ['zscore', 'ct', 'ct']
    assert plan.normalization[0]['inside_nonzero'] is True
    assert make_plan(sketch_fingerprint((40, 40, 40), cropped=.9), 'cpu').normalization[0]['inside_nonzero'] is False

@pytest.mark.parametrize('change,message', [
    ({'patch_size': [40, 56, 41]}, 'multiple of 8'), ({'batch_size': 0}, 'batch_size is 0 instead of a whole number'), ({'features_per_stage': [1, 2]}, 'one entry per level'),
    ({'kernel_sizes': [[3, 3, 3]] * 3 + [[5, 3, 3]]}, r'kernel_sizes\[3\]\[0\] is 5 instead of 1 or 3'), ({'dice': 'mean'}, 'dice'), ({'num_pool_per_axis': [1, 1, 1]}, r'divide the axes by \[8, 8, 8\], num_pool_per_axis is \(1, 1, 1\)'), ({'num_pool_per_axis': [1, 1]}, 'do not have 3 axes'),
    ({'spacing': [0, 1, 1]}, r'spacing\[0\] is 0 instead of a number from'), ({'spacing': [1e-9, 1, 1]}, r'spacing\[0\] is 1e-09'), ({'features_per_stage': [10**9, 1, 1, 1]}, r'features_per_stage\[0\] is 1000000000 instead of a whole number'),
    ({'features_per_stage': [4096] * 4}, 'weights, more than'), ({'patch_size': [4096] * 3}, 'a training step would take .* TB|a training step would take .* GB, more than'), ({'batch_size': True}, 'batch_size is True'), ({'patch_size': 5}, 'patch_size is 5 instead of a list'),
    ({'slice_axis': 0}, 'a 3D model has none'), ({'stage': 'lowres'}, 'sees stage lowres'), ({'name': '2d'}, 'has dimension 3|is called'), ({'name': '../x'}, "name is '../x'"), ({'median_shape': [10**6] * 3}, 'median_shape'),
    ({'in_channels': 2}, 'in_channels 2'), ({'classes': 5}, 'classes 5'), ({'spacing': [2, 1, 1]}, 'different spacing'), ({'features_per_stage': [1] * 33, 'strides': [[1] * 3] * 33, 'kernel_sizes': [[3] * 3] * 33, 'num_pool_per_axis': [0] * 3}, '33 levels')])
def test_a_plan_that_cannot_work_is_refused(change, message):
    d = json.loads(json.dumps(make_plan(sketch_fingerprint((36, 50, 35), n=260), 'gpu-12gb').to_dict()))
    d['models']['3d'] |= change
    with pytest.raises(InputError, match=message): Plan.from_dict(d)

def test_a_file_that_is_no_plan_is_refused(tmp_path):
    for text, message in (('[]', 'not a plan'), ('{}', 'it lacks'), ('{"version"', 'JSON')):
        (tmp_path/'p.json').write_text(text)
        with pytest.raises(InputError, match=message): Plan.load(tmp_path/'p.json')

def test_memory_steps_in_only_where_the_rules_ask_for_too_much():
    "Hundreds of classes: a smaller step; the reference datasets: as before"
    few, many = (make_plan(sketch_fingerprint((200, 300, 300), n=50, classes=k), 'gpu-12gb') for k in (3, 900))
    assert math.prod(many.models['3d'].patch_size) < math.prod(few.models['3d'].patch_size)
    assert not few.reasons['3d.batch_size']['tried'] and many.reasons['3d.batch_size']['tried']
    hw = HARDWARE['gpu-12gb']
    assert all(sum(training_memory(c, hw.precision).values()) <= hw.memory for c in many.models.values())

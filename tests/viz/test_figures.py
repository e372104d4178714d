"The pictures of datasets and plans say what the numbers say, for datasets of very different kinds."
import io, math
import numpy as np
import pytest
from dataclasses import replace
import matplotlib.pyplot as plt
from autounet_nb.core.errors import InputError
from autounet_nb.data.cases import read_case
from autounet_nb.viz.dataset import plot_fingerprint, plot_intensities, plot_montage
from autounet_nb.viz.plan import plot_cascade, plot_patch, plot_plan, plot_step, plot_unet
from autounet_nb.planning.fingerprint import Fingerprint
from autounet_nb.viz.dataset import gray_window
from autounet_nb.data.phantom import make_phantoms
from autounet_nb.core.text import shape_text
from autounet_nb.planning.memory import training_memory
from autounet_nb.planning.planner import make_plan
from autounet_nb.planning.rules import HARDWARE, coarsest_axis, sketch_fingerprint

KINDS = dict(
    heads=dict(shape=(36, 50, 35), n=260, classes=2),
    pictures=dict(shape=(1, 520, 696), n=60, modalities=('R', 'G', 'B')),
    thick=dict(shape=(20, 320, 319), spacing=(3.6, .625, .625), n=32),
    sagittal=dict(shape=(320, 319, 20), spacing=(.625, .625, 3.6), n=32),
    tiny=dict(shape=(6, 7, 5), n=3),
    huge=dict(shape=(482, 512, 512), spacing=(1, .77, .77), n=131, modalities=('CT',), classes=2),
    one_case=dict(shape=(40, 60, 50), n=1),
    many_classes=dict(shape=(90, 110, 90), spacing=(1.5, 1, 1), n=50, classes=30, modalities=('T1', 'T2', 'FLAIR', 'T1c')),
    cropped=dict(shape=(100, 150, 120), n=40, cropped=.5),
    microscopy=dict(shape=(60, 900, 900), spacing=(.002, .0005, .0005), n=8))
FINGERPRINTS = {k: sketch_fingerprint(name=k, **kw) for k, kw in KINDS.items()}
PLANS = {(k, hw): make_plan(fp, hw) for k, fp in FINGERPRINTS.items() for hw in ('gpu-12gb', 'cpu')}
kinds = pytest.mark.parametrize('fp', FINGERPRINTS.values(), ids=FINGERPRINTS)
plans = pytest.mark.parametrize('plan', PLANS.values(), ids=['-'.join(k) for k in PLANS])

@pytest.fixture(autouse=True)
def no_figure_is_kept():
    yield
    assert not plt.get_fignums(), 'a figure was left to pyplot, which never forgets one'

def texts(ax): return [t.get_text() for t in ax.texts if t.get_text()]

def inside(fig):
    "Draws a figure, and asserts that no text of it is cut off"
    fig.savefig(io.BytesIO(), format='png')
    width, height = fig.canvas.get_width_height()
    for ax in fig.axes:
        for t in ax.texts:
            if not t.get_text().strip(): continue
            b = t.get_window_extent()
            assert b.x0 > -2 and b.y0 > -2 and b.x1 < width + 2 and b.y1 < height + 2, f'{t.get_text()!r} is cut off'
    return fig

def apart(ax):
    "Asserts that no two texts of some axes lie on each other"
    boxes = [(t.get_text(), t.get_window_extent()) for t in ax.texts if t.get_text().strip()]
    for i, (a, p) in enumerate(boxes):
        for b, q in boxes[i + 1:]:
            assert not (p.x0 < q.x1 - 1 and q.x0 < p.x1 - 1 and p.y0 < q.y1 - 1 and q.y0 < p.y1 - 1), f'{a!r} and {b!r} overlap'

# ---- a dataset

@kinds
def test_fingerprint_shows_each_case_channel_and_class(fp, tmp_path):
    fp.save(tmp_path/'fingerprint.json')
    fig = inside(plot_fingerprint(Fingerprint.load(tmp_path/'fingerprint.json'))) # it needs nothing else
    shapes, spacings, *channels, volumes = fig.axes
    axes = [1, 2] if fp.dim == 2 else [0, 1, 2]
    assert [t.get_text() for t in shapes.get_yticklabels()] == ['zyx'[i] for i in axes]
    dots = lambda ax, color: [sorted(l.get_xdata()) for l in ax.lines if l.get_color() == color and l.get_marker() == '.']
    assert dots(shapes, 'C0') == [sorted(c['cropped_shape'][i] for c in fp.cases) for i in axes]
    assert dots(spacings, 'C0') == [sorted(c['spacing'][i] for c in fp.cases) for i in axes]
    assert dots(shapes, '.7') == ([sorted(c['shape'][i] for c in fp.cases) for i in axes] if fp.size_ratio < 1 else [])
    assert shapes.get_xlim()[0] == spacings.get_xlim()[0] == 0
    assert len(channels) == len(fp.modalities)
    for ax, s in zip(channels, fp.intensities):
        (bar,), line = ax.patches, ax.lines[0]
        assert (bar.get_x(), bar.get_width()) == (s['mean'] - s['sd'], 2 * s['sd'])
        assert list(line.get_xdata()) == [s['p00_5'], s['p99_5']]
        assert ax.get_xlim()[0] < s['p00_5'] and ax.get_xlim()[1] > s['p99_5']
    assert [b.get_width() for b in volumes.patches] == list(fp.class_voxels.values())
    assert [t.get_text().strip() for t in volumes.texts] == [f'{n:,}' for n in fp.class_voxels.values()]

def test_fingerprint_of_a_thousand_unequal_cases_and_an_absent_class():
    rng, fp = np.random.default_rng(0), sketch_fingerprint((90, 110, 90), n=1000, classes=40)
    for c in fp.cases: c |= dict(shape=[200] * 3, cropped_shape=rng.integers(20, 200, 3).tolist(), spacing=rng.uniform(.5, 5, 3).tolist())
    fp.class_voxels['class_7'] = 0
    fig = inside(plot_fingerprint(fp))
    assert sum(len(l.get_xdata()) for l in fig.axes[1].lines if l.get_marker() == '.') == 3000
    apart(fig.axes[-1])
    medians = [l.get_xdata()[0] for l in fig.axes[1].lines if l.get_marker() != '.']
    assert np.allclose(medians, fp.median_spacing)

@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp('explore')
    return dict(heads=make_phantoms(root/'heads', n=9, shape=(12, 40, 32), spacing=(4, 1, 1), channels=2, seed=1),
                sagittal=make_phantoms(root/'sagittal', n=2, shape=(32, 40, 12), spacing=(1, 1, 4), seed=1),
                ct=make_phantoms(root/'ct', n=3, shape=(20, 48, 48), modality='CT', seed=2, classes=6),
                pictures=make_phantoms(root/'pictures', n=5, dim=2, shape=(60, 48), channels=3, layout='pairs', seed=3),
                one=make_phantoms(root/'one', n=1, shape=(12, 40, 32)))

@pytest.mark.parametrize('name,most', [('heads', 8), ('heads', 2), ('ct', 8), ('pictures', 4), ('one', 8), ('sagittal', 8)])
def test_montage(datasets, name, most):
    data = datasets[name]
    fig = inside(plot_montage(data, most))
    assert len(fig.axes) == min(most, len(data)), 'a panel per case'
    assert len({ax.get_xlim() for ax in fig.axes}) == len({ax.get_ylim() for ax in fig.axes}) == 1, 'all to one scale'
    assert all(ax.get_aspect() == 1 for ax in fig.axes)
    titles = [ax.get_title() for ax in fig.axes]
    assert len(set(titles)) == len(titles) and (titles[0], titles[-1]) == (data[0].id, data[len(data) - 1].id)
    shown = [read_case(data[name]) for name in titles]
    cut = coarsest_axis(np.median([s.geometry.spacing for s in shown], axis=0)) if name != 'pictures' else 0 # as the 2D network's slices
    assert name != 'sagittal' or cut == 2
    for ax, s in zip(fig.axes, shown):
        r, k = [a for a in range(3) if a != cut]
        per_slice = (s.label > 0).sum((r, k))
        image = np.asarray(ax.images[0].get_array())
        i = int(per_slice.argmax())
        assert np.array_equal(image, s.image[0].take(i, cut)), 'the slice with most foreground'
        left, right, bottom, top = ax.images[0].get_extent()
        assert np.allclose((right - left, bottom - top), (s.label.shape[k] * s.geometry.spacing[k], s.label.shape[r] * s.geometry.spacing[r])), 'in mm'
        y = s.label.take(i, cut)
        assert len(ax.collections) == len(np.unique(y[y > 0])), 'a contour per class'
        paths = np.concatenate([p.vertices for c in ax.collections for p in c.get_paths()])
        rows, cols = np.nonzero(y)
        mm = [s.geometry.spacing[a] for a in (r, k)]
        assert np.allclose((paths[:, 0].min() - left, paths[:, 0].max() - left), (cols.min() * mm[1], (cols.max() + 1) * mm[1]), atol=mm[1] + 1e-6)
        assert np.allclose((paths[:, 1].min() - top, paths[:, 1].max() - top), (rows.min() * mm[0], (rows.max() + 1) * mm[0]), atol=mm[0] + 1e-6)

@pytest.mark.parametrize('name,most', [('heads', 4), ('ct', 8), ('pictures', 2), ('one', 8)])
def test_intensities(datasets, name, most):
    data = datasets[name]
    cases, channels = min(most, len(data)), read_case(data[0]).image.shape[0]
    fig = inside(plot_intensities(data, most))
    assert len(fig.axes) == cases * channels
    for j, ax in enumerate(fig.axes[:cases]):
        s = read_case(data[ax.get_title()])
        for i in range(channels):
            stairs = fig.axes[i * cases + j].patches
            assert len(stairs) == len(np.unique(s.label))
            for k, drawn in zip(np.unique(s.label), stairs):
                values, edges, _ = drawn.get_data()
                v = s.image[i][s.label == k]
                assert np.isclose(values.sum(), ((v >= edges[0]) & (v <= edges[-1])).mean())
                assert k == 0 or values.sum() > .5, 'the classes are in view'
                assert (drawn.get_linewidth() < 1) == (k == 0), 'background is thin'

def test_datasets_without_masks_or_cases(datasets):
    blank = replace(datasets['heads'], cases=tuple(replace(c, label=None) for c in datasets['heads']))
    assert [len(ax.collections) for ax in plot_montage(blank, 2).axes] == [0, 0]
    assert [len(ax.patches) for ax in plot_intensities(blank, 2).axes] == [1] * 4
    for plot in (plot_montage, plot_intensities):
        with pytest.raises(InputError, match='at least one'): plot(replace(blank, cases=()))
        with pytest.raises(InputError, match='at least one'): plot(blank, most=0)
    assert gray_window(np.array([-1000., 40])) == (-160, 240)

# ---- a plan

def in_mm(c):
    patch = list(c.patch_size) if c.dim == 3 else [*c.patch_size[:c.slice_axis], 1, *c.patch_size[c.slice_axis:]]
    return np.multiply(patch, c.spacing)

@plans
def test_patch_is_drawn_to_scale(plan):
    fig = inside(plot_patch(plan))
    assert len(fig.axes) == len(plan.models)
    for ax, c in zip(fig.axes, plan.models.values()):
        z, y, x = in_mm(c)
        rects = [p for p in ax.patches if p.get_gid() == 'patch_size']
        assert np.allclose([(p.get_height(), p.get_width()) for p in rects], [(y, x), (z, x), (z, y)][:1 if c.median_shape[0] == 1 else 3])
        assert ax.get_aspect() == 1
        lit = [p.get_linewidth() > 1.2 for p in rects]
        assert lit == [c.dim == 3 or axis == c.slice_axis for axis in range(3)][:len(rects)], 'one plane of a 2D network is lit'
        cases = [p for p in ax.patches if p.get_gid() != 'patch_size']
        for p, q in zip(rects, cases): # around the same point
            assert np.allclose(p.get_center(), q.get_center())
        assert f'{c.name}: {shape_text(c.patch_size)} voxels' in ax.get_title()
        for i in range(3):
            if i != c.slice_axis: assert f'{in_mm(c)[i]:.3g}' in ax.get_title().partition('=')[2]
        corners = np.array([p.get_window_extent().extents for p in ax.patches])
        assert corners.min() > 0 and corners[:, 2].max() < fig.bbox.width, 'nothing is cut off'
        mm = float(next(t for t in texts(ax) if t.endswith('mm')).split()[0])
        assert np.isclose(np.ptp(ax.lines[0].get_xdata()), mm), 'the ruler is as long as it says'

def test_patch_on_a_scan(datasets):
    s = read_case(datasets['heads'][0])
    plan = make_plan(FINGERPRINTS['heads'], 'cpu')
    fig = inside(plot_patch(plan, s.image[0], s.geometry.spacing))
    z, y, x = np.multiply(s.label.shape, s.geometry.spacing)
    for ax in fig.axes:
        sizes = [(e[2] - e[3], e[1] - e[0]) for e in (i.get_extent() for i in ax.images)]
        assert np.allclose(sizes, [(y, x), (z, x), (z, y)])
        for image, rect in zip(ax.images, [p for p in ax.patches if p.get_gid() == 'patch_size']):
            left, right, bottom, top = image.get_extent()
            assert np.allclose(rect.get_center(), ((left + right) / 2, (bottom + top) / 2))
    for image, spacing in ((s.image, s.geometry.spacing), (s.image[0], None)):
        with pytest.raises(InputError, match='give one channel'): plot_patch(plan, image, spacing)

CONFIGS = {f'{k}-{hw}-{c.name}': c for (k, hw), p in PLANS.items() for c in p.models.values()}

@pytest.mark.parametrize('c', CONFIGS.values(), ids=CONFIGS)
def test_unet_names_what_is_at_each_level(c):
    fig = inside(plot_unet(c))
    ax, = fig.axes
    apart(ax)
    levels, size = len(c.features_per_stage), np.array(c.patch_size)
    widths = []
    for l in range(levels):
        size = size // c.strides[l]
        boxes = [p for p in ax.patches if p.get_gid() == f'level {l}']
        assert len(boxes) == (1 if l == levels - 1 else 2), 'a box on each arm, and one at the bottom'
        y = boxes[0].get_center()[1]
        assert [t.get_text() for t in ax.texts if t.get_text() and abs(t.get_position()[1] - y) < 1e-6] == [f'{c.features_per_stage[l]} maps'] * len(boxes)
        assert np.isclose(boxes[0].get_height(), 1.4 * (np.prod(size) / math.prod(c.patch_size))**(1 / c.dim)), 'height as the size'
        waits = 1 in c.kernel_sizes[l]
        assert all((p.get_facecolor()[0] > p.get_facecolor()[2]) == waits for p in boxes), 'orange where an axis waits'
        assert shape_text(size.tolist()) in texts(ax)
        widths.append(boxes[0].get_width())
    assert np.allclose(np.divide(widths, widths[0]), np.divide(c.features_per_stage, c.features_per_stage[0])), 'width as the feature maps'
    for word, values in (('kernel', c.kernel_sizes), ('pool', c.strides[1:]), ('up', c.strides[1:])):
        assert [t for t in texts(ax) if t.startswith(word + ' ')] == [f'{word} {shape_text(v)}' for v in values]
    assert any(t.startswith(f'{c.in_channels} channel') for t in texts(ax)) and f'{c.classes} classes out' in texts(ax)
    arrows = [t for t in ax.texts if t.get_text() == '']
    assert len(arrows) == 3 * (levels - 1) + 2, 'down, up and across between levels, in and out'

def test_unets_are_of_all_depths(): assert {len(c.features_per_stage) for c in CONFIGS.values()} >= {1, 4, 5, 6, 7}

@plans
def test_step_is_what_the_plan_says(plan):
    fig, hw = inside(plot_step(plan)), HARDWARE[plan.hardware]
    assert len(fig.axes) == 2 * len(plan.models)
    for c, batch, memory in zip(plan.models.values(), fig.axes[::2], fig.axes[1::2]):
        bar, = batch.patches
        assert bar.get_x() == 0 and bar.get_width() == c.batch_size and batch.get_xlim()[0] == 0
        assert f'{c.batch_size * math.prod(c.patch_size):,} voxels' in batch.get_title('left')
        limits = {'fit the hardware': (hw.step_2d if c.dim == 2 else hw.step_3d) / math.prod(c.patch_size), 'are 5 % of the data': plan.reasons[f'{c.name}.batch_size']['numbers']['five_percent']}
        lines = {l.get_gid(): l.get_xdata()[0] for l in batch.lines}
        for name, v in limits.items():
            text = next(t for t in texts(batch) if name in t)
            if v <= batch.get_xlim()[1]: assert np.isclose(lines[name], v) and '→' not in text
            else: assert name not in lines and text.endswith('→')
            assert np.isclose(float(text.split()[0].replace(',', '')), v, rtol=.01, atol=.5 if v >= 100 else 0)
        assert lines, 'the nearer limit is always in view'
        parts = training_memory(c, hw.precision)
        assert np.allclose([p.get_width() for p in memory.patches], [v / 1e9 for v in parts.values()])
        assert np.allclose([p.get_x() for p in memory.patches], np.cumsum([0, *parts.values()])[:-1] / 1e9), 'stacked'
        assert np.isclose(memory.lines[0].get_xdata()[0], hw.memory / 1e9)

def test_step_says_what_the_batch_comes_from():
    note = lambda plan, i: next(t for t in texts(plot_step(plan).axes[2 * i]) if t.startswith(f' {list(plan.models.values())[i].batch_size}'))
    assert note(PLANS['one_case', 'gpu-12gb'], 1).strip() == '2, the least'
    assert note(make_plan(FINGERPRINTS['heads'], 'gpu-12gb', {'3d.batch_size': 4}), 1).strip() == '4, set by hand'
    many = make_plan(sketch_fingerprint((64, 80, 64), n=300, classes=400), 'gpu-12gb')
    assert note(many, 1).strip().endswith(', for memory')
    assert note(PLANS['heads', 'gpu-12gb'], 1).strip() == '9'

def test_step_of_a_plan_without_reasons():
    fig = plot_step(replace(PLANS['heads', 'cpu'], reasons={}))
    assert not any('5 %' in t for ax in fig.axes for t in texts(ax))

@pytest.mark.parametrize('shape,spacing,cut', [((40, 60, 50), (1, 1, 1), 0), ((20, 90, 80), (3, 1, 1), 0), ((80, 90, 20), (1, 1, 3), 2)])
def test_cascade(shape, spacing, cut):
    image = np.random.default_rng(0).normal(size=shape)
    plan = make_plan(sketch_fingerprint(shape, spacing), 'cpu', ['cascade=yes'])
    fig = inside(plot_cascade(plan, image, spacing))
    low, high = plan.models['3d_lowres'], plan.models['3d_cascade']
    r, k = [a for a in range(3) if a != cut]
    for ax, near, c in zip(fig.axes[:2], fig.axes[2:], (low, high)):
        drawn = {p.get_gid(): (p.get_height(), p.get_width()) for p in ax.patches}
        for o in (low, high): assert np.allclose(drawn[o.name], in_mm(o)[[r, k]]), 'both patches, in mm'
        left, right, bottom, top = ax.images[0].get_extent()
        assert np.allclose((bottom - top, right - left), [shape[a] * spacing[a] for a in (r, k)]), 'the whole scan'
        rows, cols = ax.images[0].get_array().shape
        assert np.allclose([(bottom - top) / rows, (right - left) / cols], [c.spacing[a] for a in (r, k)], rtol=.1), 'in voxels of the stage'
        assert np.allclose((np.ptp(near.get_ylim()), np.ptp(near.get_xlim())), in_mm(c)[[r, k]]), 'what its network sees'
        assert shape_text(c.patch_size) in near.get_title()

@pytest.mark.parametrize('kind', ['heads', 'pictures'])
def test_no_cascade(kind):
    with pytest.raises(InputError, match='has no cascade, because the median case has') as e: plot_cascade(PLANS[kind, 'gpu-12gb'], np.zeros((9, 9, 9)), (1, 1, 1))
    assert str(e.value).count('\n') == 0

@plans
def test_overview(plan):
    fig = inside(plot_plan(plan))
    patches, nets, *bars = fig.axes
    mine = list(plan.models.values())
    assert [p.get_width() for ax in bars[::2] for p in ax.patches] == [c.batch_size for c in mine]
    assert np.allclose([sum(p.get_width() for p in ax.patches) for ax in bars[1::2]], [sum(training_memory(c, HARDWARE[plan.hardware].precision).values()) / 1e9 for c in mine])
    n = 1 if plan.dim == 2 else 3
    rects = [p for p in patches.patches if p.get_gid() == 'patch_size']
    assert np.allclose([(p.get_height(), p.get_width()) for p in rects[::n]], [in_mm(c)[[1, 2]] for c in mine])
    a, b = patches.transData.transform([(0, 0), (1, 1)])
    assert np.isclose(abs(b[0] - a[0]), abs(b[1] - a[1])), 'as long down as across'
    for p in patches.patches:
        x0, y0, x1, y1 = p.get_window_extent().extents
        box = patches.get_window_extent()
        assert x0 > box.x0 - 1 and x1 < box.x1 + 1 and y0 > box.y0 - 1 and y1 < box.y1 + 1, 'nothing is cut off'
    assert len([p for p in nets.patches]) == sum(2 * len(c.features_per_stage) - 1 for c in mine)
    words = [t.get_text() for t in fig.texts]
    assert all(any(t.startswith(f'{c.name}: {shape_text(c.patch_size)} voxels') for t in words) for c in mine)

def test_overview_names_what_was_set_by_hand():
    fig = plot_plan(make_plan(FINGERPRINTS['heads'], 'cpu', {'3d.batch_size': 3}))
    assert fig.get_suptitle().endswith('set by hand: 3d.batch_size')

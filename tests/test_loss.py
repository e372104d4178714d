"The loss, compared with the formula written again in plain numpy loops"
import math
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from autounet_nb.data import DataError
from autounet_nb.loss import DiceCELoss, SoftDice


def softmax(scores):
    e = [math.exp(s - max(scores)) for s in scores]
    return [x / sum(e) for x in e]


def numpy_loss(logits, target, dice, background=True):
    "Soft Dice and cross-entropy, voxel by voxel, from the formula in the paper"
    b, k = logits.shape[:2]
    logits, target = np.asarray(logits, float).reshape(b, k, -1), np.asarray(target).reshape(b, -1)
    overlap, u_sum, v_sum, ce = np.zeros((b, k)), np.zeros((b, k)), np.zeros((b, k)), []
    for s in range(b):
        for i in range(logits.shape[2]):
            u = softmax(list(logits[s, :, i]))
            ce.append(-math.log(u[target[s, i]]))
            for c in range(k):
                v = 1. if target[s, i] == c else 0.
                overlap[s, c] += u[c] * v; u_sum[s, c] += u[c]; v_sum[s, c] += v
    classes = range(0 if background else 1, k)
    if dice == 'batch': d = -2 / len(classes) * sum(overlap[:, c].sum() / (u_sum[:, c].sum() + v_sum[:, c].sum()) for c in classes)
    else: d = np.mean([-2 / len(classes) * sum(overlap[s, c] / (u_sum[s, c] + v_sum[s, c]) for c in classes) for s in range(b)])
    return d, float(np.mean(ce))


@st.composite
def batches(draw):
    b, k, shape = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.sampled_from([(7,), (3, 4), (2, 3, 2)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    seen = draw(st.integers(1, k)) # classes from here on are absent
    return draw(st.sampled_from([.1, 1., 5.])) * torch.randn(b, k, *shape, generator=g), torch.randint(0, seen, (b, *shape), generator=g)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(['sample', 'batch']), st.booleans())
def test_against_numpy(batch, dice, background):
    logits, target = batch
    d, ce = numpy_loss(logits, target, dice, background)
    assert SoftDice(dice, background)(logits, target).item() == pytest.approx(d, abs=1e-5)
    assert DiceCELoss(dice, background)(logits, target).item() == pytest.approx(d + ce, abs=1e-5, rel=1e-5)


@settings(max_examples=10, deadline=None)
@given(batches(), st.sampled_from(['sample', 'batch']))
def test_slope_against_finite_differences(batch, dice):
    logits, target = batch
    logits, loss, h = logits.double(), DiceCELoss(dice), 1e-6
    x = logits.clone().requires_grad_()
    loss(x, target).backward()
    for place in [tuple(np.unravel_index(i, logits.shape)) for i in np.random.default_rng(0).integers(0, logits.numel(), 10)]:
        up, down = logits.clone(), logits.clone()
        up[place] += h; down[place] -= h
        assert x.grad[place].item() == pytest.approx(((loss(up, target) - loss(down, target)) / (2 * h)).item(), abs=1e-7)


def test_modes_differ():
    g = torch.Generator().manual_seed(0)
    target = torch.zeros(2, 100, dtype=torch.long); target[0, :60] = 1; target[1, :3] = 1
    logits = torch.randn(2, 2, 100, generator=g)
    assert abs(SoftDice('sample')(logits, target) - SoftDice('batch')(logits, target)) > .02
    order = torch.randperm(200, generator=g) # a pseudo-volume doesn't know where its voxels are
    mixed = logits.movedim(1, 0).flatten(1)[:, order].view(2, 2, 100).movedim(1, 0), target.flatten()[order].view(2, 100)
    torch.testing.assert_close(SoftDice('batch')(*mixed), SoftDice('batch')(logits, target))


@pytest.mark.parametrize('dice', ['sample', 'batch'])
def test_limits(dice):
    target = torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    perfect = 60. * F.one_hot(target, 3).movedim(-1, 1)
    assert SoftDice(dice)(perfect, target).item() == pytest.approx(-1, abs=1e-6)
    assert DiceCELoss(dice)(perfect, target).item() == pytest.approx(-1, abs=1e-6)
    assert SoftDice(dice)(60. * F.one_hot((target + 1) % 3, 3).movedim(-1, 1), target).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('dice', ['sample', 'batch'])
def test_absent_class(dice):
    target = torch.zeros(2, 4, 4, dtype=torch.long)
    logits = torch.tensor([500., -500., -500.]).view(1, 3, 1, 1).repeat(2, 1, 4, 4).requires_grad_()
    loss = DiceCELoss(dice)(logits, target); loss.backward()
    assert loss.item() == pytest.approx(-1 / 3) # one class of three is there, and found
    assert logits.grad.isfinite().all()


def test_half_precision_counts_far():
    target = torch.zeros(1, 64, 64, 64, dtype=torch.long); target[:, :32] = 1
    logits = (4. * F.one_hot(target, 2).movedim(-1, 1)).half().requires_grad_()
    loss = DiceCELoss()(logits, target); loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.float16 and logits.grad.isfinite().all()
    assert loss.item() == pytest.approx(DiceCELoss()(logits.detach().float(), target).item(), abs=1e-3)


def test_layout_makes_no_difference():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 3, 6, 5, 4, generator=g), torch.randint(0, 3, (2, 6, 5, 4), generator=g)
    torch.testing.assert_close(DiceCELoss()(logits.contiguous(memory_format=torch.channels_last_3d), target), DiceCELoss()(logits, target))


def test_deep_supervision():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 8, 8), generator=g)
    lists = [torch.randn(2, 3, n, n, generator=g) for n in (8, 4, 2)]
    loss = DiceCELoss('sample')
    truth = [target, target[:, 1::2, 1::2], target[:, 2::4, 2::4]]
    by_hand = sum(w * sum(numpy_loss(l, t, 'sample')) for w, l, t in zip((4 / 7, 2 / 7, 1 / 7), lists, truth))
    assert loss(lists, target).item() == pytest.approx(by_hand, abs=1e-5)
    assert loss(lists[:1], target).item() == pytest.approx(loss(lists[0], target).item())
    assert torch.equal(loss.decodes(lists), lists[0].argmax(1)) and torch.equal(loss.activation(lists), lists[0].softmax(1))


def test_bad_input():
    with pytest.raises(DataError, match="'sample' or 'batch'"): DiceCELoss('volume')
    with pytest.raises(DataError, match='not \\(2, 5\\)'): SoftDice()(torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(DataError, match='need classes of shape'): DiceCELoss()(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4, dtype=torch.long))

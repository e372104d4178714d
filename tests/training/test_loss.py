"Dice and cross-entropy against plain NumPy, in both modes, and where they could go wrong."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from autounet_nb.core.errors import InputError
from autounet_nb.training.loss import DiceCELoss, SoftDice

def by_hand(logits, target, batch_dice):
    "Dice + cross-entropy as written in the paper, in NumPy"
    u = np.exp(logits - logits.max(1, keepdims=True)); u /= u.sum(1, keepdims=True)
    v = np.stack([target == k for k in range(logits.shape[1])], 1).astype(float)
    groups = [(u, v)] if batch_dice else [(u[i:i + 1], v[i:i + 1]) for i in range(len(u))]
    dice = np.mean([np.mean([2 * (a[:, k] * b[:, k]).sum() / (a[:, k].sum() + b[:, k].sum()) for k in range(logits.shape[1])]) for a, b in groups])
    return -dice - np.log((u * v).sum(1)).mean()

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.lists(st.integers(2, 6), min_size=2, max_size=3), st.sampled_from([True, False]), st.integers(0, 99))
def test_equals_the_formula(b, k, size, batch_dice, seed):
    rng = np.random.default_rng(seed)
    logits, target = 3 * rng.standard_normal((b, k, *size)), rng.integers(0, k, (b, *size))
    loss = DiceCELoss(batch_dice)(torch.tensor(logits), torch.tensor(target))
    assert abs(loss.item() - by_hand(logits, target, batch_dice)) < 1e-9

def test_the_modes_differ_where_samples_do():
    logits, target = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 8, 8, dtype=torch.long)
    target[0, :6] = 1
    assert abs(SoftDice(True)(logits, target) - SoftDice(False)(logits, target)) > .01
    one = logits[:1], target[:1]
    assert torch.isclose(SoftDice(True)(*one), SoftDice(False)(*one))

def test_perfect_is_minus_one():
    target = torch.randint(0, 3, (2, 8, 8))
    logits = 100 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    assert abs(DiceCELoss()(logits, target).item() + 1) < 1e-4

@pytest.mark.parametrize('batch_dice', [True, False])
def test_gradients_are_those_of_finite_differences(batch_dice):
    logits = torch.randn(2, 3, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda l: DiceCELoss(batch_dice)(l, torch.arange(18).view(2, 3, 3) % 3), logits)

def test_an_absent_class_and_half_precision_give_finite_numbers():
    logits = torch.randn(2, 4, 64, 64, 32, dtype=torch.half, requires_grad=True)
    loss = DiceCELoss(False)(logits, torch.zeros(2, 64, 64, 32, dtype=torch.long))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().max() > 0

def test_a_list_of_logits_is_weighted_one_half_a_quarter():
    target = torch.randint(0, 2, (1, 8, 8)); fine, coarse = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4, 4)
    loss, reduced = DiceCELoss(), target[:, 1::2, 1::2]
    assert torch.isclose(loss([fine, coarse], target), (loss(fine, target) + .5 * loss(coarse, reduced)) / 1.5)

def test_activation_and_decodes_are_what_fastai_asks_for():
    logits = torch.randn(2, 3, 4, 4)
    assert torch.allclose(DiceCELoss().activation(logits).sum(1), torch.ones(2, 4, 4))
    assert (DiceCELoss().decodes(logits) == logits.argmax(1)).all()

def test_mistakes_are_said():
    with pytest.raises(InputError, match=r'need classes of shape \(1, 4, 4\), not \(1, 4, 5\)'): DiceCELoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 5, dtype=torch.long))

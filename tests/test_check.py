"""The check finds what it is made to find, and passes what is right."""

import sys

import pytest
import timm
import torch

from ser_reg import SERError, SERLoss, check, late_cls
from ser_reg.check import CheckReport, Finding

LAYER = 2


@pytest.fixture
def vit():
    return late_cls(
        timm.models.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=0, dynamic_img_size=True
        ),
        LAYER,
    )


def test_passes_what_is_right_and_leaves_it_alone(vit):
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    report = check(vit, layer=LAYER, batch_size=64, ratio=0.1, world_size=8)
    assert report.passed, str(report)
    assert len(str(report).splitlines()) == 4
    assert all(line.startswith("pass  ") for line in str(report).splitlines())
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in vit.parameters())
    assert vit.training


def test_finds_features_that_no_gradient_reaches(vit):
    """As with the paper's release: the tokens are there, the gradient is not."""

    def detached(module, args, output):
        return output.detach().requires_grad_()

    vit.blocks[LAYER - 1].register_forward_hook(detached)
    gradient = check(vit, layer=LAYER).findings[0]
    assert not gradient.passed
    assert "smallest norm 0.0e+00" in str(gradient)
    assert str(gradient).startswith("FAIL  ")


def test_finds_features_that_know_no_place(vit):
    """Tokens that are all alike have the same loss under any relation."""

    class Same(torch.nn.Module):
        def forward(self, tokens):
            return tokens.mean(1, keepdim=True).expand_as(tokens).contiguous()

    vit.norm_pre = Same()
    assert not check(vit, layer=LAYER).findings[1].passed


def test_finds_processes_that_disagree(vit, monkeypatch):
    """The parent counts with other weights than its children: value and gradient then differ."""
    from ser_reg import check as _  # noqa: F401

    module = sys.modules["ser_reg.check"]
    true = module._value_and_gradients
    monkeypatch.setattr(module, "_value_and_gradients", lambda *given: [1.01 * value for value in true(*given)])
    processes = check(vit, layer=LAYER).findings[2]
    assert not processes.passed
    assert "gradients by 9.9e-03" in processes.figure


def test_finds_too_little_memory(vit):
    memory = check(vit, layer=LAYER, batch_size=10**7, ratio=1).findings[3]
    assert not memory.passed


def test_own_images(vit):
    assert check(vit, torch.rand(3, 3, 32, 32), layer=LAYER).findings[0].passed
    with pytest.raises(SERError, match="at least three images"):
        check(vit, torch.rand(2, 3, 32, 32), layer=LAYER)


def test_report():
    report = CheckReport((Finding("it stands", True, "1"), Finding("it falls", False, "2")))
    assert str(report) == "pass  it stands: 1\nFAIL  it falls: 2"
    assert not report.passed


def test_own_term_is_left_alone(vit):
    term = SERLoss(32, projection_dim=16).train()
    before = {name: value.clone() for name, value in term.state_dict().items()}
    report = check(vit, layer=LAYER, term=term)
    assert report.passed, str(report)
    assert all(torch.equal(value, term.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in term.parameters())
    assert term.training


class Wrong(SERLoss):
    """Looks at what the first view alone went through."""

    def compare(self, features, views, group):
        view1, view2 = views
        return super().compare(features, [view1, view2._replace(relation=view1.relation @ view1.relation)], group)


def test_finds_a_term_that_is_wrong():
    """Any term of the interface can be asked; one size of images, so that every relation gives the same grid."""
    vit = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    gradient, true_relation, *_ = check(vit, layer=LAYER, term=Wrong).findings
    assert gradient.passed
    assert not true_relation.passed


def test_layer_that_is_not_there(vit):
    with pytest.raises(SERError, match=r"check\(model, layer=3\)"):
        check(vit, layer=9)

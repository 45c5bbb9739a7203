"""The check finds what it is made to find, and passes what is right."""

import shutil
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from ser_reg import IMAGENET, SERError, SERLoss, check, late_cls
from ser_reg.check import CheckReport, Finding
from ser_reg.check import processes as two_processes
from ser_reg.check import run as asking
from ser_reg.check.memory import _Kept
from ser_reg.check.views import draw_views
from ser_reg.objectives import OBJECTIVES, STL, AugSelf, EquiMod, Reconstruction
from ser_reg.objectives.heads import MLP
from ser_reg.views import CroppedViews, PathViews, Photometric

LAYER = 2
CLS, GRADIENT, RELATION, PROCESSES, MEMORY = range(-5, 0)  # those that are always asked; others come between
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}


def model(layer=LAYER, **kwargs):
    torch.manual_seed(0)
    return late_cls(timm.models.VisionTransformer(**SIZES, dynamic_img_size=True, **kwargs), layer)


@pytest.fixture
def vit():
    return model()


@pytest.fixture
def alone(monkeypatch):
    """No process is started; what is asked of them is answered with yes."""
    monkeypatch.setattr(asking, "processes_finding", lambda case: Finding("processes", True, "not asked"))


def answer(here, folder):
    two_processes._answer(folder, here.rank, here.group)


@pytest.fixture(scope="module")
def run_ranks(run):
    """Two processes that are there already; the check's own example starts two."""

    def run_ranks(folder):
        return "".join(f"{type(found).__name__}: {found}" for found in run(2, answer, folder) if found is not None)

    return run_ranks


@pytest.fixture
def ranks(run_ranks, monkeypatch):
    monkeypatch.setattr(two_processes, "_run_ranks", run_ranks)


@pytest.fixture(scope="module")
def healthy(run_ranks, tmp_path_factory):
    """What is right, and what the two processes answered."""
    answers = tmp_path_factory.mktemp("answers")

    def run_and_keep(folder):
        failed = run_ranks(folder)
        shutil.copytree(folder, answers, dirs_exist_ok=True)
        return failed

    vit, ser = model().train(), SERLoss(32, projection_dim=16).train()
    before = {name: value.clone() for part in (vit, ser) for name, value in part.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_processes, "_run_ranks", run_and_keep)
        report = check(vit, layer=LAYER, term=ser, batch_size=64, ratio=0.1, world_size=8)
    return vit, ser, before, report, answers


def test_passes_what_is_right_and_leaves_it_alone(healthy):
    vit, ser, before, report, _ = healthy
    assert report.passed, str(report)
    assert len(str(report).splitlines()) == 5
    assert all(line.startswith("pass  ") for line in str(report).splitlines())
    now = vit.state_dict() | ser.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert all(p.grad is None and p.requires_grad for part in (vit, ser) for p in part.parameters())
    assert vit.training
    assert ser.training


def test_report():
    report = CheckReport((Finding("it stands", True, "1", "sit()"), Finding("it falls", False, "2", "stand()")))
    assert str(report) == "pass  it stands: 1\nFAIL  it falls: 2; type: stand()"
    assert not report.passed
    assert CheckReport(report.findings[:1]).passed


class TestGradient:
    pytestmark = pytest.mark.usefixtures("alone")

    @pytest.mark.parametrize("layer", range(5))
    def test_every_layer_can_be_asked(self, layer):
        """To the last one, where nothing lies behind."""
        report = check(model(min(layer, 3)), layer=layer)
        assert report.passed, str(report)

    def test_finds_features_that_no_gradient_reaches(self, vit):
        """As with the paper's release: the tokens are there, the gradient is not."""
        vit.blocks[LAYER - 1].register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
        gradient = check(vit, layer=LAYER).findings[GRADIENT]
        assert not gradient.passed
        assert "smallest norm 0.0e+00" in gradient.figure
        assert str(gradient).endswith(f"type: {gradient.remedy}")
        assert gradient.remedy.startswith("z = patch_tokens(model, view.images, layer=2)")

    @pytest.mark.parametrize("frozen", [[0, 1], [0], [1]])
    def test_finds_frozen_blocks(self, vit, frozen):
        for index in frozen:
            vit.blocks[index].requires_grad_(False)
        gradient = check(vit, layer=LAYER).findings[GRADIENT]
        assert not gradient.passed
        assert gradient.figure.endswith("frozen: " + ", ".join(f"block {index + 1}" for index in frozen))
        exec(gradient.remedy, {"model": vit})
        assert check(vit, layer=LAYER).passed

    def test_finds_a_frozen_model_and_a_frozen_term(self, vit):
        for layer in (0, LAYER):
            assert not check(late_cls(model(), layer).requires_grad_(False), layer=layer).findings[GRADIENT].passed
        term = SERLoss(32).requires_grad_(False)
        gradient = check(vit, layer=LAYER, term=term).findings[GRADIENT]
        assert not gradient.passed
        assert gradient.figure.endswith("frozen: the term")
        exec(gradient.remedy, {"term": term})
        assert check(vit, layer=LAYER, term=term).passed
        both = check(vit.requires_grad_(False), layer=LAYER, term=term.requires_grad_(False)).findings[GRADIENT]
        assert not both.passed

    def test_a_stem_and_blocks_behind_may_be_frozen(self, vit):
        """As MoCo-v3 freezes the projection of patches."""
        vit.patch_embed.requires_grad_(False)
        vit.blocks[LAYER:].requires_grad_(False)
        assert check(vit, layer=LAYER).passed

    def test_finds_a_map_that_depends_on_later_blocks(self, vit):
        vit.blocks[LAYER - 1].later = [vit.blocks[-1].mlp]
        vit.blocks[LAYER - 1].register_forward_hook(lambda module, args, out: out + 0.1 * module.later[0](out))
        gradient = check(vit, layer=LAYER).findings[GRADIENT]
        assert not gradient.passed
        assert "smallest norm 0.0e+00" not in gradient.figure
        assert "check(model, layer=4)" in gradient.remedy


class TestRelation:
    pytestmark = pytest.mark.usefixtures("alone")

    def test_finds_features_that_know_no_place(self, vit):
        """Tokens that are all alike have the same loss under any relation, and match nowhere."""

        class Same(nn.Module):
            def forward(self, tokens):
                return tokens.mean(1, keepdim=True).expand_as(tokens).contiguous()

        vit.norm_pre = Same()
        relation = check(vit, layer=LAYER).findings[RELATION]
        assert not relation.passed
        assert relation.figure.startswith("matching 0.00 (chance 0.0")
        assert relation.remedy.startswith("equivariance_score(model, images, layers=[2])")

    def test_shows_how_often_tokens_find_their_place(self, vit):
        """A network that looks at the colour of each patch alone, in noise of one size."""
        static = timm.models.VisionTransformer(**SIZES)
        with torch.no_grad():
            static.pos_embed.zero_()
            weight = static.patch_embed.proj.weight
            weight.copy_(weight.mean((2, 3), keepdim=True).expand_as(weight))
        figure = check(static, layer=0).findings[RELATION].figure
        assert float(figure.split()[1]) > 0.9
        assert figure.split("chance ")[1].startswith("0.06")  # of 16 places
        assert figure.index("matching") < figure.index("loss")

    def test_finds_a_term_that_is_wrong(self):
        """Any term of the interface can be asked; one size of images, so that every relation gives the same grid."""
        static = late_cls(timm.models.VisionTransformer(**SIZES), LAYER)
        report = check(static, layer=LAYER, term=Wrong)
        assert report.findings[GRADIENT].passed
        assert not report.findings[RELATION].passed


class Wrong(SERLoss):
    """Looks at what the first view alone went through."""

    def compare(self, features, views, group):
        view1, view2 = views
        return super().compare(features, [view1, view2._replace(relation=view1.relation @ view1.relation)], group)


NAMES = sorted(OBJECTIVES)
COLOURS = Photometric(solarize=0.5)


class TestTerms:
    """Every term, by its name, its class, or as it is trained."""

    @pytest.mark.usefixtures("ranks")
    @pytest.mark.parametrize("name", NAMES)
    def test_passes_every_term(self, vit, name):
        report = check(vit, layer=LAYER, term=name, batch_size=64)
        assert report.passed, str(report)
        moves = OBJECTIVES[name].policy == "equivariant"
        question = "the true relation has a lower loss" if moves else "the loss depends on how views were made"
        assert report.findings[RELATION].question.startswith(question)
        assert ("matching" in report.findings[RELATION].figure) == OBJECTIVES[name].dense
        assert report.findings[MEMORY].figure.startswith("2 images" if moves else "64 images")

    @pytest.mark.usefixtures("alone")
    @pytest.mark.parametrize("name", NAMES)
    def test_models_of_one_size_and_with_stages(self, name):
        static = late_cls(timm.models.VisionTransformer(**SIZES), LAYER)
        assert check(static, layer=LAYER, term=OBJECTIVES[name]).passed
        torch.manual_seed(0)
        resnet = timm.create_model("resnet10t", channels=(8, 8, 16, 16))
        report = check(resnet, layer=1, term=name, image_size=32)
        untrained = {RELATION} if OBJECTIVES[name].policy == "equivariant" else set()  # which need not know places yet
        assert all(report.findings[i].passed for i in {GRADIENT, RELATION, MEMORY} - untrained), str(report)

    @pytest.mark.usefixtures("alone")
    @pytest.mark.parametrize(
        "make",
        [
            lambda: AugSelf(32, flip=1, turn=1, solarize=1, maker=CroppedViews(24, photometric=COLOURS, turned=True)),
            lambda: Reconstruction(32, patch_size=8, maker=PathViews("colour", 3, 24)),
            lambda: STL(32, rank=4, invariance=1),
            lambda: SERLoss(32, maker=CroppedViews(32, area=(0.5, 1))),
        ],
    )
    def test_takes_a_term_as_it_is_trained(self, vit, make):
        """With three images, of which pairs need four; of another size; with a maker, whose views are taken."""
        images = nn.functional.interpolate(torch.randn(3, 3, 8, 10), (32, 40))
        report = check(vit, images, LAYER, make())
        assert report.passed, str(report)

    @pytest.mark.parametrize("normalize", [None, IMAGENET])
    @pytest.mark.parametrize("policy", ["cropped", "path"])
    def test_makers_see_pixels_and_the_model_what_it_takes(self, policy, normalize):
        """Views that change nothing are the images again; targets stay pixels."""
        still = {"size": 32, "area": (1, 1), "ratio": (1, 1), "flip": 0, "normalize": normalize}
        maker = PathViews("blur", **still) if policy == "path" else CroppedViews(**still)
        mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        images = (torch.rand(4, 3, 32, 32) - mean) / std
        term = Reconstruction(8) if policy == "path" else AugSelf(8)
        for views in draw_views(maker, term, images, 2):
            torch.testing.assert_close(views[0].images, images, rtol=0, atol=1e-4)
            assert len(views) == (4 if policy == "path" else 2)
            for target in views[2:]:
                assert 0 <= target.images.min() < 0.1 < 0.9 < target.images.max() <= 1

    def test_draws_by_seed_and_leaves_the_global_state_alone(self):
        term, maker = AugSelf(8), CroppedViews(16, photometric=Photometric())
        before = torch.get_rng_state()
        once, twice = (draw_views(maker, term, torch.zeros(3, 3, 32, 32), 2) for _ in range(2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(a.relation == b.relation for a, b in zip(once[1], twice[1], strict=True))
        assert once[0][0].relation != once[1][0].relation

    def test_another_name(self, vit):
        with pytest.raises(SERError) as error:
            check(vit, term="equimodd")
        assert error.value.call == "check(model, term='equimodd')"
        assert "equimod, essl" in error.value.expected

    @pytest.mark.usefixtures("alone")
    @pytest.mark.parametrize("term", ["deaf", "alike"])
    def test_finds_a_term_that_does_not_heed_how_views_were_made(self, vit, term):
        term = {"deaf": Deaf, "alike": Alike}[term]
        report = check(vit, layer=LAYER, term=term)
        assert report.findings[GRADIENT].passed
        assert not report.findings[RELATION].passed
        assert "drawn_of" in report.findings[RELATION].remedy

    @pytest.mark.usefixtures("alone")
    def test_finds_heads_that_train_alone(self, vit):
        gradient = check(vit, layer=LAYER, term=Detached).findings[GRADIENT]
        assert not gradient.passed
        assert gradient.figure.startswith("smallest norm 0.0e+00")

    @pytest.mark.usefixtures("ranks")
    @pytest.mark.parametrize(
        ("term", "remedy"),
        [("LocalNorm", "heads.BatchNorm(width)"), ("LocalMean", "distributed.all_gather("), ("Dropped", "")],
    )
    def test_processes_that_differ(self, vit, term, remedy):
        """Batch norm of each rank for itself, means of each rank; but dropouts are no mistake."""
        processes = check(vit, layer=LAYER, term=globals()[term]).findings[PROCESSES]
        assert processes.passed == (not remedy), str(processes)
        assert remedy in processes.remedy
        assert "Error" not in processes.figure or term == "LocalNorm"  # which cannot do with one row

    def test_what_is_kept_are_no_parameters(self):
        linear = nn.Linear(64, 64, bias=False)
        with _Kept(linear.parameters()) as kept:
            linear(torch.randn(2, 64, requires_grad=True)).square().sum()
        assert kept.bytes == 2 * 2 * 64 * 4  # in and out


class Deaf(AugSelf):
    """Tells the difference between a view and itself."""

    def compare(self, features, views, group):
        return super().compare(features, [views[0], views[0]], group)


class Alike(EquiMod):
    """Tells all images the same parameters: those of the first."""

    def compare(self, features, views, group):
        return super().compare(features, [view[[0] * len(features[0])] for view in views], group)


class Detached(AugSelf):
    """Features that were detached, and asked for a gradient that goes nowhere."""

    def compare(self, features, views, group):
        return super().compare([z.detach().requires_grad_() for z in features], views, group)


class LocalNorm(AugSelf):
    """Normalises by the rows of a rank."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.norm = nn.BatchNorm2d(dim)

    def compare(self, features, views, group):
        return super().compare([self.norm(z) for z in features], views, group)


class LocalMean(AugSelf):
    """Takes the mean over the images of a rank, of which another has more."""

    def image_counts(self, call, features, group, least=2):
        counts = super().image_counts(call, features, group, least)
        return [len(features[0])] * len(counts)


class Dropped(AugSelf):
    """Drops channels in training."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.dropout = nn.Dropout2d(0.5)
        self.heads["crop"] = MLP([2 * dim, 16, 4], last_bias=True)

    def compare(self, features, views, group):
        return super().compare([self.dropout(z) for z in features], views, group)


class TestProcesses:
    def test_finds_values_that_disagree(self, healthy, monkeypatch):
        """The parent counts with other weights than its children did: value and gradient then differ."""
        vit, ser, *_, answers = healthy
        replay = lambda folder: shutil.copytree(answers, folder, dirs_exist_ok=True) and ""  # noqa: E731
        monkeypatch.setattr(two_processes, "_run_ranks", replay)
        assert check(vit, layer=LAYER, term=ser).findings[PROCESSES].passed
        true = two_processes._value_and_gradients
        monkeypatch.setattr(two_processes, "_value_and_gradients", lambda *given: [1.01 * v for v in true(*given)])
        processes = check(vit, layer=LAYER, term=ser).findings[PROCESSES]
        assert not processes.passed
        assert "gradients by 9.9e-03" in processes.figure
        assert "all_gather" in str(processes)

    @pytest.mark.parametrize(
        ("command", "figure"),
        [("raise SystemExit('out of luck')", "out of luck"), ("while True: pass", "no answer in 1")],
    )
    def test_says_why_a_process_gave_up(self, vit, monkeypatch, command, figure):
        popen = subprocess.Popen
        monkeypatch.setattr(two_processes, "SECONDS", 1 if "while" in command else 60)
        monkeypatch.setattr(subprocess, "Popen", lambda arguments, **how: popen([sys.executable, "-c", command], **how))
        processes = check(vit, layer=LAYER).findings[PROCESSES]
        assert not processes.passed
        assert figure in processes.figure


class TestMemory:
    pytestmark = pytest.mark.usefixtures("alone")

    def test_finds_too_little(self, vit):
        memory = check(vit, layer=LAYER, batch_size=10**7, ratio=1.0).findings[MEMORY]
        assert not memory.passed
        ratio = float(memory.remedy.split(", ")[1])  # n = partition_size(10000000, ratio, 1)
        assert check(vit, layer=LAYER, batch_size=10**7, ratio=ratio).findings[MEMORY].passed

    def test_grows_with_images_and_ranks(self, vit):
        def figures(**kwargs):
            words = check(vit, layer=LAYER, **kwargs).findings[MEMORY].figure.replace(",", "").split()
            return [int(words[i - 1]) for i, word in enumerate(words) if word == "MiB"]

        once, twice, ranks = (
            figures(batch_size=n, ratio=1.0, world_size=w) for n, w in ((2000, 1), (4000, 1), (2000, 3))
        )
        assert twice[:2] == [pytest.approx(2 * value, abs=2) for value in once[:2]]
        assert (once[2], ranks[2]) == (0, pytest.approx(2 * 2 * 2000 * 16 * 512 * 8 / 2**20, rel=0.3))


class TestClassToken:
    pytestmark = pytest.mark.usefixtures("alone")

    @pytest.mark.parametrize(("joins", "layer"), [(0, 2), (3, 2), (1, 2), (2, 4), (0, 4), (1, 0)])
    def test_finds_a_token_that_joins_elsewhere(self, joins, layer):
        vit = model(joins)
        found = check(vit, layer=layer).findings[CLS]
        assert not found.passed
        assert found.figure.startswith(f"after {joins} blocks, the term at layer {layer}")
        exec(found.remedy, {"model": vit, "late_cls": late_cls})
        assert check(vit, layer=layer).findings[CLS].passed
        other = found.remedy.partition("# or the term there: ")[2]
        assert bool(other) == bool(joins)
        if other:
            assert eval(other, {"model": model(joins), "check": check}).findings[CLS].passed

    def test_says_what_plain_timm_does(self, vit):
        assert "plain timm" in check(vit, layer=LAYER).findings[CLS].figure

    def test_no_prefix_joins_nowhere(self):
        assert check(model(0, class_token=False, global_pool="avg"), layer=LAYER).findings[CLS].passed
        resnet = timm.create_model("resnet10t", channels=(8, 8, 16, 16))
        assert check(resnet, layer=1, image_size=32).findings[CLS].passed


class TestTeacher:
    pytestmark = pytest.mark.usefixtures("alone")

    @pytest.mark.parametrize("joins", [0, 1])
    def test_finds_one_that_sees_other_things(self, vit, joins):
        teacher = model(joins)
        _, found, *_ = check(vit, layer=LAYER, teacher=teacher).findings
        assert str(found).startswith(f"FAIL  the teacher's [CLS] joins as the student's does: after {joins} blocks")
        exec(found.remedy, {"teacher": teacher, "late_cls": late_cls})
        assert check(vit, layer=LAYER, teacher=teacher).passed

    def test_what_is_no_teacher(self, vit):
        with pytest.raises(SERError) as error:
            check(vit, layer=LAYER, teacher=nn.DataParallel(model()))
        assert error.value.call == "check(model, teacher=teacher)"
        assert error.value.remedy == "check(model, teacher=teacher.module)"
        with pytest.raises(SERError) as error:
            check(vit, layer=LAYER, teacher=nn.Linear(3, 4))
        assert (error.value.call, error.value.given) == ("check(model, teacher=teacher)", "Linear")


class TestOptimizer:
    pytestmark = pytest.mark.usefixtures("alone")

    def names(self, case):
        return {
            "term": ["term.projector.0.weight"],
            "a layer": ["term.projector.3.weight"],
            "model": ["model.pos_embed"],
            "block": ["model.blocks.1.norm1.weight"],
        }[case]

    @pytest.mark.parametrize("case", ["term", "a layer", "model", "block"])
    def test_finds_parameters_that_none_holds(self, vit, case):
        term = SERLoss(32)
        held = {
            "term": list(vit.parameters()),
            "a layer": [*vit.parameters(), *term.projector[:3].parameters()],
            "model": list(term.parameters()),
            "block": [*(p for n, p in vit.named_parameters() if "blocks.1." not in n), *term.parameters()],
        }[case]
        optimizer = torch.optim.SGD(held, lr=1e-3)
        _, found, *_ = check(vit, layer=LAYER, term=term, optimizer=optimizer).findings
        assert not found.passed
        assert f"without {self.names(case)[0]}" in found.figure
        exec(found.remedy, {"model": vit, "term": term, "optimizer": optimizer})
        assert check(vit, layer=LAYER, term=term, optimizer=optimizer).passed

    def test_what_is_frozen_or_lies_behind_need_not_be_held(self, vit):
        term = SERLoss(32)
        vit.patch_embed.requires_grad_(False)
        early = [vit.pos_embed, *vit.blocks[:LAYER].parameters(), *term.parameters()]
        assert check(vit, layer=LAYER, term=term, optimizer=torch.optim.SGD(early, lr=1e-3)).passed

    def test_asks_for_the_term(self, vit):
        with pytest.raises(SERError) as error:
            check(vit, layer=LAYER, optimizer=torch.optim.SGD(vit.parameters(), lr=1e-3))
        assert str(error.value) == (
            "check(model, optimizer=optimizer)\n"
            "  given:    a term that is made here, which no optimiser can hold\n"
            "  expected: the term that you train with\n"
            "  remedy:   check(model, term=term, optimizer=optimizer)"
        )


@pytest.mark.filterwarnings("error")
class TestImages:
    pytestmark = pytest.mark.usefixtures("alone")

    def test_finds_pixels_that_are_not_normalised(self, vit):
        images = 255 * nn.functional.interpolate(torch.rand(3, 3, 6, 6), (32, 32), mode="bilinear")
        _, pixels, *_ = check(vit, images, layer=LAYER).findings
        assert not pixels.passed
        assert pixels.figure.endswith("where pixels give -2.12 to 2.64")
        names = {"images": images, "torchvision": pytest.importorskip("torchvision")}
        exec(pixels.remedy, names)
        report = check(vit, names["images"], layer=LAYER)
        assert report.passed, str(report)
        mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        torch.testing.assert_close(names["images"], (images / 255 - mean) / std)

    @pytest.mark.parametrize(("scale", "passes"), [(1, True), (4, False), (-1, True), (torch.nan, False)])
    def test_values_of_other_normalisations(self, vit, scale, passes):
        images = scale * torch.linspace(-2, 2, 3 * 3 * 32 * 32).view(3, 3, 32, 32)
        if scale == scale:
            assert check(vit, images, layer=LAYER).findings[1].passed == passes
        else:
            with pytest.raises(SERError, match="NaN or infinity"):
                check(vit, images, layer=LAYER)

    def test_knows_the_model_s_own_normalisation(self, vit):
        vit.pretrained_cfg = {"mean": (0, 0, 0), "std": (0.01, 0.01, 0.01)}
        assert check(vit, 90 * torch.rand(3, 3, 32, 32), layer=LAYER).findings[1].passed

    def test_folder(self, vit, tmp_path):
        for i in range(3):
            noise = torch.randint(256, (40, 50 + i, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
        report = check(vit, tmp_path, layer=LAYER, image_size=48)
        assert len(report.findings) == 5  # their normalisation is not the user's
        assert report.findings[GRADIENT].passed
        assert check(vit, str(tmp_path), layer=LAYER, image_size=(16, 32)).findings[GRADIENT].passed

    @pytest.mark.parametrize(
        ("images", "more", "call", "text"),
        [
            (torch.rand(2, 3, 32, 32), {}, "check(model, images)", "at least 3 images (B, C, H, W)"),
            (torch.rand(3, 32, 32), {}, "check(model, images)", "images[None]"),
            (list(torch.rand(3, 3, 32, 32)), {}, "check(model, images)", "torch.stack(list(images))"),
            (torch.rand(3, 1, 32, 32), {}, "check(model, images)", "in_chans=1"),
            (torch.zeros(3, 3, 32, 32, dtype=torch.uint8), {}, "check(model, images)", "images.float() / 255"),
            (
                torch.rand(3, 3, 2, 2),
                {},
                "check(model), in EquivariantViews(patch_size=8)(images)",
                "EquivariantViews(",
            ),
            (torch.rand(3, 3, 32, 32), {"image_size": 32}, "check(model, images, image_size=...)", "one of the two"),
            ("nowhere", {}, "check(model, 'nowhere')", "--images FOLDER"),
        ],
    )
    def test_other_things(self, vit, images, more, call, text):
        with pytest.raises(SERError) as error:
            check(vit, images, layer=LAYER, **more)
        assert error.value.call == call
        assert text in str(error.value)

    def test_other_sizes_of_a_model_of_one_size(self):
        with pytest.raises(SERError) as error:
            check(timm.models.VisionTransformer(**SIZES), torch.rand(3, 3, 48, 48), layer=LAYER)
        assert (error.value.call, error.value.given) == ("check(model, images)", "images of 48 x 48 pixels")

    def test_too_few_in_a_folder(self, vit, tmp_path):
        for i in range(2):
            Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
        with pytest.raises(SERError, match="at least 3 images that can be read"):
            check(vit, tmp_path, layer=LAYER)


class TestErrors:
    @pytest.mark.parametrize("wrong", [nn.Linear(3, 4), nn.Linear, "vit_tiny_patch16_224", None])
    def test_what_is_no_vit(self, wrong):
        with pytest.raises(SERError) as error:
            check(wrong)
        assert error.value.call == "check(model)"
        assert "timm's VisionTransformer" in error.value.expected
        assert error.value.remedy == 'timm.create_model("vit_small_patch16_224", dynamic_img_size=True)'

    def test_wrapper(self, vit):
        with pytest.raises(SERError) as error:
            check(nn.DataParallel(vit))
        assert error.value.remedy == "check(model.module)"

    @pytest.mark.parametrize("layer", [9, -1, 2.0, None, True])
    def test_layer_that_is_not_there(self, vit, layer):
        with pytest.raises(SERError) as error:
            check(vit, layer=layer)
        assert error.value.args == (
            f"check(model, layer={layer!r})",
            f"layer={layer!r}",
            "a whole number of blocks from 0 to 4",
            "check(model, layer=3)",
        )

    @pytest.mark.usefixtures("alone")
    def test_term_of_another_width(self, vit):
        with pytest.raises(SERError) as error:
            check(vit, layer=LAYER, term=SERLoss(7))
        assert error.value.call == "check(model), in SERLoss(...)(features, views)"
        assert error.value.remedy == "SERLoss(32)"

    @pytest.mark.usefixtures("alone")
    def test_ratio_that_is_no_share(self, vit):
        with pytest.raises(SERError, match="check\\(model\\), in partition_size"):
            check(vit, layer=LAYER, ratio=3)

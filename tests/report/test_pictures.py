"""What the report shows is what was measured, of the model whose name stands beside it."""

import copy

import pytest
import torch
from matplotlib.colors import to_hex
from small_vits import DYNAMIC, photos, vit
from torch.nn import functional as F

from ser_reg import equivariance_score, late_cls, patch_tokens
from ser_reg.report import maps, page, positions, probes, report, scores
from ser_reg.report.model import measure, subject_of
from ser_reg.report.photographs import whole
from ser_reg.report.style import FLOOR, OFF, SCORE, marks

LAYERS = [0, 1, 2]
KINDS = ["rotation", "flip", "scale"]


@pytest.fixture
def another():
    model = vit(**DYNAMIC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


# Curves


def made_up(models=3):
    """Records in which every number is another one."""
    count = iter(range(10**6))

    def readings(*keys):
        return {kind: {layer: {key: next(count) / 1000 for key in keys} for layer in LAYERS} for kind in KINDS}

    four = ("raw", "spatial", "raw_floor", "spatial_floor")
    return {
        f"model {i}": {
            "scores": readings(*four),
            "scores_without_positions": readings(*four),
            "probes": {k: v for k, v in readings("accuracy", "standard_error", "chance").items() if k != "scale"},
            "probe_views": 10,
        }
        for i in range(models)
    }


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    found = []

    def keep(module):
        finish = module.finish

        def kept(figure, *arguments):
            finish(figure, *arguments)
            found.append(figure)

        monkeypatch.setattr(module, "finish", kept)

    for module in (scores, positions, probes):
        keep(module)
    return found


def curve(panel, i, style):
    """The values of the i-th model in this style of line."""
    look = marks(i)
    lines = [
        line
        for line in panel.lines
        if (to_hex(line.get_color()).upper(), line.get_marker(), line.get_linestyle())
        == (look["color"], look["marker"], style)
    ]
    assert len(lines) == 1
    assert list(lines[0].get_xdata()) == LAYERS
    return list(lines[0].get_ydata())


def names_in(figure):
    """Which model is which, by the legend."""
    entries = [
        (text.get_text(), handle)
        for legend in figure.legends
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    ]
    return {name: (to_hex(h.get_color()).upper(), h.get_marker()) for name, h in entries if name.startswith("model")}


def test_curves_of_scores(figures, tmp_path):
    records = made_up()
    scores.Scores().draw(tmp_path, records)
    (figure,) = figures
    panels = figure.axes
    for row, reading in enumerate(("spatial", "raw")):
        for column, kind in enumerate(KINDS):
            panel = panels[row * len(KINDS) + column]
            for i, record in enumerate(records.values()):
                for style, key in ((SCORE, reading), (FLOOR, f"{reading}_floor")):
                    assert curve(panel, i, style) == [at[key] for at in record["scores"][kind].values()]
    assert [panel.get_title() for panel in panels[:3]] == KINDS
    assert names_in(figure) == {name: (marks(i)["color"], marks(i)["marker"]) for i, name in enumerate(records)}


def test_curves_of_positions(figures, tmp_path):
    records = made_up()
    positions.Positions().draw(tmp_path, records)
    for panel, kind in zip(figures[0].axes, KINDS, strict=True):
        for i, record in enumerate(records.values()):
            for style, key in ((SCORE, "scores"), (OFF, "scores_without_positions")):
                assert curve(panel, i, style) == [at["spatial"] for at in record[key][kind].values()]
    assert names_in(figures[0]) == {name: (marks(i)["color"], marks(i)["marker"]) for i, name in enumerate(records)}


def test_curves_of_probes(figures, tmp_path):
    records = made_up()
    probes.Probes().draw(tmp_path, records)
    for panel, kind in zip(figures[0].axes, KINDS[:2], strict=True):
        for i, record in enumerate(records.values()):
            expected = [100 * at["accuracy"] for at in record["probes"][kind].values()]
            assert curve(panel, i, SCORE) == pytest.approx(expected)


def test_columns_of_the_table():
    """Every figure of a model under its own heading."""
    (record,) = made_up(1).values()
    columns = [column for section in (scores.Scores(), positions.Positions()) for column in section.columns(record)]
    shown = iter(columns)
    for kind in KINDS:
        for key in ("spatial", "spatial_floor", "raw", "raw_floor"):
            assert next(shown).values == {layer: at[key] for layer, at in record["scores"][kind].items()}
    for kind in KINDS:
        expected = {layer: at["spatial"] for layer, at in record["scores_without_positions"][kind].items()}
        assert next(shown).values == expected


# A model's part of the report is its own


def test_no_model_depends_on_the_others(another, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "write_page", lambda result, folder: "")
    monkeypatch.setattr(maps, "_layers", lambda subject: [1])
    together = report({"a": vit(**DYNAMIC), "b": another}, photos(3), tmp_path / "two", layers=[1])["models"]
    alone = report({"b": another}, photos(3), tmp_path / "one", layers=[1])["models"]["b"]
    for key in ("scores", "scores_without_positions", "probes", "findings", "left_out"):
        assert together["b"][key] == alone[key], key
    for of_two, of_one, of_other in zip(
        together["b"]["pictures"], alone["pictures"], together["a"]["pictures"], strict=True
    ):
        assert (tmp_path / "two" / of_two).read_bytes() == (tmp_path / "one" / of_one).read_bytes()
        assert (tmp_path / "two" / of_two).read_bytes() != (tmp_path / "two" / of_other).read_bytes()
    shown = maps.Maps().draw(tmp_path, together)
    assert [(picture.path.name, picture.alternative) for picture in shown] == [
        (name, f"Token maps of {model}") for model in "ab" for name in together[model]["pictures"]
    ]
    assert together["a"]["scores"] != together["b"]["scores"]


def subject(model, tmp_path, n=5, layers=(0, 2), name="m", seed=3):
    return subject_of(name, model, photos(n), tmp_path / "tokens", list(layers), (32, 32), seed)


def test_what_is_left_without_positions(tmp_path):
    """The score of a copy in which every patch has the mean of all patches' embeddings."""
    model = vit(**DYNAMIC)
    asked = subject(model, tmp_path)
    found = positions.Positions().measure(asked)["scores_without_positions"]
    bare = copy.deepcopy(model)
    with torch.no_grad():
        bare.pos_embed[:, 1:] = sum(model.pos_embed[:, 1 + i] for i in range(16)) / 16
    expected = equivariance_score(bare, asked.pixels, [0, 2], torch.Generator().manual_seed(3))
    for kind, layers in expected.items():
        for layer, readings in layers.items():
            assert found[kind][layer] == pytest.approx(readings, abs=1e-5)
    assert found["flip"][2]["spatial"] != pytest.approx(
        scores.Scores().measure(asked)["scores"]["flip"][2]["spatial"], abs=1e-3
    )


def folded(model):
    """The same network of pixels in [0, 1]: its normalisation stands in the weights of its first layer."""
    net = copy.deepcopy(model)
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    conv = net.patch_embed.proj
    with torch.no_grad():
        conv.weight /= std[:, None, None]
        conv.bias -= (conv.weight * mean[:, None, None]).sum((1, 2, 3))
    net.pretrained_cfg = dict(model.pretrained_cfg) | {"mean": (0, 0, 0), "std": (1, 1, 1)}
    return net


def test_every_section_sees_normalised_pixels(tmp_path, monkeypatch):
    """A network that normalises by itself has the same report as one that is given normalised pixels."""
    model = vit(**DYNAMIC)
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"mean": (0.2, 0.5, 0.7), "std": (0.1, 0.2, 0.4)}
    given, shown = [], []
    accuracy = probes.Accuracy(0.5, 0.0, 0.5)
    monkeypatch.setattr(probes, "probe", lambda features, images: given.append(features) or accuracy)
    monkeypatch.setattr(maps, "_show", lambda panel, picture, heading: shown.append(picture))
    monkeypatch.setattr(maps.Figure, "savefig", lambda *arguments, **more: None)
    monkeypatch.setattr(maps, "_layers", lambda subject: [2])
    one, other = (measure(subject(m, tmp_path), lambda **_: None) for m in (model, folded(model)))
    for mine, its in zip(given[: len(given) // 2], given[len(given) // 2 :], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    for mine, its in zip(shown[: len(shown) // 2], shown[len(shown) // 2 :], strict=True):
        torch.testing.assert_close(mine.double(), its.double(), rtol=1e-2, atol=1e-2)
    for kind, layers in one["scores"].items():
        for layer, readings in layers.items():
            assert readings == pytest.approx(other["scores"][kind][layer], abs=1e-4)


# Token maps


def drawn_maps(model, tmp_path, monkeypatch):
    """Pictures and headings of the first row, in their order, and the scores below."""
    shown, rows = [], []
    monkeypatch.setattr(maps, "_show", lambda panel, picture, heading: shown.append((heading, picture)))
    draw_row = maps._draw_row

    def row(panels, *arguments, **more):
        draw_row(panels, *arguments, **more)
        rows.append([float(panel.get_xlabel().split()[1]) for panel in panels if panel.get_xlabel()])

    monkeypatch.setattr(maps, "_draw_row", row)
    monkeypatch.setattr(maps.Figure, "savefig", lambda *arguments, **more: None)
    asked = subject(model, tmp_path)
    monkeypatch.setattr(maps, "_layers", lambda subject: [2])
    maps.Maps().measure(asked)
    return asked, shown[:10], rows[0]


def test_token_maps_beside_each_other(tmp_path, monkeypatch):
    """g·f(x) is the same map f(x), moved by each g; f(g·x) is another one. Both are painted with one palette."""
    model = vit(**DYNAMIC)
    asked, shown, below = drawn_maps(model, tmp_path, monkeypatch)
    headings = [heading.split(":")[0] for heading, _ in shown]
    assert headings == ["image x", *["g·x", "g·f(x)", "f(g·x)"] * 3]
    (_, image), (_, turned), (_, acted), (_, of_turned), (_, flipped), (_, acted_by_flip), (_, of_flipped), *_ = shown
    assert torch.equal(turned, image.rot90(1, (-2, -1)))
    assert torch.equal(flipped, image.flip(-1))
    torch.testing.assert_close(acted.rot90(-1, (-2, -1)), acted_by_flip.flip(-1))
    assert (of_turned.rot90(-1, (-2, -1)) - of_flipped.flip(-1)).abs().max() > 0.05
    assert (acted - of_turned).abs().max() > 0.05
    # Below stands the score of the pair: of this image's maps, each without its mean token.
    index = next(i for i, x in enumerate(asked.images) if torch.equal(x, image))
    pixels = asked.pixels[index : index + 1]
    with torch.no_grad():
        for position, move in enumerate((lambda x: x.rot90(1, (-2, -1)), lambda x: x.flip(-1))):
            pair = move(patch_tokens(model, pixels, 2)), patch_tokens(model, move(pixels), 2)
            pair = [x - x.mean((-2, -1), keepdim=True) for x in pair]
            assert below[position] == pytest.approx(F.cosine_similarity(*pair).mean().item(), abs=0.006)


def test_token_maps_of_an_equivariant_network_match(tmp_path, monkeypatch):
    """Blocks that look at one token, without positions, of the mean colour of patches."""
    from ser_reg.backbones import backbone

    model = backbone(vit(**DYNAMIC)).without_positions()
    with torch.no_grad():
        weight = model.patch_embed.proj.weight
        weight.copy_(weight.mean((2, 3), keepdim=True).expand_as(weight))
    _, shown, below = drawn_maps(model, tmp_path, monkeypatch)
    for pair in (2, 5):
        torch.testing.assert_close(shown[pair][1], shown[pair + 1][1], rtol=1e-3, atol=1e-3)
    assert below[:2] == [1.0, 1.0]


# Probes


def test_cuts_of_an_image_are_held_out_together(tmp_path, monkeypatch):
    """Features that tell the image apart, and the element within it: useless for images that were not seen."""
    draw = torch.Generator().manual_seed(0)
    each = probes._cuts_each(subject(vit(**DYNAMIC), tmp_path))
    assert each > 1

    def same_for_all_cuts(model, images, layers):
        n = len(images) // each
        assert len(images) == n * each
        return {"flip": {2: torch.randn(n, 2, 200, generator=draw).repeat_interleave(each, 0)}}

    monkeypatch.setattr(probes, "mean_tokens", same_for_all_cuts)
    found = probes.Probes().measure(subject(vit(**DYNAMIC), tmp_path, layers=[2]))["probes"]["flip"][2]
    assert found["accuracy"] < 0.8  # trained on their own twins they would be told apart without an error
    with monkeypatch.context() as patch:
        patch.setattr(probes, "probe", lambda features, images: probes.Accuracy(0, 0, len(images)))
        asked = subject(vit(**DYNAMIC), tmp_path, layers=[2])
        assert probes.Probes().measure(asked)["probes"]["flip"][2]["chance"] == 5 * each


def test_cuts_stay_with_their_image(tmp_path, monkeypatch):
    """The number that says from which image a cut is, says it."""
    known = {}
    plain = [torch.full((3, 40, 48), value / 10) for value in range(5)]
    monkeypatch.setattr(
        probes, "mean_tokens", lambda model, images, layers: known.update(images=images) or {"flip": {2: images}}
    )
    monkeypatch.setattr(
        probes, "probe", lambda features, images: known.update(numbers=images) or probes.Accuracy(0, 0, 0)
    )
    model = vit(**DYNAMIC)
    asked = subject_of("m", model, plain, tmp_path / "tokens", [2], (32, 32), 0)
    probes.Probes().measure(asked)
    means, stds = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    values = (known["images"] * stds + means).mean((1, 2, 3)) * 10
    torch.testing.assert_close(values, torch.tensor(known["numbers"], dtype=torch.float32))


# What is said


@pytest.mark.usefixtures("undrawn")
def test_says_where_cls_joins_first(tmp_path):
    found = report({"late": late_cls(vit(**DYNAMIC), 1), "plain": vit(**DYNAMIC)}, photos(), tmp_path, layers=[1])
    first = found["models"]["late"]["findings"][0]
    assert first.startswith("[CLS] joins after 1 blocks. Plain timm lets it in at the first")
    assert "late_cls(model, 1)" in first
    assert not any("[CLS]" in line for line in found["models"]["plain"]["findings"])


def test_scores_are_those_of_the_whole_images(tmp_path):
    asked = subject(vit(**DYNAMIC), tmp_path)
    assert torch.equal(asked.pixels, asked.normalised([whole(photo, (32, 32)) for photo in asked.photographs]))

"""Judge an encoder: k-NN, linear and non-linear classifiers, fine-tuning, what it knows of turns and flips, t-SNE.

    python examples/evaluate.py knn --model out/moco_v3/encoder --data /data/imagenet
    python examples/evaluate.py linear --model vit_small_patch16_224 --data hf:uoft-cs/cifar10
    python examples/evaluate.py shift --model out/moco_v3/encoder --folders /data/imagenet-r /data/imagenet-sketch
    accelerate launch examples/evaluate.py finetune --model out/moco_v3/encoder --data /data/imagenet

Each subcommand writes OUTPUT_DIR/SUBCOMMAND.json. Features are computed once and kept in OUTPUT_DIR/features, which
all subcommands share; what was stopped goes on where it was. Any number of processes gives the same features.

The protocols are those of the SER paper (Sections 4.1, 4.2, Appendix A.2); what it leaves open is said at each.
3DIEBench is judged as the paper does, by a linear classifier trained on its renderings: `linear --data` with these.
"""

from __future__ import annotations

import os

# Set ahead of torch: threads that spin while they wait stall each other when the machine is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from evaluation import finetune as finetuning
from evaluation import transformations, tsne
from evaluation.augmented import AugmentedBatches, AugmentedImages
from evaluation.classifiers import Batches, CachedBatches, Kind, choose_rate, fit, linear, mlp, predict, split, top
from evaluation.features import Some, read
from evaluation.progress import Progress
from evaluation.session import Session, Settings, folder_name, labels_as
from evaluation.shift import ClassFolders, LinearClassifier, accuracies
from pretraining.sources import open_source
from probes import knn_accuracy
from results import atomically
from safetensors.torch import save_file
from torch import Tensor, nn

from ser_reg import SERError

__all__ = ["Equivariance", "Finetune", "Knn", "Linear", "Mlp", "Probe", "Shift", "Tsne", "main"]


@dataclass(frozen=True, kw_only=True)
class Knn(Settings):
    """Vote of the nearest training images by cosine, each with weight exp(cosine / temperature).

    Table 3 of the paper: 20 neighbours. It does not state the temperature; 0.07 is DINO's. The embedding is the
    normalised [CLS], or what timm pools. Nothing is trained.
    """

    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of their weights."""

    def run(self) -> None:
        session = Session("knn", self)
        train, test = session.embeddings("train"), session.embeddings("val")
        results: dict[str, Any] = {"train_images": len(train.labels), "test_images": len(test.labels)}
        if session.main:
            sets = (train["pooled"], train.labels, test["pooled"], labels_as(test, train.classes, "evaluate.py knn"))
            results["top1"] = knn_accuracy(*sets, k=self.k, temperature=self.temperature, device=session.device)
            session.note(f"{self.k}-NN: {percent(results['top1'])} of {len(test.labels)} images")
        session.write(results)


@dataclass(frozen=True, kw_only=True)
class Trained(Settings):
    """What classifiers on frozen features share.

    The learning rate is chosen on a tenth of the training images (at most 50,000), held out at random; then the
    classifier is trained anew on all of them, and judged at the end of that training, once, on the test images.

    By default the features are those of the middle of each image, computed once: minutes instead of days. With
    --augment they are those of random crops and flips, computed anew in every epoch, which is the paper's protocol.
    """

    epochs: int = 50
    batch_size: int | None = None
    """Of all processes together; by default 1024, and less for fewer than 16,384 training images."""
    last: int = 4
    """Blocks whose normalised [CLS] are joined; 1 for a model without, of which the pooled output is used."""
    augment: bool = False
    """The paper's protocol: random crops and flips, features computed anew in every epoch."""


@dataclass(frozen=True, kw_only=True)
class Linear(Trained):
    """A linear classifier on the joined [CLS] of the last four blocks.

    Tables 1 and 2 of the paper: 50 epochs, cosine, no warm-up. SGD with momentum 0.9 and no decay, as MoCo-v3 and DINO
    have it. The paper's released code chooses among the rates 1, 3 and 10 and picks the best of the last epochs; here
    there are lower rates as well, for smaller data, and it is always the last epoch.

    The learning rate is chosen on held-out training images; see --augment for the paper's protocol. Leaves
    linear.safetensors for the subcommand shift.
    """

    base_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates to choose from, for a batch of 256; times batch / 256."""

    def run(self) -> None:
        session = Session("linear", self)
        head, results = train_classifier(session, self, linear(), self.base_rates, scaled=True)
        if session.main:
            path = self.output_dir / "linear.safetensors"
            LinearClassifier(head, results["classes"], self.last).save(path, session.encoder)
        session.write(results)


@dataclass(frozen=True, kw_only=True)
class Mlp(Trained):
    """A classifier of three layers on the same features.

    Table 3 of the paper, which names three layers and no more. ReLU between them, Adam without decay, cosine.
    """

    hidden: int = 1024
    """Channels between the layers."""
    base_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates to choose from, for any batch."""

    def run(self) -> None:
        session = Session("mlp", self)
        _, results = train_classifier(session, self, mlp(self.hidden), self.base_rates, scaled=False)
        session.write(results)


@dataclass(frozen=True, kw_only=True)
class Finetune(Settings):
    """Train the whole network and a linear layer, AdamW, warm-up and cosine, and judge it at the end, once.

    Table 3 of the paper, which gives no settings. These are near DeiT's, without mixing of images.
    """

    epochs: int = 100
    batch_size: int | None = None
    """Of all processes together; by default 1024, and less for fewer than 16,384 training images."""
    base_rate: float = 2.5e-4
    """Highest learning rate for a batch of 256; times batch / 256."""
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """Factor on the learning rate from a block to the one before: 0.65 to 0.75 is usual, 1 is none."""
    label_smoothing: float = 0.1
    precision: Literal["no", "bf16"] = "no"
    """Of the training; "no" is float32."""

    def run(self) -> None:
        session = Session("finetune", self, self.precision)
        train, val = session.source("train"), session.source("val")
        labels = torch.tensor([train.label(i) for i in range(len(train))])
        batch_size = self.batch_size or usual_batch(len(train))
        everything = list(range(len(train)))
        images = AugmentedImages(
            session.accelerator, train, everything, labels, session.encoder.size, batch_size, self.seed, self.workers
        )
        rate = self.base_rate * images.batch_size / 256
        recipe = finetuning.Recipe(
            self.epochs, self.warmup_epochs, rate, self.weight_decay, self.layer_decay, self.label_smoothing
        )
        key = session.key(train) | recipe._asdict() | {"batch_size": images.batch_size}
        progress = Progress(self.output_dir / "finetune.progress", key, session.main)
        start = finetuning.classifier(session.encoder, len(train.classes), self.seed)
        vit = finetuning.finetune(session.accelerator, session.encoder, start, images, recipe, progress, session.epochs)
        session.leave_out("train", images.all_unreadable())
        logits, test = session.logits(vit, val)
        results: dict[str, Any] = {"train_images": len(train), "test_images": len(test.labels), "rate": rate}
        results["batch_size"] = images.batch_size
        if session.main:
            results |= judged(session, logits, labels_as(test, train.classes, "evaluate.py finetune"))
            with atomically(self.output_dir / "finetune.safetensors") as part:
                state = {name: value.cpu().contiguous() for name, value in vit.state_dict().items()}
                save_file(state, part, metadata={"late_cls": str(session.encoder.late_cls or 0)})
        session.write(results)


@dataclass(frozen=True, kw_only=True)
class Probe(Settings):
    """Can a linear classifier read off features, layer by layer, how an image was turned, and whether it was flipped?

    Table 7 of the paper: layers 1, 3, 6, 9 and 12 (of other depths: as far into the model). It gives neither tokens
    nor classifier: here it is logistic regression on the mean patch token of one image, upright images of the
    training split to train on and of the test split to judge. Chance is 25 % and 50 %.
    """

    layers: tuple[int, ...] = ()
    """Numbers of blocks already run; by default those of the paper."""
    train_images: int = 5000
    """Random ones, each in all ways."""
    test_images: int = 2000
    """Random ones, each in all ways."""

    def run(self) -> None:
        session = Session("probe", self)
        layers = transformations.layers_of(session.encoder, self.layers)
        recipe = transformations.turned_tokens(layers)
        sets = []
        for part, n in (("train", self.train_images), ("val", self.test_images)):
            some = random_part(open_source(self.data, part, self.seed), n, self.seed)
            sets.append(session.features(some, f"{folder_name(self.data)}-{part}-{len(some)}-{self.seed}", recipe))
        results: dict[str, Any] = {"train_images": len(sets[0].indices), "test_images": len(sets[1].indices)}
        results["chance"] = {task: 1 / len(elements) for task, elements in transformations.TASKS.items()}
        if session.main:
            results["accuracy"] = transformations.probe(*sets, layers)
            for task, by_layer in results["accuracy"].items():
                told = ", ".join(f"layer {layer} {percent(accuracy)}" for layer, accuracy in by_layer.items())
                session.note(f"{task}: {told}; chance {percent(results['chance'][task])}")
        session.write(results)


@dataclass(frozen=True, kw_only=True)
class Equivariance(Settings):
    """How far do tokens move as the image does? Raw and spatial cosines of test images, beside their floors.

    The raw reading is the paper's (Appendix A.2, Table 4); see ser_reg.equivariance_score for the others.
    """

    layers: tuple[int, ...] = ()
    """Numbers of blocks already run; by default all."""
    images: int = 512
    """Random test images."""

    def run(self) -> None:
        session = Session("equivariance", self)
        some = random_part(open_source(self.data, "val", self.seed), self.images, self.seed)
        results: dict[str, Any] = {}
        if session.main:
            images, unreadable = read(some, session.encoder.size, self.workers)
            session.leave_out("val", unreadable)
            scores = transformations.mean_scores(
                session.encoder, images, self.layers or None, self.seed, session.device
            )
            results = {"images": len(images), "scores": scores}
            for name, by_layer in scores.items():
                last = max(by_layer)
                cells = ", ".join(f"{reading} {value:.3f}" for reading, value in by_layer[last].items())
                session.note(f"{name}, layer {last}: {cells}")
        session.write(results)


@dataclass(frozen=True, kw_only=True)
class Shift(Settings):
    """Judge the classifier of the subcommand linear on other images of the same classes.

    For ImageNet-V2, ImageNet-R and ImageNet-Sketch (Tables 1 and 2 of the paper), and any FOLDER/CLASS/*.jpg whose
    classes are some of the training's. Numbered folders, as ImageNet-V2 has, are places among the training classes.
    Accuracy is given among the classes that occur, and among all.
    """

    folders: tuple[Path, ...]
    """Folders of folders of images."""
    classifier: Path | None = None
    """By default OUTPUT_DIR/linear.safetensors."""

    def run(self) -> None:
        session = Session("shift", self)
        path = self.classifier or self.output_dir / "linear.safetensors"
        classifier = LinearClassifier.load(path, session.encoder)
        classifier.layer.to(session.device)
        recipe, name = session.class_tokens(classifier.last)
        sources = {folder: ClassFolders(folder, classifier.classes) for folder in self.folders}  # all looked at first
        results = {}
        for folder, source in sources.items():
            features = session.features(source, folder_name(str(folder)), recipe)
            if session.main:
                found = accuracies(classifier.layer, features[name], features.labels)
                results[str(folder)] = found
                among = f"among {found['classes']} classes, {percent(found['top1_among_all'])} among all"
                session.note(f"{folder}: {percent(found['top1'])} of {found['images']} images {among}")
            session.write(results)


@dataclass(frozen=True, kw_only=True)
class Tsne(Settings):
    """Embeddings of test images of some classes in the plane, as a picture and as coordinates.

    Figure 4 of the paper: 20 random classes. t-SNE of the directions of the embeddings, begun from their principal
    components.
    """

    classes: int = 20
    """Random ones."""
    per_class: int = 50
    """Random images of each, at most."""
    perplexity: float = 30.0

    def run(self) -> None:
        session = Session("tsne", self)
        features = session.embeddings("val")
        results: dict[str, Any] = {}
        if session.main:
            places = tsne.some_classes(features.labels, self.classes, self.per_class, self.seed)
            plane = tsne.embed_in_plane(features["pooled"][places], self.perplexity, self.seed)
            labels = features.labels[places]
            picture = self.output_dir / "tsne.png"
            with atomically(picture) as part:
                tsne.draw(part, plane, labels, features.classes, f"{self.model}: {len(places)} images")
            results = {
                "picture": str(picture),
                "images": features.indices[places].tolist(),
                "classes": [features.classes[label] for label in labels.tolist()],
                "coordinates": plane.tolist(),
            }
            session.note(f"{picture}")
        session.write(results)


def train_classifier(
    session: Session, settings: Trained, kind: Kind, base_rates: tuple[float, ...], scaled: bool
) -> tuple[Any, dict[str, Any]]:
    """A classifier trained on all training images at the rate that held-out ones chose, and what came of it.

    Without --augment only the main process trains, and the others have no classifier.
    """
    recipe, name = session.class_tokens(settings.last)
    source = session.source("train")
    test = session.split("val", recipe)
    classes = source.classes
    labels_as(test, classes, f"evaluate.py {session.name}")  # ahead of the training
    batch_size = settings.batch_size or usual_batch(len(source))
    rates = [rate * batch_size / 256 if scaled else rate for rate in base_rates]
    device, seed = session.device, settings.seed
    protocol = "random crops and flips, drawn anew in every epoch" if settings.augment else "the middle of each image"
    session.note(f"{session.name} on {protocol}" + ("" if settings.augment else " (--augment: the paper's protocol)"))

    if settings.augment:
        labels = torch.tensor([source.label(i) for i in range(len(source))])
        inner, held = (part.tolist() for part in split(len(source), seed))
        held_name = f"{folder_name(settings.data)}-train-held-out-{seed}"
        judge = session.features(Some(source, held), held_name, recipe)
        drawn: list[AugmentedImages] = []

        def batches(indices: list[int]) -> Batches:
            size, workers = session.encoder.size, settings.workers
            drawn.append(AugmentedImages(session.accelerator, source, indices, labels, size, batch_size, seed, workers))
            return AugmentedBatches(drawn[-1], session.encoder, lambda *both: recipe.compute(*both)[name])

        on_part, on_all = batches(inner), batches(list(range(len(source))))
        judge_features, judge_labels, count = judge[name], judge.labels, len(source)
    else:
        train = session.split("train", recipe)
        if not session.main:
            return None, {}
        features, labels, count = train[name], train.labels, len(train.labels)
        part, held_out = split(count, seed)
        on_part, on_all = (CachedBatches(features, labels, batch_size, seed, device, places) for places in (part, None))
        judge_features, judge_labels = features[held_out], labels[held_out]

    def trained(which: str, rates: list[float], batches: Batches) -> list[nn.Module]:
        progress = None
        if settings.augment:  # hours; on kept features it is minutes
            key = session.key(source) | {"rates": rates, "epochs": settings.epochs, "last": settings.last}
            path = settings.output_dir / f"{session.name}-{which}.progress"
            progress = Progress(path, key | {"batch_size": batch_size}, session.main)
        channels = judge_features.shape[1]
        return fit(
            kind, channels, len(classes), rates, batches, settings.epochs, seed, device, progress, session.epochs
        )

    found = choose_rate(trained("choice", rates, on_part), rates, judge_features, judge_labels)
    [best] = broadcast_object_list([next(iter(found))]) if settings.augment else [next(iter(found))]
    session.note(f"learning rate {best:g}: {percent(found[best])} of {len(judge_labels)} held-out training images")
    if best in (min(rates), max(rates)) and len(set(found.values())) > 1:
        end = "lowest" if best == min(rates) else "highest"
        tried = " ".join(f"{rate:g}" for rate in base_rates)
        session.note(f"that is the {end} of --base-rates {tried}: beyond it there may be better ones")
    [head] = trained("all", [best], on_all)
    if settings.augment:
        session.leave_out("train", sorted({one for images in drawn for one in images.all_unreadable()}))
    results = judged(session, predict(head, test[name]), labels_as(test, classes, f"evaluate.py {session.name}"))
    results |= {"protocol": protocol, "train_images": count, "test_images": len(test.labels), "classes": classes}
    results |= {"batch_size": batch_size, "rate": best, "held_out_accuracy": found}
    return head, results


def judged(session: Session, scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 of logits on test images."""
    found = {"top1": top(scores, labels, 1), "top5": top(scores, labels, 5)}
    top1, top5 = percent(found["top1"]), percent(found["top5"])
    session.note(f"{session.name}: top-1 {top1}, top-5 {top5} of {len(labels)} test images")
    return found


def usual_batch(images: int) -> int:
    """1024, or the power of two that gives at least 16 steps an epoch; 16 at the least."""
    batch = 1024
    while batch > 16 and 16 * batch > images:
        batch //= 2
    return batch


def random_part(source: Any, n: int, seed: int) -> Some:
    """At most n images of a source, drawn without replacement, in its order."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    return Some(source, order[:n].sort().values.tolist())


def percent(part: float) -> str:
    return f"{100 * part:.2f} %"


def main(arguments: list[str] | None = None) -> None:
    """One evaluation from the command line."""
    settings = tyro.cli(Knn | Linear | Mlp | Finetune | Probe | Equivariance | Shift | Tsne, args=arguments)
    try:
        settings.run()
    finally:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except SERError as error:
        sys.exit(str(error))

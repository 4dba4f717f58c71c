"""Kinds of pictures: how often `prepare` is right.

Command:  python benchmarks/run_kinds.py --figures DIR [--photos DIR] [--refit]

Diagram, plot, photo or table, by the features and the logistic regression of `OpenSciDraw/reading/kinds.py`. The
figures are those of a labelled folder (`captions.jsonl` with `file_name`, `kind`, `source`), with the labels put right
where a look at the pictures showed another kind; figures that the program draws; photos of scikit-image and
scikit-learn where they are installed, and of `--photos`; and tables drawn here, because there are no real ones.

Figures of one gallery page, and copies of one picture, are always on the same side of a split. The weights that ship
are fitted on all; the table is of five-fold cross-validation, and the last rows of sources left out whole.

The notes say how well the text estimate agrees with the true boxes of labels in drawn figures, and with the number of
characters in real ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import BENCHMARKS, Result

from OpenSciDraw.drawn.figure import draw_figure
from OpenSciDraw.figures.decode import decode_picture
from OpenSciDraw.reading.kinds import FEATURES, KINDS, background_colour, kind_features
from OpenSciDraw.reading.text_share import text_share

WEIGHTS = BENCHMARKS.parent / "OpenSciDraw" / "prepare" / "kind_weights.py"
DECAY = 1e-2  # L2 on the weights of standardised features; not tuned
FOLDS = 5
# What a look at the pictures says, where the folder's label is of the page's topic or of the drawing program.
RELABELLED = {
    "plot": r"networkx_.*(partition_1|rcm_1|degree_1|eigenvalues_1)|janosh_(amplitude-modulation|bose-einstein-distribution.*|"
    r"concave-functions|convex-functions|convex-hull-of-stability|fermi-dirac-distro|frequency-modulation|heatmap|"
    r"gas-pressure-on-wall|grand-canonical-occupation-fluctuations|jensens-inequality|maxwell-boltzmann-distribution|"
    r"ml-activations|qm-cost-vs-acc|roc-curve|saddle-point|signal-sampling|spontaneous-magnetization|"
    r"statistical-energy-distributions|tanh|theta-beta-m-diagram|light|two-point-no-cutoff|sabatier-principle)",
    "diagram": r"networkx_.*|mpl_examples_showcase_firefox_1|openstax_physics_.*(06_01_ArcLength|08_03_Scattered|14_01_Vibrations|"
    r"05_01_vector\(.\)|22_01_NRGDiagram|02_02_plane|20_01_Emagpole|17_01_2slit4|20_03_light|05_01_tall|05_01_magnitude|"
    r"17_02_Resolutn2|05_03_firework|21_03_Comet)",
    "photo": r"openstax_physics_.*(09_01_Joule|18_01_VDGman|17_02_Grating2|05_02_weather|01_01_eye|23_01_LIGO_img|15_00_Coralreef|"
    r"06_03_Tornado|14_00_Tree|06_03_IceSkater)",
    "": r"networkx_.*(beam_search|lanl_routes|atlas|decomposition)_1|seaborn_part_whole_bars_1",  # (nearly) empty: left out
}  # fmt: skip
DRAWN = {"pipeline": "diagram", "flowchart": "diagram", "method": "diagram", "network": "diagram", "graph": "diagram",
         "tree": "diagram", "line": "plot", "bar": "plot", "scatter": "plot", "table": "table"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    image: Image.Image
    kind: str
    source: str
    group: str
    characters: int = -1  # in the picture, where they are known
    text: float = -1  # share of the picture that its labels cover, where it is known


def real_figures(folder: Path) -> Iterator[Example]:
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        stem = Path(entry["file_name"]).stem
        kind = next((new for new in ("", "plot", "photo", "diagram") if re.fullmatch(RELABELLED[new], stem)), entry["kind"])
        if kind:
            image = decode_picture((folder / entry["file_name"]).read_bytes())
            characters = sum(map(len, entry["figure_texts"])) if entry.get("figure_texts") else -1
            yield Example(image, kind, entry["source"], re.sub(r"[_\d]+$", "", stem), characters)


def drawn_figures(count: int) -> Iterator[Example]:
    for index in range(count):
        figure = draw_figure(23, index, (256, 384, 512, 768)[index % 4])
        boxes = [label["box"] for label in figure.truth["labels"]]
        area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        share = area / (figure.image.width * figure.image.height)
        yield Example(figure.image, DRAWN[figure.truth["kind"]], "drawn", figure.id, text=share)


def photos(folder: Path | None) -> Iterator[Example]:
    """Each whole, and its middle as another example of the same group."""
    paths = sorted(folder.rglob("*.*")) if folder else []
    try:
        import skimage.data

        names = ("astronaut brick camera cell chelsea coffee coins grass gravel hubble_deep_field ihc microaneurysms moon "
                 "motorcycle_left retina rocket").split()  # fmt: skip
        paths += [path for path in sorted(Path(skimage.data.__path__[0]).glob("*.*")) if path.stem in names]
    except ImportError:
        print("no scikit-image: its photos are left out")
    try:
        import sklearn.datasets

        paths += sorted(Path(sklearn.datasets.__path__[0]).glob("images/*.jpg"))
    except ImportError:
        print("no scikit-learn: its photos are left out")
    for path in paths:
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            image = decode_picture(path.read_bytes())
            image.thumbnail((1200, 1200))
            yield Example(image, "photo", "photos", path.stem)
            width, height = image.size
            yield Example(image.crop((width // 4, height // 4, width * 3 // 4, height * 3 // 4)), "photo", "photos", path.stem)


def tables(count: int) -> Iterator[Example]:
    """Ruled as in papers: three lines, all lines, or stripes; numbers, words, a bold best value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for index in range(count):
        chance = np.random.default_rng(index)
        rows, columns = int(chance.integers(3, 16)), int(chance.integers(3, 9))
        family, size = str(chance.choice(["DejaVu Serif", "DejaVu Sans", "STIXGeneral"])), float(chance.uniform(8, 13))
        line, column = size / 72 * float(chance.uniform(1.3, 2)), size / 72 * float(chance.uniform(4, 6.5))
        figure = pyplot.figure(figsize=(columns * column, rows * line), dpi=float(chance.choice([75, 100, 150, 200])))
        style = ("three lines", "all lines", "stripes")[index % 3]
        for row in range(rows + 1):
            if style == "all lines" or style == "three lines" and row in (0, 1, rows):
                figure.add_artist(pyplot.Line2D([0.01, 0.99], [1 - row / rows * 0.98 - 0.01] * 2, color="black", lw=0.8))
            if style == "stripes" and row % 2:
                height = 0.98 / rows
                figure.add_artist(pyplot.Rectangle((0, 0.99 - (row + 1) * height), 1, height, color="0.9", zorder=-1))
        for cut in range(columns + 1):
            if style == "all lines":
                figure.add_artist(pyplot.Line2D([0.01 + 0.98 * cut / columns] * 2, [0.01, 0.99], color="black", lw=0.8))
        for row in range(rows):
            best = int(chance.integers(1, columns))
            for place in range(columns):
                word = "".join(chance.choice(list("abcdefghiklmnoprstuvw"), size=int(chance.integers(3, 9))))
                text = word.capitalize() if row == 0 or place == 0 else f"{chance.uniform(0, 100):.{int(chance.integers(0, 3))}f}"
                figure.text(
                    0.02 + 0.98 * place / columns, 1 - (row + 0.5) / rows, text, family=family, size=size, va="center",
                    weight="bold" if place == best and index % 2 else "normal",
                )  # fmt: skip
        data = BytesIO()
        figure.savefig(data, format="png")
        pyplot.close(figure)
        yield Example(decode_picture(data.getvalue(), max_aspect_ratio=100), "table", "tables", f"table{index}")


# -- the model -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Model:
    """scores = (features - mean) / scale @ weights + bias"""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def kinds(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(((features - self.mean) / self.scale @ self.weights + self.bias).argmax(axis=1))


def fit(features: np.ndarray, kinds: np.ndarray) -> Model:
    """Multinomial logistic regression; every kind weighs the same, however many examples it has."""
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs, targets = torch.from_numpy((features - mean) / scale), torch.from_numpy(kinds)
    count = np.bincount(kinds, minlength=len(KINDS))
    balance = torch.from_numpy(len(kinds) / len(KINDS) / np.maximum(count, 1))
    weights = torch.zeros(features.shape[1], len(KINDS), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(KINDS), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weights + bias, targets, weight=balance)
        value = value + DECAY * weights.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return Model(mean, scale, weights.detach().numpy(), bias.detach().numpy())


def write_weights(model: Model) -> None:
    def numbers(values: np.ndarray) -> str:
        return "np.array([\n" + "".join(f"    {v!r},\n" for v in np.round(values, 4).tolist()) + "])"

    WEIGHTS.write_text(
        '"""Numbers of the model in kinds.py. Written by `benchmarks/run_kinds.py --refit`; not to be edited by hand."""\n\n'
        f"import numpy as np\n\n# fmt: off\nKINDS = {KINDS!r}\nMEAN = {numbers(model.mean)}\nSCALE = {numbers(model.scale)}\n"
        f"WEIGHTS = {numbers(model.weights)}\nBIAS = {numbers(model.bias)}\n".replace("'", '"'),
        encoding="utf-8",
    )


# -- the measurement -------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--refit", action="store_true", help="write kind_weights.py anew")
    given = parser.parse_args()
    examples = [*real_figures(given.figures), *drawn_figures(240), *photos(given.photos), *tables(90)]
    shares = np.array([text_share(example.image.convert("L")) for example in examples])
    features = np.stack([
        kind_features(example.image, background_colour(np.asarray(example.image)), share)
        for example, share in zip(examples, shares, strict=True)
    ])  # fmt: skip
    truth = np.array([KINDS.index(example.kind) for example in examples])
    fold = np.array([int(hashlib.sha256(example.group.encode()).hexdigest(), 16) % FOLDS for example in examples])
    source = np.array([example.source for example in examples])
    guess = np.empty_like(truth)
    for part in range(FOLDS):
        guess[fold == part] = fit(features[fold != part], truth[fold != part]).kinds(features[fold == part])
    if given.refit:
        write_weights(fit(features, truth))
    report(examples, features, truth, source, guess, shares)


def report(
    examples: list[Example], features: np.ndarray, truth: np.ndarray, source: np.ndarray, guess: np.ndarray, shares: np.ndarray
) -> None:
    result = Result("kinds", "python benchmarks/run_kinds.py --figures DIR --photos DIR", ["truth", *KINDS, "right"])
    real = (source != "drawn") & (source != "tables")
    for title, chosen in (("real, cross-validated", real), ("drawn, cross-validated", ~real)):
        for number, kind in enumerate(KINDS):
            row = np.bincount(guess[chosen & (truth == number)], minlength=len(KINDS))
            if row.sum():
                result.rows.append([f"{kind} ({title})", *map(str, row), f"{row[number] / row.sum():.1%}"])
                result.numbers[f"{title} {kind}"] = row.tolist()
    for name in sorted(set(source)):
        left_out = source == name
        if set(truth[left_out]) <= set(truth[~left_out]):
            found = fit(features[~left_out], truth[~left_out]).kinds(features[left_out])
            row = np.bincount(found, minlength=len(KINDS))
            right = float((found == truth[left_out]).mean())
            result.rows.append([f"{name}, left out of the fit", *map(str, row), f"{right:.1%}"])
            result.numbers[f"left out {name}"] = right
    counts = ", ".join(f"{(source == name).sum()} {name}" for name in sorted(set(source)))
    result.notes.append(f"{len(examples)} pictures ({counts}); {len(FEATURES)} features.")
    drawn = np.array([example.text for example in examples])
    characters = np.array([example.characters for example in examples])
    area = np.array([example.image.width * example.image.height for example in examples])
    known, typed = drawn >= 0, characters >= 0
    correlation = float(np.corrcoef(drawn[known], shares[known])[0, 1])
    ranks = np.stack([values.argsort().argsort() for values in (characters[typed], (shares * area)[typed])])
    rank_correlation = float(np.corrcoef(ranks)[0, 1])
    result.numbers |= {"text correlation drawn": correlation, "text rank correlation real": rank_correlation}
    result.notes.append(
        f"Text estimate: correlation {correlation:.2f} with the share that labels cover in {known.sum()} drawn figures; rank "
        f"correlation {rank_correlation:.2f} with the characters in {typed.sum()} real ones."
    )
    result.save()


if __name__ == "__main__":
    main()

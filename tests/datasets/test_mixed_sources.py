"""Several sources in one data set: shares, repeats, captions by pass, resume; regularisation and prior preservation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, make_model, train_and_resume

from OpenSciDraw import flow
from OpenSciDraw.config import Config, load_config, load_saved_config, save_config
from OpenSciDraw.datasets.batch import Sample, collate
from OpenSciDraw.datasets.source_sampler import Quota, SourceSampler
from OpenSciDraw.encode import run as encode
from OpenSciDraw.train_iteration_funcs.flow_matching import Place, flow_matching_loss

BUCKETS, SOURCES = np.array([0, 1, 0, 0, 1, 1, 0, 0, 1, 0]), np.array([0] * 7 + [1] * 3)


def sampler(first: float | None, second: float | None, repeats: tuple[float, float] = (1, 1), **options: object) -> SourceSampler:
    quotas = [Quota("a", first, repeats[0]), Quota("b", second, repeats[1])]
    given = {"batch_size": 2, "seed": 3, **options}
    return SourceSampler(BUCKETS, source_of=SOURCES, quotas=quotas, total=100, rows=np.arange(10) * 10, **given)  # type: ignore[arg-type]


def epoch(of: SourceSampler, number: int) -> list[tuple[int, int]]:
    """(row, pass) of all that an epoch yields."""
    of.set_epoch(number)
    return [(index % 100, number + index // 100) for batch in of for index in batch]


def test_an_epoch_has_each_source_by_its_share_and_every_row_comes_equally_often() -> None:
    made = sampler(0.25, 0.75)
    assert made.per_epoch == [2, 8]
    counts: Counter[int] = Counter()
    seen: list[tuple[int, int]] = []
    for number in range(21):
        found = epoch(made, number)
        assert sum(row < 70 for row, _ in found) == 2 and len(found) == 10
        counts.update(row for row, _ in found)
        seen += found
    assert [counts[row] for row in range(0, 70, 10)] == [6] * 7 and [counts[row] for row in range(70, 100, 10)] == [56] * 3
    assert len(set(seen)) == len(seen)  # no row twice in one pass
    assert {p for row, p in seen if row < 70} == set(range(6)) and {p for row, p in seen if row >= 70} == set(range(56))


def test_repeats_go_through_a_source_so_often_an_epoch() -> None:
    made = sampler(None, None, (0.5, 3))
    first, second = epoch(made, 0), epoch(made, 1)
    assert [Counter(row >= 70 for row, _ in found)[True] for found in (first, second)] == [9, 9]
    assert Counter(row for row, _ in first if row >= 70) == {70: 3, 80: 3, 90: 3}
    assert len(first) == 4 + 9 and len({row for row, _ in [*first, *second] if row < 70}) == 7


def test_batches_are_of_one_bucket_and_mix_sources() -> None:
    made = sampler(0.5, 0.5, batch_size=4)
    mixed = 0
    for number in range(10):
        made.set_epoch(number)
        for batch in made:
            rows = np.array(batch) % 100 // 10
            assert len(set(BUCKETS[rows])) == 1
            mixed += len(set(SOURCES[rows])) == 2
    assert mixed >= 10


@pytest.mark.parametrize("world", [1, 2])
def test_going_on_from_any_place_gives_the_same_batches(world: int) -> None:
    whole = {r: list(x) for r in range(world) for x in [sampler(0.3, 0.7, num_replicas=world, rank=r)]}
    for stop in range(len(whole[0])):
        for rank in range(world):
            part = sampler(0.3, 0.7, num_replicas=world, rank=rank)
            part.set_epoch(0, stop)
            again = sampler(0.3, 0.7, num_replicas=world, rank=rank)
            again.load_state_dict(part.state_dict())
            assert list(again) == whole[rank][stop:]


def test_another_batch_size_goes_on_with_the_rows_that_are_left() -> None:
    part = sampler(0.3, 0.7)
    part.set_epoch(2)
    done = list(part)[:2]
    part.set_epoch(2, 2)
    again = sampler(0.3, 0.7, batch_size=3)
    again.load_state_dict(part.state_dict())
    left = [index for batch in [*done, *again] for index in batch]
    assert sorted((i % 100, i // 100) for i in left) == sorted((r, p - 2) for r, p in epoch(sampler(0.3, 0.7), 2))


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of 12 figures in the house style and 12 of the base's."""
    folder = tmp_path_factory.mktemp("sources")
    for name, figures in (("house", "drawn:12:style=house:size=128"), ("base", "drawn:12:style=small:size=128")):
        values = {**BASE, "dataset": {"base_dir": str(folder), "parquet_base_path": name},
                  "encode": {"figures": figures, "resolution": 128, "num_workers": 0, "batch_size": 8}}  # fmt: skip
        assert encode.main(Config.model_validate(values)) == 0
    return folder


def mixed(folder: Path, keep: bool = False, **changes: object) -> dict:
    sources = [{"path": "house", "share": 0.5}, {"path": "base", "share": 0.5, "weight": 0.5, "keep_base": keep}]
    dataset = {"type": "MixedSources", "base_dir": str(folder), "sources": sources}
    return {**BASE, "dataset": dataset, "held_out_examples": 0, **changes}


@pytest.mark.parametrize("keep", [False, True])
def test_a_mixed_run_resumes_to_the_bit(
    keep: bool, two_stores: Path, tmp_path: Path, fresh_accelerate, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setattr(encode, "main", lambda values: 0)  # the stores are there
    values = mixed(two_stores, keep, max_train_steps=3, checkpointing_steps=2, model_output_dir=str(tmp_path / "run"))
    first, again = train_and_resume(values, tmp_path / "run")
    assert all(torch.equal(first[name], again[name]) for name in first)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"source_share_house"' in metrics and '"source_loss_base"' in metrics


def test_kept_rows_are_trained_on_what_the_base_predicts(two_stores: Path) -> None:
    """Against a float64 formula; where the policy is the base, the kept rows have no loss."""
    from contextlib import contextmanager

    model = make_model()
    torch.manual_seed(1)
    latents, text = torch.randn(3, *model.latent_shape(128, 128)), torch.randn(3, *model.text_shape())
    kept = (False, True, True)
    samples = [
        Sample(str(at), "", latents[at], text[at], keeps_base=keep, source=int(keep), weight=1 + keep)
        for at, keep in enumerate(kept)
    ]
    config = Config.model_validate(mixed(two_stores, True, caption_dropout=0.0, train_batch_size=3))

    policy = {name: p.detach().clone() for name, p in model.transformer.named_parameters()}
    changed = {name: p + 0.01 * torch.randn_like(p) for name, p in policy.items()}

    @contextmanager
    def base():  # type: ignore[no-untyped-def]
        model.transformer.load_state_dict(policy, strict=False)
        yield
        model.transformer.load_state_dict(now, strict=False)

    model.reference_policy = base
    with torch.no_grad():
        for now in (policy, changed):
            model.transformer.load_state_dict(now, strict=False)
            losses = []
            for world in (1, 2):  # several processes run the base on the whole batch: the same loss
                output = flow_matching_loss(model, collate(samples), Place(0, 0, 0, world), config, text[0])
                clean, ids = model.normalize(latents), ["0", "1", "2"]
                noise = flow.keyed_noise(0, 0, ids, clean.shape[1:])
                inputs = flow.interpolate(clean, noise, output.sigma), output.sigma, model.collate_text(list(text))
                predicted = model.velocity(*inputs).double()
                with base():
                    target = torch.stack([(noise - clean)[0], *model.velocity(*inputs)[1:]]).double()
                each = (predicted - target).pow(2).flatten(1).mean(1)
                wanted = (each * torch.tensor([1.0, 2.0, 2.0])).mean()
                torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-4, atol=1e-7)
                losses.append(output.per_sample)
                assert output.means is not None and output.means.names[:2] == ("source_share_house", "source_share_base")
                assert output.means.sums[0, :2].tolist() == [1, 2] and output.means.sums[1].tolist() == [3, 3, 1, 2]
            if now is policy:
                assert losses[0][0] > 0.1 and losses[0][1:].max() < 1e-8
            else:
                assert losses[0][1:].min() > 1e-6


def test_a_saved_config_with_sources_is_read_back_equal(tmp_path: Path) -> None:
    config = Config.model_validate(mixed(tmp_path, True))
    save_config(config, tmp_path / "config.py")
    assert load_saved_config(tmp_path / "config.py") == config  # by literals alone
    assert load_config(tmp_path / "config.py") == config


@pytest.mark.parametrize(("change", "reason"), [
    ({"sources": []}, "sources go with"),
    ({"type": "ArXiVParquetDatasetV2"}, "sources go with"),
    ({"sources": [{"path": "a", "share": 1}, {"path": "b"}]}, "some sources have a share"),
    ({"sources": [{"path": "a", "share": 1, "repeats": 2}]}, "Leave repeats out"),
    ({"sources": [{"path": "a"}, {"path": "a"}]}, "two sources are called 'a'"),
    ({"num_train_examples": 3}, "does not act on several sources"),
])  # fmt: skip
def test_keys_that_would_not_act_are_refused(change: dict, reason: str, tmp_path: Path) -> None:
    values = mixed(tmp_path)
    values["dataset"] = {**values["dataset"], **change}
    with pytest.raises(ValueError, match=reason):
        Config.model_validate(values)

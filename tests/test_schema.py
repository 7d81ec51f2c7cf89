"""The record of a run: units, columns and splits are those of the training, whatever becomes of the file."""

import dataclasses
import json
import shutil
import warnings
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyro_vae import checkpoint, defaults_for, fit, load_dataset, load_run
from pyro_vae.cli import main
from pyro_vae.data import Schema, SchemaWarning, joined, load_again, read, rows_of, save_table
from pyro_vae.data.schema import row_checksums
from pyro_vae.guides import AmortizedGuide, StateSpaceGuide
from pyro_vae.models import VAE, ConditionalVAE, DeepMarkovModel, LinearVAE, StateSpaceModel, likelihoods
from pyro_vae.models.transitions import Emission, Initial, LinearTransition
from pyro_vae.nn import MLP

RNG = np.random.default_rng(0)
NAMES = ["a", "b", "c"]
LOCATION, SCALE = np.array([10.0, -300.0, 0.02]), np.array([2.0, 50.0, 0.001])


def rows(count, seed=0):
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(count, 1))
    return LOCATION + SCALE * (z + 0.3 * generator.normal(size=(count, 3)))


def written(path, x, names=NAMES, **more):
    frame = pandas.DataFrame(x, columns=names)
    for name, values in more.items():
        frame[name] = values
    frame.to_csv(path, index=False)
    return path


def trained(folder, path, **options):
    """A run of a small pair on a file, and its data set."""
    dataset = load_dataset(path, **options)
    model = LinearVAE(tuple(dataset.event_shape), 1)
    guide = AmortizedGuide(model, MLP((8,)))
    run = fit(model, guide, dataset.train, valid=dataset.valid, epochs=3, out=folder, progress=False)
    return load_run(run.path), dataset


def said(call, *arguments, **options):
    """What a call gives, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call(*arguments, **options)
    assert all(issubclass(each.category, SchemaWarning) for each in caught)
    return found, [str(each.message) for each in caught]


# ------------------------------------------------------------ the record


def test_the_record_in_full(tmp_path):
    x = rows(100)
    x[:, 1] = np.round(np.abs(x[:, 1]))
    path = written(tmp_path / "t.csv", x, kind=["p", "q"] * 50, number=range(100), flag=[0, 1, 1, 0] * 25)
    dataset = load_dataset(path, label="kind", id="number")
    schema = dataset.schema
    table = json.loads(schema.to_json())
    assert table["version"] == 1 and table["label"] == "kind" and table["id"] == "number" and table["time"] is None
    assert table["event_shape"] == [4] and table["classes"] == ["p", "q"] and not table["sequences"]
    assert [(each["name"], each["kind"]) for each in table["columns"]] == [
        ("a", "real"),
        ("b", "count"),
        ("c", "real"),
        ("flag", "binary"),
    ]
    training = np.column_stack([x, [0, 1, 1, 0] * 25])[dataset.train.ids.astype(int)]
    np.testing.assert_allclose([each["location"] for each in table["columns"]], training.mean(0), rtol=1e-12)
    np.testing.assert_allclose([each["scale"] for each in table["columns"]], training.std(0), rtol=1e-12)
    assert {part: len(sums) for part, sums in table["checksums"].items()} == {"train": 80, "valid": 10, "test": 10}
    assert {"python", "torch", "pyro-ppl", "pyro_vae"} <= table["versions"].keys()
    assert {"what": "real values standardised per column", "option": "data.standardize false"} in table["choices"]
    assert table["source"]["name_or_path"] == str(path)
    again = Schema.from_json(schema.to_json())
    assert again.to_json() == schema.to_json() and again.columns == schema.columns
    assert all(np.array_equal(again.checksums[part], schema.checksums[part]) for part in schema.checksums)
    assert Schema.from_state(schema.state_dict(), "here").to_json() == schema.to_json()
    assert schema.scale.tolist() == [each["scale"] for each in table["columns"]]  # in double precision
    assert schema.location.tolist() == [each["location"] for each in table["columns"]]


def test_foreign_and_later_records(tmp_path):
    text = load_dataset(written(tmp_path / "t.csv", rows(30))).schema.to_json()
    table = json.loads(text)
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({**table, "version": 2}))
    with pytest.raises(ValueError, match="expected version 1 or before in .*, got 2: update pyro_vae"):
        Schema.load(path)
    column = {"name": "a", "kind": "real", "location": 0, "scale": 1}
    for change in (
        {"version": "1"},
        {"columns": [column | {"kind": "colour"}]},
        {"columns": [column | {"scale": 0}]},
        {"columns": 3},
        {"checksums": {"train": ["no number"]}},
        {"event_shape": None},
    ):
        path.write_text(json.dumps({**table, **change}))
        with pytest.raises(ValueError, match="expected the record of a data set"):
            Schema.load(path)
    for content in (b"{", b"[]", b"\xff\xfe", b"null"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected"):
            Schema.load(path)
    with pytest.raises(FileNotFoundError, match="expected a run's schema.json"):
        Schema.load(tmp_path / "none.json")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=12),
    st.lists(st.integers(0, 4), max_size=6),
    st.lists(st.integers(0, 4), max_size=6),
    st.lists(st.integers(0, 6), max_size=15),
)
def test_rows_are_told_by_counting(train, valid, test, now):
    """Against counting one by one: of rows that are alike the first are the training's."""
    sums = [np.array(part, dtype=np.uint64) for part in (train, valid, test)]
    schema = Schema("t", (1,), checksums=dict(zip(("train", "valid", "test"), sums, strict=True)))
    left = [Counter(part) for part in (train, valid, test)]
    expected = []
    for row in now:
        part = next((i for i in range(3) if left[i][row] > 0), None)
        if part is None:
            expected.append("train" if row in train else "valid" if row in valid else "")
        else:
            left[part][row] -= 1
            expected.append(("train", "valid", "test")[part])
    assert schema.parts_of(np.array(now, dtype=np.uint64)).tolist() == expected


def test_checksums_tell_rows_apart():
    grid = torch.cartesian_prod(*[torch.arange(0.0, 30.0)] * 3)
    assert len({*row_checksums(grid).tolist()}) == len(grid)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 16)
    assert len({*row_checksums(bits).tolist()}) == len(bits)
    x = torch.randn(50, 4)
    x[3, 2] = torch.nan
    assert np.array_equal(row_checksums(x), row_checksums(torch.cat([x, torch.zeros(50, 3)], 1)))  # padding
    assert np.array_equal(row_checksums(x), row_checksums(x.double())) and len({*row_checksums(x).tolist()}) == 50
    assert np.array_equal(row_checksums(x[:, None]), row_checksums(x))
    assert not (row_checksums(x, x) == row_checksums(x)).any()
    assert np.array_equal(row_checksums(torch.tensor([[-0.0]])), row_checksums(torch.tensor([[0.0]])))


# ------------------------------------------------------------ runs and their files


@pytest.fixture(scope="module")
def on_a_table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on a table")
    path = written(folder / "t.csv", rows(100), kind=["p", "q"] * 50)
    run, dataset = trained(folder / "run", path, label="kind")
    return run, dataset, path


def test_the_run_keeps_the_record(on_a_table):
    run, dataset, _ = on_a_table
    assert (run.path / "schema.json").read_text() == dataset.schema.to_json() == run.schema.to_json()
    state = checkpoint.load(run.path / "checkpoints" / "last.safetensors")
    assert Schema.from_state(state["schema"], "here").to_json() == dataset.schema.to_json()
    (run.path / "schema.json").write_text(dataset.schema.to_json().replace('"location"', '"Location"', 1))
    loaded, warned = said(load_run, run.path)
    assert "is not the record that the weights were trained by" in warned[0] and len(warned) == 1
    assert loaded.schema.to_json() == dataset.schema.to_json()
    (run.path / "schema.json").unlink()
    assert said(load_run, run.path)[1] == []
    (run.path / "schema.json").write_text(dataset.schema.to_json())


def test_columns_by_name(on_a_table, tmp_path):
    """In any order, among others, one row or many, constant or not, without labels: each row scores as it did."""
    run, dataset, path = on_a_table
    test = dataset.test
    expected = run.scores(test, num_samples=20).log_prob
    own = pandas.read_csv(path).iloc[test.ids.astype(int)]
    mixed = own[["c", "kind", "a", "b"]].assign(more="words", other=1.0)
    files = {
        "same.csv": own,
        "reordered.csv": own[["c", "b", "a"]],
        "more.csv": mixed,
        "unlabelled.csv": own.assign(kind=""),
        "semicolons.csv": own,
    }
    for name, frame in files.items():
        frame.to_csv(tmp_path / name, index=False, sep=";" if name == "semicolons.csv" else ",")
        part, warned = said(run.read, tmp_path / name)
        assert torch.equal(part.x, test.x), name
        assert torch.equal(run.scores(part, num_samples=20).log_prob, expected)
        told = {
            "more.csv": ["columns of more that the model does not know are left out: more, other"],
            "semicolons.csv": ["semicolons: separated by semicolons"],
        }
        assert warned == told.get(name, [])
        assert (part.labels is None) == (name in ("reordered.csv", "unlabelled.csv"))
    labelled = run.read(tmp_path / "same.csv").labels
    assert torch.equal(labelled, test.labels)
    for i in range(3):
        (one,) = run.read(own[["b", "c", "a"]].iloc[i : i + 1]).x
        assert torch.equal(one, test.x[i])
    constant = own.assign(b=own["b"].iloc[0])
    x = run.schema.restore(run.read(constant).x.double())
    np.testing.assert_allclose(x, constant[NAMES], rtol=1e-5)
    assert torch.isfinite(run.scores(constant, num_samples=5).log_prob).all()
    assert torch.equal(run.scores(own, num_samples=20).log_prob, expected)
    new = own.assign(kind=["q", "of its own"] * 5)
    other = run.read(new)
    assert other.schema.classes == ("p", "q", "of its own") and other.labels.tolist() == [1, 2] * 5


def test_files_are_written_as_was_said_at_the_training(tmp_path):
    """What was asked for then holds for other files too; what is found out of one is told."""
    x = rows(40)
    path = written(tmp_path / "t.csv", x, who=[f"#{i}" for i in range(40)])
    frame = pandas.read_csv(path)[["who", *NAMES]]
    frame.to_csv(path, index=False)
    options = {"id": "who", "comment": "", "separator": ",", "decimal": "."}
    run, _ = trained(tmp_path / "run", path, **options)
    frame.to_csv(tmp_path / "same.csv", index=False)
    part, warned = said(run.read, tmp_path / "same.csv")
    assert part.ids.tolist() == [f"#{i}" for i in range(40)] and warned == []
    frame.to_csv(tmp_path / "comma.csv", index=False, sep=";", decimal=",")
    message = (
        "expected 1 cells in line 2 of .*read with separator=',', decimal='.', comment='', as the file of the train"
    )
    with pytest.raises(ValueError, match=message):
        run.read(tmp_path / "comma.csv")
    part, warned = said(run.read, tmp_path / "comma.csv", separator=";", decimal=",")
    assert len(part) == 40 and warned == []
    other, _ = trained(tmp_path / "other", path, id="who", comment="")
    part, warned = said(other.read, tmp_path / "comma.csv")
    assert warned == ["comma: separated by semicolons, decimal commas"]
    np.testing.assert_allclose(other.schema.restore(part.x.double()), x, rtol=1e-5)
    assert len(said(other.read, frame)[0]) == 40


@pytest.mark.parametrize("labels", [[1, 2, 10], ["p", "q", "r"]])
def test_a_label_that_is_new(labels, tmp_path, capsys):
    """Of classes it is one more, in the file of the training too; words among numbers are none, which is told."""
    x, own = rows(40), [labels[i % 3] for i in range(40)]
    path = written(tmp_path / "t.csv", x, kind=own)
    run, _ = trained(tmp_path / "run", path, label="kind")
    before = run.read(path)
    assert before.schema.classes == (None if labels[0] == 1 else ("p", "q", "r"))
    for place in (path, tmp_path / "more.csv"):
        written(place, np.concatenate([x, LOCATION[None]]), kind=[*map(str, own), "new"])
        part, warned = said(run.read, place)
        if labels[0] == 1:
            assert part.labels is None and part.schema.classes is None
            assert warned[-1].startswith(f"labels of {place.stem} are words, which were numbers in the training")
        else:
            assert [part.schema.classes[i] for i in part.labels] == [*own, "new"] and warned == []
    for words in (["encode", "--split", "all", "--out"], ["reconstruct", "--split", "all", "--out"]):
        out = tmp_path / f"{words[0]}.csv"
        assert main([words[0], str(run.path), *words[1:], str(out)]) == 0
        written_labels = pandas.read_csv(out).get("label")
        if labels[0] == 1:
            assert written_labels is None and "which were numbers" in capsys.readouterr().err
        else:
            assert sorted(written_labels) == sorted([*own, "new"])
    assert main(["report", str(run.path), "--num_samples", "5"]) == 0
    assert main(["fit", "--resume", str(run.path), "--data", str(path), "--epochs", "4"]) in (0, 2)
    assert main(["evaluate", str(run.path), "--num_samples", "5"]) == 0


def test_cells_of_another_kind_are_told_of_other_data(tmp_path):
    counts = np.random.default_rng(0).poisson(4, (60, 2)).astype(float)
    counts[3, 0] = 2.5
    path = written(tmp_path / "t.csv", counts, ["v", "w"])
    dataset = load_dataset(path, kind=["v=count"])
    run = fit(**defaults_for(dataset) | {"epochs": 1}, out=tmp_path / "run", progress=False)
    assert said(run.read, path)[1] == []
    counts[5:8, 0] = -7
    for place in (tmp_path / "new.csv", path):
        _, warned = said(run.read, written(place, counts, ["v", "w"]))
        assert warned == [f"{place.stem}: 4 cells of another kind made gaps"]
    counts[5:8, 0] = [2**24 + 1, 4, 5]
    _, warned = said(run.read, written(tmp_path / "new.csv", counts, ["v", "w"]))
    assert "new: whole numbers above 2**24 are rounded by up to 1" in warned
    odd = trained(tmp_path / "odd", written(tmp_path / "odd.csv", rows(40), ["=a", "b", "c"]))[0]
    assert main(["sample", str(odd.path), "--out", str(tmp_path / "x.csv")]) == 0
    assert len(odd.read(tmp_path / "x.csv")) == 64


def test_a_resumed_training_has_the_rows_that_it_had(tmp_path, capsys):
    path = written(tmp_path / "t.csv", rows(60))
    few = ["--model", "LinearVAE", "--out", str(tmp_path / "run")]
    assert main(["fit", "--data", str(path), "--epochs", "1", *few]) == 0
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))
    assert main(["fit", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 2
    assert "expected the data that the run was trained on, 48 rows" in capsys.readouterr().err


def test_what_is_refused_of_other_data(on_a_table, tmp_path):
    run, _, path = on_a_table
    own = pandas.read_csv(path)
    for frame, message in (
        (own.drop(columns="b"), r"expected the columns of the training, a, b, c, .* none called 'b' among 'a', 'c'"),
        (own.rename(columns={"a": "A"}), "got none called 'a'"),
        (own.assign(b="x"), "expected numbers in column 'b'"),
        (own.assign(b=np.where(own.index == 3, np.nan, own["b"])), "expected a value in every cell .* got 1 missing"),
        (own.iloc[:0], "expected at least 1 row in"),
        (own.assign(a=np.inf), "expected finite float32 values"),
    ):
        frame.to_csv(tmp_path / "other.csv", index=False)
        for data in (tmp_path / "other.csv", frame):
            with pytest.raises(ValueError, match=message):
                run.read(data)
    with pytest.raises(ValueError, match="expected options of reading, .*, got split: leave it out"):
        run.read(path, split=[0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match=r"expected label= .* got 'none': correct it"):
        run.read(path, label="none")  # asked for by name
    np.save(tmp_path / "x.npy", own[NAMES].to_numpy())
    part, warned = said(run.read, tmp_path / "x.npy")
    assert warned == ["x names no columns: they are taken for a, b, c, in this order"]
    assert torch.equal(part.x, run.read(path).x)
    with pytest.raises(ValueError, match=r"expected data of shape \(3,\) \(a, b, c\), as in the training, got \(2,\)"):
        run.read(own[NAMES].to_numpy()[:, :2])


def test_the_file_is_gone(on_a_table, tmp_path, capsys):
    run, dataset, path = on_a_table
    kept = path.read_text()
    new = written(tmp_path / "new.csv", rows(5, seed=3))
    before = run.sample(50, seed=1)
    path.unlink()
    try:
        loaded = load_run(run.path)
        assert torch.equal(loaded.sample(50, seed=1), before)
        out = tmp_path / "samples.csv"
        assert main(["sample", str(run.path), "--num", "50", "--seed", "1", "--out", str(out)]) == 0
        np.testing.assert_allclose(pandas.read_csv(out), run.schema.restore(before), rtol=1e-6)
        for command in ("encode", "reconstruct", "scores"):
            out = tmp_path / f"{command}.csv"
            assert main([command, str(run.path), "--data", str(new), "--out", str(out)]) == 0
            assert len(pandas.read_csv(out)) == 5
        assert main(["evaluate", str(run.path), "--data", str(new), "--num_samples", "5"]) == 0
        capsys.readouterr()
        for command in ("encode", "report", "evaluate"):
            assert main([command, str(run.path)]) == 2
            assert "expected the data of the training at" in capsys.readouterr().err
    finally:
        path.write_text(kept)
    assert torch.equal(load_run(run.path).dataset().test.x, dataset.test.x)


def test_the_file_has_changed(tmp_path, capsys):
    """Rows that are added, gone, in another order, with columns in another: every row keeps its split and its units."""
    x = rows(100)
    path = written(tmp_path / "t.csv", x)
    run, dataset = trained(tmp_path / "run", path)
    before, scored = run.sample(20), run.scores(dataset.test, num_samples=5).log_prob
    order = RNG.permutation(130)
    grown = np.concatenate([x, 1000.0 + rows(30, seed=1)])[order]
    written(path, grown[:, ::-1], NAMES[::-1])
    now, warned = said(run.dataset)
    assert len(warned) == 1 and "t.csv has changed since the training: 30 rows are new, and count as test" in warned[0]
    assert torch.equal(now.train.x, dataset.train.x) and torch.equal(now.valid.x, dataset.valid.x)
    assert torch.equal(now.test.x[:10], dataset.test.x) and len(now.test) == 40
    assert torch.equal(now.restore(now.test.x[10:].double()) > 100, torch.ones(30, 3).bool())
    assert torch.equal(run.sample(20), before)
    assert torch.equal(run.scores(rows_of(now.test, list(range(10))), num_samples=5).log_prob, scored)
    assert main(["evaluate", str(run.path), "--num_samples", "5"]) == 0
    told = capsys.readouterr()
    assert "30 rows are new" in told.err and "40" in told.out
    resumed = fit(
        run.model.train(), run.guide.train(), now.train, valid=now.valid, epochs=5, resume=run.path, progress=False
    )
    assert len(resumed.history) == 5 and resumed.schema.to_json() == run.schema.to_json()
    written(path, x[dataset.train.ids.astype(int)])
    with pytest.raises(ValueError, match="expected rows of the valid split in .*, which has changed since"):
        run.dataset()
    part = run.read(path)
    assert (part.parts == "train").all()
    assert main(["evaluate", str(run.path), "--data", str(path), "--num_samples", "5"]) == 2
    assert "expected rows of the test split" in capsys.readouterr().err


def test_splits_of_the_user_s_own(tmp_path, capsys):
    """What is trained on is recorded as such, whatever split it was of."""
    path = written(tmp_path / "t.csv", rows(100))
    dataset = load_dataset(path)
    model = LinearVAE((3,), 1)
    train = rows_of(joined([dataset.train, dataset.valid]), list(range(0, 90, 2)))
    fit(model, AmortizedGuide(model, MLP((8,))), train, epochs=1, out=tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    assert {part: len(sums) for part, sums in run.schema.checksums.items()} == {"train": 45, "valid": 0, "test": 55}
    part = run.read(path)
    assert set(part.ids[part.parts == "train"]) == set(train.ids)
    own, warned = said(run.dataset)
    assert warned == [] and set(own.train.ids) == set(train.ids)
    assert (len(own.valid), len(own.test)) == (7, 48)  # the file's own validation rows, as none were told
    assert (
        main(["evaluate", str(run.path), "--num_samples", "2"]) == 0
        and "test split: 48 data" in capsys.readouterr().out
    )
    fit(
        model, AmortizedGuide(model, MLP((8,))), joined([dataset.train, dataset.test]), valid=dataset.valid,
        epochs=1, out=tmp_path / "all", progress=False,
    )  # fmt: skip
    assert main(["evaluate", str(tmp_path / "all"), "--num_samples", "2"]) == 2
    assert "expected rows that the run was not trained on" in capsys.readouterr().err


def test_validation_frames_are_matched_by_name(tmp_path):
    frame = pandas.DataFrame(rows(40) / SCALE, columns=NAMES)
    bounds = []
    for valid in (frame[:10], frame[["c", "a", "b"]][:10].assign(more=1.0)):
        torch.manual_seed(0)
        model = LinearVAE((3,), 1)
        run = fit(
            model, AmortizedGuide(model, MLP((4,))), frame[10:], valid=valid, epochs=1, out=tmp_path / str(len(bounds)),
            progress=False,
        )  # fmt: skip
        bounds.append(run.history[0]["valid"])
    assert bounds[0] == bounds[1]
    with pytest.raises(ValueError, match="expected the columns of the training, a, b, c, in the validation frame, got"):
        fit(model, AmortizedGuide(model), frame, valid=frame[["a", "b"]], epochs=1, out=tmp_path / "none")


def test_rows_of_the_training_are_no_test_rows(on_a_table, tmp_path, capsys):
    run, dataset, _ = on_a_table
    some = np.concatenate([rows(100)[dataset.train.ids.astype(int)[:20]], rows(7, seed=9)])
    other = written(tmp_path / "other.csv", some)
    part = run.read(other)
    assert part.parts.tolist() == ["train"] * 20 + ["test"] * 7
    with pytest.warns(SchemaWarning, match="20 of 27 rows are of the training or validation split"):
        run.evaluate(other, num_samples=2, progress=False)
    assert said(run.evaluate, dataset.test, num_samples=2, progress=False)[1] == []
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(run.path), "--data", str(other), "--num_samples", "5", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "20 of 27 rows of other are of the training or validation split, and left out: --split all" in told.err
    assert json.loads(out.read_text())["num_data"] == 7
    assert main(["encode", str(run.path), "--data", str(other), "--out", str(tmp_path / "codes.csv")]) == 0
    assert len(pandas.read_csv(tmp_path / "codes.csv")) == 27


def test_runs_of_before_learn_their_units_from_the_file(on_a_table, tmp_path):
    run, dataset, _ = on_a_table
    old = tmp_path / "old"
    (old / "checkpoints").mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl"):
        (old / name).write_bytes((run.path / name).read_bytes())
    for name in ("model.safetensors", "checkpoints/last.safetensors"):
        state = checkpoint.load(run.path / name)
        del state["schema"], state["as_they_are"]
        checkpoint.save(state, old / name)
    loaded = load_run(old)
    part, warned = said(loaded.read, pandas.DataFrame(rows(4, seed=2), columns=NAMES))
    assert len(warned) == 1 and "has no schema.json, as it is of an earlier version" in warned[0]
    assert torch.equal(part.x, run.read(pandas.DataFrame(rows(4, seed=2), columns=NAMES)).x)
    assert main(["sample", str(old), "--num", "5", "--out", str(tmp_path / "s.csv")]) == 0
    assert torch.equal(loaded.dataset().test.x, dataset.test.x)


def as_before(run, old, as_they_are=None):
    """A copy of a run without what earlier versions did not write; or only told what its networks were fed."""
    shutil.copytree(run, old)
    for name in ("model.safetensors", "checkpoints/last.safetensors"):
        state = checkpoint.load(old / name)
        if as_they_are is None:
            del state["schema"], state["as_they_are"]
        else:
            state["as_they_are"] = as_they_are
        checkpoint.save(state, old / name)
    return old


@pytest.mark.parametrize("of", ["counts", "sequences", "a covariate"])
def test_runs_of_before_feed_their_networks_what_they_were_trained_on(tmp_path, of):
    """Later versions scale an encoder's inputs; a run trained on data as they are keeps to them, resumed too."""
    x = torch.poisson(torch.full((40, 6), 30.0), generator=torch.Generator().manual_seed(0))
    data = {"counts": x, "sequences": x.reshape(10, 12, 2), "a covariate": (x, torch.eye(2)[torch.arange(40) % 2])}[of]

    def pair():
        torch.manual_seed(0)
        if of == "sequences":
            emission = Emission(2, 2, likelihood=likelihoods.Poisson())
            model = StateSpaceModel(Initial(2), LinearTransition(2), emission)
            return model, StateSpaceGuide(model, hidden=4)
        if of == "counts":
            model = VAE((6,), 2, decoder=MLP((8,)), likelihood=likelihoods.Poisson())
            return model, AmortizedGuide(model, MLP((8,)))
        model = ConditionalVAE((6,), 2, 2, decoder=MLP((8,)), likelihood=likelihoods.Poisson())
        guide = AmortizedGuide(model, MLP((8,)), encoder_inputs=model.beside)
        guide(*data)  # makes the guide's networks
        return model, guide

    def scored(run):
        return run.evaluate(data, num_samples=3, seed=0, progress=False).elbo

    options = {"batch_size": 10, "progress": False}
    new = fit(*pair(), data, epochs=1, out=tmp_path / "new", **options)
    model, guide = pair()
    for part in model.modules():
        if isinstance(part, likelihoods.Likelihood):
            part.as_they_are = True
    run = fit(model, guide, data, epochs=1, out=tmp_path / "before", **options)
    old = as_before(run.path, tmp_path / "old")
    model, guide = pair()
    assert scored(load_run(old, model=model, guide=guide)) == scored(run) != scored(new)
    model, guide = pair()
    assert scored(load_run(as_before(run.path, tmp_path / "as now", False), model=model, guide=guide)) != scored(run)
    pairs = [pair(), pair()]
    whole = fit(model, guide, data, epochs=3, resume=run.path, **options)
    resumed = fit(*pairs[0], data, epochs=3, resume=old, **options)
    assert resumed.history[-1]["bound"] == whole.history[-1]["bound"]
    assert scored(load_run(old, model=pairs[1][0], guide=pairs[1][1])) == scored(whole)


@pytest.mark.parametrize("count", [10, 13])
def test_splits_of_one_row(tmp_path, count):
    dataset = load_dataset(written(tmp_path / "t.csv", rows(count)))
    again, warned = said(load_again, dataset.schema)
    assert warned == [] and torch.equal(again.test.x, dataset.test.x) and len(again.test) == 1


# ------------------------------------------------------------ units of pictures, counts, gaps and sequences


def test_units_of_pictures(tmp_path):
    """Dark pictures of another folder, of 8 bits and of 16, and arrays, are measured as the training's were."""
    bright = RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8)
    dark = RNG.integers(0, 60, (3, 6, 5), dtype=np.uint8)
    schema = None
    for depth, most in ((np.uint8, 255), (np.uint16, 65535)):
        for name, arrays in (("bright", bright), ("dark", dark)):
            folder = tmp_path / f"{name}{most}"
            folder.mkdir()
            for i, array in enumerate(arrays):
                Image.fromarray((array.astype(np.uint32) * most // 255).astype(depth)).save(folder / f"{i:02d}.png")
        schema = load_dataset(tmp_path / f"bright{most}").schema
        assert schema.divisor == most
        for other in (255, 65535):
            if not (tmp_path / f"dark{other}").exists():
                continue
            found = read(schema, tmp_path / f"dark{other}").x
            np.testing.assert_allclose(found[:, 0], dark / np.float32(255), atol=1e-5)
    schema = load_dataset(tmp_path / "bright255").schema
    for array in (dark, dark.astype(np.float32), dark.astype(np.int64)):
        assert torch.equal(read(schema, array).x[:, 0], torch.from_numpy(dark).float() / 255)
    black = np.zeros((1, 6, 5), np.uint8)
    assert torch.equal(read(schema, black).x, torch.zeros(1, 1, 6, 5))
    with pytest.raises(ValueError, match="expected intensities from 0 to 255, as in the training, got 0.* in array"):
        read(schema, dark / 255)
    with pytest.raises(ValueError, match=r"expected data of shape \(1, 6, 5\), as in the training, got \(1, 5, 6\)"):
        read(schema, dark.transpose(0, 2, 1))
    floats = load_dataset(bright / 255.0).schema
    assert torch.equal(read(floats, dark / 255.0).x[:, 0], torch.from_numpy(dark / 255.0).float())
    with pytest.raises(ValueError, match="expected values in the units of the training, got intensities of pictures"):
        read(floats, tmp_path / "dark255")
    assert torch.equal(load_dataset(bright, divisor=1).train.x.max(), torch.tensor(float(bright.max())))


def test_units_are_of_the_training_rows_alone(tmp_path):
    """What is in other rows decides nothing: neither scaling nor likelihood, nor what is a gap."""
    x = RNG.integers(0, 2, (100, 3)).astype(float)
    held_out = np.setdiff1d(np.arange(100), load_dataset(written(tmp_path / "t.csv", x)).train.ids)
    x[held_out[0], 0] = 7.0
    path = written(tmp_path / "t.csv", x)
    dataset = load_dataset(path)
    assert [column.kind for column in dataset.schema.columns] == ["binary"] * 3
    assert isinstance(defaults_for(dataset)["model"].likelihood, likelihoods.Bernoulli)
    x[held_out[0], 0] = np.nan
    gaps = load_dataset(written(tmp_path / "t.csv", x))
    likelihood = defaults_for(gaps)["model"].likelihood
    assert isinstance(likelihood, likelihoods.Missing) and isinstance(likelihood.likelihood, likelihoods.Bernoulli)
    assert gaps.schema.missing and "missing" in gaps.description
    assert torch.isnan(read(gaps.schema, pandas.DataFrame({"a": [np.nan], "b": [0], "c": [1]})).x).sum() == 1


def test_units_of_sequences(tmp_path):
    """Series cut into windows: a file that has grown, by name, with its time; new rows begin where the others end."""
    t = np.arange(120)
    frame = pandas.DataFrame({"t": t, "x": 100 + 10 * np.sin(t / 5), "y": 0.01 * t})
    frame.to_csv(tmp_path / "s.csv", index=False)
    dataset = load_dataset(tmp_path / "s.csv", time="t", window=6)
    schema = dataset.schema
    assert schema.sequences and schema.num_steps == 6 and schema.names == ("x", "y")
    grown = pandas.concat([frame, pandas.DataFrame({"t": [120, 121], "x": [1.0, 2.0], "y": [3.0, 4.0]})])
    part = read(schema, grown[["y", "t", "x"]])
    parts = [*["train"] * 16, *["valid"] * 2, *["test"] * 3]
    assert part.parts.tolist() == parts and part.kwargs["lengths"].tolist() == [6] * 20 + [2]
    assert torch.equal(part.x[:16], dataset.train.x) and torch.equal(part.x[18:20], dataset.test.x)
    np.testing.assert_allclose(schema.restore(part.x[20, :2].double()), [[1, 3], [2, 4]], atol=1e-4)
    each = -(2 * schema.scale.log().sum())
    torch.testing.assert_close(part.log_jacobian[20], each)
    assert read(schema, grown[:4]).x.shape == (1, 4, 2)
    with pytest.raises(ValueError, match=r"expected time= .* got 't': correct it"):
        read(schema, frame.rename(columns={"t": "when"}))
    assert read(schema, frame.rename(columns={"t": "when"}), time="when").x.shape == (20, 6, 2)


# ------------------------------------------------------------ arrays, frames, tables, defaults


def test_arrays_and_frames_are_tensors(on_a_table):
    run, dataset, _ = on_a_table
    x = dataset.test.x
    array, frame = x.numpy(), pandas.DataFrame(x.numpy())
    double = x.double().numpy()
    model = VAE((3,), latent_dim=2, decoder=MLP((4,)), likelihood=likelihoods.Normal())
    guide = AmortizedGuide(model, MLP((4,)))
    from pyro_vae import evaluate, prediction

    for other in (array, frame, double):
        assert torch.equal(prediction.encode(guide, other).mean, prediction.encode(guide, x).mean)
        assert torch.equal(prediction.reconstruct(model, guide, other), prediction.reconstruct(model, guide, x))
        same = [prediction.scores(model, guide, each, num_samples=3).log_prob for each in (other, x)]
        assert torch.equal(*same)
        same = [evaluate(model, guide, each, num_samples=3, progress=False).elbo.value for each in (other, x)]
        assert same[0] == same[1]
    z = np.zeros((4, 2))
    assert torch.equal(prediction.decode(model, z), prediction.decode(model, torch.zeros(4, 2)))
    line = [prediction.interpolate(model, guide, a, b, steps=3) for a, b in ((x[0], x[1]), (double[0], array[1]))]
    assert torch.equal(*line)
    with pytest.raises(ValueError, match="expected numbers in every column of the frame, got others in 'word'"):
        prediction.encode(guide, pandas.DataFrame({"word": ["a"], "b": [1.0], "c": [1.0]}))
    integers = pandas.DataFrame({"a": pandas.array([1, 2], dtype="Int64"), "b": [True, False], "c": [0.5, 1.5]})
    assert prediction.encode(guide, integers).mean.shape == (2, 2)
    assert torch.equal(run.encode(array).mean, run.encode(x).mean)  # arrays are in the model's units, as tensors are


def test_training_on_frames_and_arrays(tmp_path):
    frame = pandas.DataFrame(rows(40) / SCALE, columns=NAMES)
    runs = []
    for i, data in enumerate((frame, frame.to_numpy(), torch.tensor(frame.to_numpy()))):
        torch.manual_seed(0)
        model = LinearVAE((3,), 1)
        guide = AmortizedGuide(model, MLP((4,)))
        runs.append(fit(model, guide, data, epochs=2, out=tmp_path / str(i), progress=False))
    assert runs[0].history[1]["bound"] == runs[1].history[1]["bound"] == runs[2].history[1]["bound"]
    assert runs[0].schema.names == ("a", "b", "c") and runs[1].schema.columns is None
    reordered = frame[["c", "a", "b"]]
    assert torch.equal(runs[0].encode(reordered).mean, runs[0].encode(frame.to_numpy()).mean)
    assert (runs[1].read(frame.to_numpy()).parts == "train").all()


def test_data_sets_of_frames_and_arrays(tmp_path):
    x = rows(60)
    frame = pandas.DataFrame(x, columns=NAMES).assign(kind=["p", "q", "r"] * 20, who=[f"w{i}" for i in range(60)])
    of_file = load_dataset(written(tmp_path / "t.csv", x, kind=frame["kind"], who=frame["who"]), label="kind", id="who")
    for each in (frame, frame.set_index("who", drop=False), frame.astype({"kind": "category"})):
        of_frame = load_dataset(each, label="kind", id="who")
        assert torch.equal(of_frame.train.x, of_file.train.x) and (of_frame.test.ids == of_file.test.ids).all()
        assert of_frame.schema.columns == of_file.schema.columns and of_frame.train.source is None
        assert torch.equal(of_frame.test.labels, of_file.test.labels)
    assert load_dataset(frame.set_index("who"), label="kind").train.ids[0].startswith("w")
    assert torch.equal(load_dataset(x).train.x, of_file.train.x)
    dates = pandas.DataFrame({"when": pandas.date_range("2020-01-01", periods=60, freq="D"), "x": x[:, 0]})
    series = load_dataset(dates, time="when", window=5)
    assert series.train.x.shape == (10, 5, 1)
    assert series.train.times[0, 1] == np.datetime64("2020-01-02")


def test_scores_as_a_table(on_a_table, tmp_path):
    run, dataset, path = on_a_table
    found = run.scores(dataset.test, num_samples=10)
    frame = found.to_frame()
    assert list(frame.columns) == ["id", "log_prob", "rank"] and frame["id"].tolist() == dataset.test.ids.tolist()
    assert frame.sort_values("log_prob")["rank"].tolist() == list(range(1, 11))
    assert torch.equal(found.log_prob, torch.tensor(frame["log_prob"].to_numpy()))
    out = tmp_path / "scores.csv"
    assert main(["scores", str(run.path), "--num_samples", "10", "--out", str(out)]) == 0
    written_ = pandas.read_csv(out)
    assert list(written_.columns) == ["id", "log_prob", "rank"]
    np.testing.assert_allclose(written_["log_prob"], frame["log_prob"], rtol=1e-6)
    assert written_["rank"].tolist() == frame["rank"].tolist()
    assert main(["scores", str(run.path), "--data", str(path), "--out", str(tmp_path / "all.csv")]) == 0
    assert len(pandas.read_csv(tmp_path / "all.csv")) == 100


def test_found_files(tmp_path, capsys):
    """What files of others had: words as ids, columns that were dropped, a packed file, few dates with slashes."""
    x = rows(60)
    days = pandas.date_range("2012-01-01", periods=60).strftime("%Y/%m/%d")
    path = written(tmp_path / "t.csv.gz", x, who=[f"w{i}" for i in range(60)], word=["a", "b"] * 30, day=days)
    options = ["--data.id", "who", "--data.drop", "word,day", "--epochs", "1", "--evaluate.num_samples", "2"]
    assert main(["fit", "--data", str(path), *options, "--out", str(tmp_path / "run")]) == 0
    assert "data     t: 60 rows of 3 columns" in capsys.readouterr().out
    assert main(["scores", str(tmp_path / "run"), "--out", str(tmp_path / "scores.csv"), "--num_samples", "2"]) == 0
    assert "note" not in capsys.readouterr().err  # its own file has the columns that it had
    assert set(pandas.read_csv(tmp_path / "scores.csv")["id"]) == set(load_run(tmp_path / "run").dataset().test.ids)
    series = load_dataset(path, time="day", drop=["word", "who"], window=5)
    five = pandas.read_csv(path)[:5]
    assert read(series.schema, five.drop(columns=["word", "who"])).times[0, 4] == np.datetime64("2012-01-05")


def test_saved_tables(on_a_table, tmp_path):
    run, dataset, _ = on_a_table
    path = tmp_path / "x.csv"
    save_table(path, {"x": run.schema.restore(dataset.test.x), "more": np.arange(10)}, dataset.test)
    table = pandas.read_csv(path)
    assert list(table.columns) == ["id", "label", *NAMES, "more"] and set(table["label"]) <= {"p", "q"}
    np.testing.assert_allclose(table[NAMES], rows(100)[dataset.test.ids.astype(int)], rtol=1e-5)
    with pytest.raises(FileExistsError, match="expected a new file"):
        save_table(path, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected a file ending in .csv or .npz"):
        save_table(tmp_path / "x.txt", {"x": torch.zeros(1)})
    save_table(path, {"x": torch.zeros(1)}, overwrite=True)
    assert path.read_text() == "x\n0.0\n"


def test_defaults_are_the_command_line_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.csv", rows(60))
    assert main(["fit", "--data", "t.csv", "--epochs", "2", "--out", "shell", "--evaluate.num_samples", "5"]) == 0
    arguments = defaults_for(load_dataset("t.csv")) | {"epochs": 2}
    run = fit(**arguments, out="python", progress=False)
    shell = load_run("shell")
    assert run.config == shell.config and run.schema.to_json() == shell.schema.to_json()
    assert run.history[1]["valid"] == shell.history[1]["valid"]
    assert [c for c in run.schema.choices if c.option.startswith("model.likelihood")]


# ------------------------------------------------------------ what others broke


def series_run(folder, path, **options):
    dataset = load_dataset(path, **options)
    model = DeepMarkovModel((1,), 2, 4, likelihood=likelihoods.Normal())
    guide = StateSpaceGuide(model)
    run = fit(model, guide, dataset.train, valid=dataset.valid, epochs=1, batch_size=4, out=folder, progress=False)
    return load_run(run.path), dataset


def stations(lengths):
    return pandas.DataFrame(
        [(s, t, 100.0 * k + t) for k, (s, T) in enumerate(lengths.items()) for t in range(T)], columns=["st", "t", "v"]
    )


def test_pieces_of_series_with_absent_times_keep_their_id(tmp_path):
    """Pieces that begin with an absent time are of their own series, in any kind of source."""
    frame = stations(dict.fromkeys("abc", 40))
    frame = frame[~((frame["st"] == "a") & frame["t"].isin([10, 30]))]
    frame.to_csv(tmp_path / "w.csv", index=False)
    for data in (tmp_path / "w.csv", frame):
        dataset = load_dataset(data, id="st", time="t", window=10, every=1)
        for split in (dataset.train, dataset.valid, dataset.test):
            values = dataset.restore(split.x.double())[..., 0] // 100
            owner = torch.tensor(["abc".index(name) for name in split.ids])[:, None].expand(values.shape)
            there = split.counted[..., 0]
            assert torch.equal(values[there].long(), owner[there])


def test_forecasts_go_on_whatever_was_corrected(tmp_path):
    """A cell of long ago, a day more, a series alone: each goes on from its own last time, and keeps its split."""
    frame = stations({"a": 41, "b": 44, "c": 52})
    path = tmp_path / "s.csv"
    frame.to_csv(path, index=False)
    run, dataset = series_run(tmp_path / "run", path, id="st", time="t", window=6)
    frame.loc[5, "v"] = 7.75
    more = pandas.concat([frame, pandas.DataFrame({"st": ["a"], "t": [41], "v": [41.0]})])
    more.to_csv(path, index=False)
    own, warned = said(run.forecast, num_steps=1, num_samples=3)
    other = run.forecast(path, num_steps=1, num_samples=3)
    assert len(warned) == 1 and warned[0].endswith("since the training: 2 rows are changed, and keep the split")
    for found in (own, other):
        assert dict(zip(found.split.ids, found.times[:, 0], strict=True)) == {"a": 42.0, "b": 44.0, "c": 52.0}
    now = said(run.dataset)[0]
    assert len(now.train) == len(dataset.train) and sorted(now.train.ids) == sorted(dataset.train.ids)
    one = frame[frame["st"] == "b"].drop(columns="st")
    alone, _ = series_run(tmp_path / "alone", one.assign(v=one["v"]).reset_index(drop=True), time="t", window=4)
    three = alone.read(more, id="st")
    found = alone.forecast(three, num_steps=1, num_samples=3)
    assert sorted(found.times[:, 0]) == [42.0, 44.0, 52.0]


def test_series_that_have_grown_keep_their_split(tmp_path, capsys):
    lengths = {f"h{i}": 6 + i for i in range(14)}
    path = tmp_path / "s.csv"
    stations(lengths).to_csv(path, index=False)
    run, dataset = series_run(tmp_path / "run", path, id="st", time="t")
    stations({name: T + 1 for name, T in lengths.items()}).to_csv(path, index=False)
    now, warned = said(run.dataset)
    assert "14 rows are changed, and keep the split" in warned[0] and len(warned) == 1
    for part in ("train", "valid", "test"):
        assert set(getattr(now, part).ids) == set(getattr(dataset, part).ids)
        assert (run.read(path).parts == part).sum() == len(getattr(dataset, part))
    assert main(["evaluate", str(run.path), "--data", str(path), "--num_samples", "2"]) == 0
    assert "1 datum" in capsys.readouterr().out
    assert Schema.from_json(run.schema.to_json()).spans == run.schema.spans


def test_units_far_from_zero(tmp_path):
    """A location of a billion leaves the spread of what is written; validation frames are in original units."""
    x = np.column_stack([1.7e9 + 10 * RNG.normal(size=60), RNG.normal(size=60)])
    run, dataset = trained(tmp_path / "run", written(tmp_path / "t.csv", x, ["t", "a"]))
    assert main(["sample", str(run.path), "--num", "200", "--out", str(tmp_path / "s.csv")]) == 0
    drawn = pandas.read_csv(tmp_path / "s.csv")["t"]
    assert 3 < drawn.std() < 30 and len({*drawn}) == 200
    assert all(len(cell.split(",")[0].split(".")[1]) <= 6 for cell in (tmp_path / "s.csv").read_text().split()[1:])
    bounds = []
    for valid in (dataset.valid, pandas.DataFrame(x[dataset.valid.ids.astype(int)], columns=["t", "a"])):
        torch.manual_seed(0)
        model = LinearVAE((2,), 1)
        out = tmp_path / str(len(bounds))
        again = fit(model, AmortizedGuide(model), dataset.train, valid=valid, epochs=1, out=out, progress=False)
        bounds.append(again.history[0]["valid"])
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    with pytest.raises(ValueError, match="expected finite|expected values that are finite as float32 in the units"):
        run.read(pandas.DataFrame({"t": [1.7e9], "a": [3e38]}) * [1, 1e3])


def test_ids_and_labels_of_frames_are_as_written(tmp_path):
    x = rows(40)
    frame = pandas.DataFrame(x, columns=NAMES).assign(who=2**53 + np.arange(40), kind=[3, 5] * 20)
    for who in (frame["who"], frame["who"].astype("Int64"), frame["who"].astype(str)):
        dataset = load_dataset(frame.assign(who=who), id="who", label="kind")
        assert set(dataset.train.ids) <= {str(2**53 + i) for i in range(40)}
    path = written(tmp_path / "t.csv", x, kind=["3", "5", "x", "5"] * 10)
    schema = load_dataset(path, label="kind").schema
    assert schema.classes == ("3", "5", "x")
    only = read(schema, frame[["a", "b", "c", "kind"]])
    assert only.labels.tolist() == [0, 1] * 20 and only.schema.classes == schema.classes
    run = fit(
        **defaults_for(load_dataset(frame, id="who", label="kind")) | {"epochs": 1},
        out=tmp_path / "run",
        progress=False,
    )
    again = load_run(run.path).scores(frame, num_samples=2)
    assert again.ids.tolist() == [str(2**53 + i) for i in range(40)]
    assert main(["fit", "--resume", str(run.path), "--epochs", "2"]) == 2


def test_what_an_index_holds(tmp_path):
    """Times, ids and labels may be levels of a frame's index."""
    frame = pandas.DataFrame(rows(40), columns=NAMES)
    days = pandas.date_range("2020", periods=40, name="day")
    named = frame.set_index(days)
    dataset = load_dataset(named, time="day", window=4)
    assert dataset.columns == tuple(NAMES) and dataset.train.times[0, 0] == np.datetime64("2020-01-01")
    levels = pandas.MultiIndex.from_arrays([[f"s{i // 4}" for i in range(40)], days], names=["who", "day"])
    several = load_dataset(frame.set_index(levels), id="who", time="day")
    assert several.columns == tuple(NAMES) and set(several.train.ids) < {f"s{i}" for i in range(10)}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: x.to("meta"), "expected real numbers, got a tensor on the meta device"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "expected real numbers, got torch.qint8"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "expected a dense tensor"),
        (lambda x: torch.complex(x, x), "expected real numbers, got torch.complex64"),
        (lambda x: torch.complex(x, x).numpy(), "expected numbers in the array, got dtype complex64: take array.real"),
        (lambda x: np.zeros(20, dtype=[("a", "f4")]), "expected numbers in .*: put its fields into columns of a frame"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_tensors_of_other_kinds(made, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(made(torch.rand(20, 3)))
    eight = load_dataset(torch.rand(20, 3).to(torch.float8_e4m3fn))
    assert eight.train.x.shape == (16, 3)


def test_masked_and_foreign_arrays():
    masked = np.ma.masked_greater((rows(40) - LOCATION) / SCALE, 1.0)
    masked.data[masked.mask] = 999.0
    dataset = load_dataset(masked)
    assert float(dataset.restore(dataset.train.x.double()).nan_to_num().max()) < 7 and dataset.schema.missing
    model = VAE((3,), latent_dim=1, likelihood=likelihoods.Missing(likelihoods.Normal()))
    guide = AmortizedGuide(model)
    x = rows(4)
    frozen = x.copy()
    frozen.flags.writeable = False
    from pyro_vae.prediction import encode

    for other in (x.astype(">f8"), x.astype(np.longdouble), frozen, np.asfortranarray(x)):
        assert torch.equal(encode(guide, other).mean, encode(guide, x).mean)
    assert load_dataset(np.concatenate([frozen] * 5)).train.x.shape == (16, 3)


def test_the_farthest_rank_first(on_a_table):
    run, _, _ = on_a_table
    far = np.array([0.0, 10.0, 1e3, 1e6, 1e9, 1e30])[:, None] * SCALE + LOCATION
    found, warned = None, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run.scores(pandas.DataFrame(far, columns=NAMES), num_samples=5)
    warned = [str(each.message) for each in caught]
    lost = (~found.log_prob.isfinite()).numpy()
    assert found.rank[0] == 6 and found.rank[1] == 5 and set(found.rank[lost].tolist()) == set(range(1, lost.sum() + 1))
    assert bool(lost.any()) == any("have no finite score" in each for each in warned)


def test_a_run_goes_on_in_its_units_alone(on_a_table, tmp_path, capsys):
    run, dataset, path = on_a_table
    other = tmp_path / "other.csv"
    frame = pandas.read_csv(path)
    frame[NAMES] = frame[NAMES] * 1000 + 5
    frame.to_csv(other, index=False)
    with pytest.raises(ValueError, match="expected the data that the run was trained on|expected data in the units"):
        scaled = load_dataset(other, label="kind")
        fit(run.model.train(), run.guide.train(), scaled.train, valid=scaled.valid, epochs=4, resume=run.path)
    run.model.eval(), run.guide.eval()
    moved = tmp_path / "moved.csv"
    moved.write_text(path.read_text())
    assert torch.equal(
        load_again(dataclasses.replace(run.schema, source={**run.schema.source, "name_or_path": str(moved)})).train.x,
        dataset.train.x,
    )


def test_further_copies_and_close_rows(tmp_path):
    x = np.column_stack([1.7e9 + np.arange(60) + 0.25, rows(60)[:, 0]])
    path = written(tmp_path / "t.csv", x, ["t", "a"])
    dataset = load_dataset(path)
    close = pandas.DataFrame(x + [0.5, 0.0], columns=["t", "a"])
    assert (read(dataset.schema, close).parts == "test").all()
    copied = pandas.DataFrame(np.concatenate([x, x[dataset.train.ids.astype(int)[:1]]]), columns=["t", "a"])
    copied.to_csv(path, index=False)
    now, warned = said(load_again, dataset.schema)
    assert torch.equal(now.train.x, dataset.train.x) and torch.equal(now.test.x, dataset.test.x)
    assert len(warned) == 1 and warned[0].endswith(": 1 row is a further copy of another, and left out")
    numbered = pandas.DataFrame(rows(30))
    numbered.to_csv(tmp_path / "n.csv", index=False)
    assert len(load_dataset(tmp_path / "n.csv").train) == 24 and load_dataset(tmp_path / "n.csv").columns == (
        "0",
        "1",
        "2",
    )


def test_grey_pictures_among_coloured_ones(tmp_path):
    for i in range(12):
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.png")
    schema = load_dataset(tmp_path).schema
    (tmp_path / "grey").mkdir()
    grey = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey" / "one.png")
    found = read(schema, tmp_path / "grey").x
    assert torch.equal(found[0], torch.from_numpy(grey).float().expand(3, 8, 8) / 255)


def test_frames_among_other_arguments_are_matched_by_name(tmp_path):
    frame = pandas.DataFrame(rows(40) / SCALE, columns=NAMES)
    bounds = []
    for valid in ((frame[:10],), (frame[["c", "a", "b"]][:10],)):
        torch.manual_seed(0)
        model = LinearVAE((3,), 1)
        out = tmp_path / str(len(bounds))
        run = fit(model, AmortizedGuide(model, MLP((4,))), (frame,), valid=valid, epochs=1, out=out, progress=False)
        bounds.append(run.history[0]["valid"])
    assert bounds[0] == bounds[1]
    assert torch.equal(run.encode((frame[["b", "c", "a"]],)).mean, run.encode((frame.to_numpy(),)).mean)


def test_a_series_by_itself_after_several(tmp_path):
    """A run on windows of several series forecasts one without an id from its end, and not each of its pieces."""
    frame = stations({"a": 41, "b": 44, "c": 52})
    run, _ = series_run(tmp_path / "run", frame, id="st", time="t", window=6)
    found = run.forecast(run.read(frame[frame["st"] == "c"].drop(columns="st")), num_steps=1, num_samples=3)
    assert found.draws.shape[1] == 1 and found.num_before.tolist() == [52] and found.times.tolist() == [[52.0]]


def test_pictures_of_16_bits_have_the_units_of_the_training():
    """The training rows alone decide, and values of another depth are refused."""
    x = RNG.integers(0, 256, (20, 6, 5)).astype(np.uint16)
    x[0, 0, 0] = 255
    schema = load_dataset(x).schema
    deep = x.copy()
    deep[load_dataset(x).test.ids[0], 0, 0] = 60000
    assert schema.divisor == 255
    assert torch.equal(load_dataset(deep).train.x, load_dataset(x).train.x)
    assert torch.equal(read(schema, x[:2]).x[:, 0], torch.from_numpy(x[:2].astype(np.float32)) / 255)
    with pytest.raises(ValueError, match="expected intensities from 0 to 255, as in the training, got 0 to 300"):
        read(schema, np.full((2, 6, 5), [[[300], [0], [0], [0], [0], [0]]], dtype=np.uint16))
    wide = load_dataset((x * 257).astype(np.uint16)).schema
    assert wide.divisor == 65535
    assert torch.equal(read(wide, x[:2]).x[:, 0], torch.from_numpy(x[:2].astype(np.float32)) / 65535)


def test_what_has_no_meaning_is_refused(on_a_table, tmp_path):
    run, _, path = on_a_table
    x = rows(20)
    np.save(tmp_path / "x.npy", x)
    frame = pandas.DataFrame(x, columns=NAMES)
    for data, options in (
        (x, {"label": "kind"}),
        (x, {"time": "t"}),
        (x, {"separator": ";"}),
        (x, {"array": "x"}),
        (frame, {"separator": ";"}),
        (frame, {"channels": "last"}),
        (frame, {"size": 3}),
    ):
        with pytest.raises(ValueError, match=f"expected .* for {next(iter(options))}="):
            load_dataset(data, **options)
    for options in ({"label": "kind"}, {"array": "q"}, {"size": 3}):
        with pytest.raises(ValueError, match=f"expected .* for {next(iter(options))}="):
            run.read(tmp_path / "x.npy", **options)
    gap = pandas.read_csv(path)
    gap.loc[3, "kind"] = None
    part, warned = said(run.read, gap)
    assert part.labels is None and warned == [
        "some rows of frame have no label, and so none are written: codes and scores are what they would be"
    ]
    with pytest.raises(ValueError, match="expected a StateSpaceModel to forecast by, got LinearVAE"):
        run.forecast(run.read(path))


def test_ids_that_look_missing_are_words(tmp_path):
    codes = ["NA", "None", "null", "nan", "?", "n/a", *(f"c{i}" for i in range(14))]
    path = written(tmp_path / "t.csv", rows(20), who=codes)
    dataset = load_dataset(path, id="who")
    assert {*dataset.train.ids, *dataset.valid.ids, *dataset.test.ids} == {*codes}
    assert read(dataset.schema, path).ids.tolist() == codes
    frame = pandas.DataFrame(rows(20), columns=NAMES)
    assert read(dataset.schema, frame[5:]).ids.tolist() == [str(i) for i in range(5, 20)]


def test_tables_that_cannot_be_written_are_refused(tmp_path):
    path = tmp_path / "x.csv"
    for arrays in ({"a": np.zeros(3), "b": np.zeros(4)}, {"a": np.zeros(())}, {}):
        with pytest.raises(ValueError, match="expected arrays of as many rows"):
            save_table(path, arrays)
        assert not path.exists()
    with pytest.raises(ValueError, match="got an array called 'file'"):
        save_table(tmp_path / "x.npz", {"file": np.zeros(2)})
    schema = Schema("t", (2,), ())
    save_table(path, {"x_norm": np.zeros((2, 1))}, schema=schema)
    sequences = dataclasses.replace(schema, sequences=True)
    with pytest.raises(ValueError, match="expected arrays"):
        save_table(path, {"log_prob": np.zeros(3)}, schema=sequences, overwrite=True)


def test_another_validation_split_is_recorded(tmp_path):
    run, dataset = trained(tmp_path / "run", written(tmp_path / "t.csv", rows(60)))
    again = fit(
        run.model.train(), run.guide.train(), dataset.train, valid=dataset.test, epochs=4, resume=run.path,
        progress=False,
    )  # fmt: skip
    assert {part: len(sums) for part, sums in again.schema.checksums.items()} == {"train": 48, "valid": 12, "test": 0}
    assert set(run.schema.restore(np.zeros((1, 3))).flatten().tolist()) == set(run.schema.location.tolist())

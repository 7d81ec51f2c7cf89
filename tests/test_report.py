"""The report: one page that needs nothing else, whose pictures and numbers are the run's own."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import socket
import subprocess
import threading
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
from PIL import Image

from pyro_vae import Dataset, evaluate, fit, load_dataset
from pyro_vae.data import Split
from pyro_vae.evaluation import Estimate
from pyro_vae.guides import AmortizedGuide, families
from pyro_vae.models import VAE, BayesianVAE, likelihoods
from pyro_vae.prediction import encodings, sample
from pyro_vae.report import independent_baseline, summary_sentence, write_report
from pyro_vae.report.subject import Coded

NUM_SAMPLES = 30
COLUMNS = ("$cost$", "_hidden", "<b>age</b>", "tail_$")


class Page(HTMLParser):
    """Tags with their attributes, text by tag, and the stack of open tags, empty at the end of a sound page."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], {}, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.images = [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    @property
    def pngs(self):
        prefix = "data:image/png;base64,"
        assert all(image["src"].startswith(prefix) for image in self.images)
        return [base64.b64decode(image["src"].removeprefix(prefix), validate=True) for image in self.images]


def trained(dataset, folder, likelihood, latent_dim, **options):
    torch.manual_seed(0)
    model = VAE(dataset.event_shape, latent_dim=latent_dim, likelihood=likelihood)
    return fit(model, AmortizedGuide(model), dataset.train, epochs=1, out=folder, progress=False, **options)


def reported(dataset, run):
    scores = evaluate(run.model, run.guide, dataset.test, num_samples=NUM_SAMPLES, progress=False)
    path = write_report(run, dataset, num_samples=NUM_SAMPLES, progress=False)
    return SimpleNamespace(dataset=dataset, run=run, scores=scores, path=path, page=Page(path))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    dataset = load_dataset("digits")
    run = trained(dataset, tmp_path_factory.mktemp("digits"), likelihoods.Binomial(16), 3, valid=dataset.valid)
    return reported(dataset, run)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Real values, no labels, no validation, and names that HTML and matplotlib would each misread."""
    folder = tmp_path_factory.mktemp("table")
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 4)) @ generator.normal(size=(4, 4)) * [1.0, 50.0, 0.01, 1e4] + 7.0
    with (folder / "people.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows.tolist()])
    dataset = load_dataset(folder / "people.csv")
    return reported(dataset, trained(dataset, folder / "run", likelihoods.Normal("per_dimension"), 2))


@pytest.fixture(params=["digits", "table"])
def report(request):
    return request.getfixturevalue(request.param)


def dataset_of(x, labels=None, name="made"):
    """A data set of these tensors: three quarters to train on, an eighth each to validate and to test."""
    sizes = [len(x) - 2 * (len(x) // 8), len(x) // 8, len(x) // 8]
    parts = [None] * 3 if labels is None else labels.split(sizes)
    splits = {
        split: Split((part,), labels=label, name=split)
        for split, part, label in zip(("train", "valid", "test"), x.split(sizes), parts, strict=True)
    }
    return Dataset(name, **splits, event_shape=x.shape[1:])


# ------------------------------------------------------------ the page


def test_the_page_parses_and_stands_alone(report):
    page = report.page
    assert page.open == []
    assert page.text["title"][0].startswith("What the VAE learned from ")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base", "form"}
    references = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "style") if key in a]
    assert references and all(reference.startswith("data:") for reference in references)
    styles = "".join(page.text["style"])
    assert not re.search(r"url\(|@import|https?:", styles)


def test_every_picture_is_a_png_with_something_on_it_and_lies_in_figures_too(report):
    files = {path.read_bytes() for path in (report.run.path / "figures").iterdir()}
    assert files == set(report.page.pngs) and len(files) == len(report.page.images) == 7
    for image, png in zip(report.page.images, report.page.pngs, strict=True):
        picture = Image.open(io.BytesIO(png))
        picture.load()
        assert len(np.unique(np.array(picture.convert("RGBA")).view(np.uint32))) > 10
        assert 2 * int(image["width"]) - picture.width in (0, 1)
        assert 2 * int(image["height"]) - picture.height in (0, 1)
        assert image["alt"]


def test_sample_pictures_show_each_pixel_of_the_mean_as_an_even_square(digits):
    means = sample(digits.run.model, 96, seed=0, mean=True)
    expected = (means * 255 / 16).round().byte().reshape(8, 12, 8, 8).numpy()
    picture = np.asarray(Image.open(digits.run.path / "figures" / "samples.png"))
    side, gap = 8 * 17, 8
    for row, column in ((0, 0), (3, 7), (7, 11)):
        tile = picture[row * (side + gap) :, column * (side + gap) :][:side, :side]
        assert (tile[..., 3] == 255).all()
        assert (tile[..., :3] == expected[row, column].repeat(17, 0).repeat(17, 1)[..., None]).all()
    assert (picture[side : side + gap, :, 3] == 0).all()


def test_the_scores_are_those_of_evaluate(report):
    scores = report.scores
    printed = [float(a["value"]) for tag, a in report.page.tags if tag == "data"]
    expected = []
    for estimate in scores.table().values():
        numbers = (estimate.value, estimate.standard_error, estimate.standard_error_draws)
        expected += [number for number in numbers if not math.isnan(number)]
    assert printed == [*expected, scores.active_units]
    texts = [text.replace("−", "-") for text in report.page.text["data"]]
    assert texts == [*(f"{number:.2f}" for number in expected), str(scores.active_units)]


def test_names_from_outside_are_text_not_markup(table):
    schema = dataclasses.replace(table.dataset.schema, summary="a & b")
    evil = dataclasses.replace(table.dataset, name="<script>alert(1)</script>", schema=schema)
    page = Page(write_report(table.run, evil, progress=False, evaluation=table.scores))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text["h1"] == ["What the VAE learned from <script>alert(1)</script>"]


def test_config_time_seed_and_versions_are_told(digits):
    text = "".join(digits.page.text["code"])
    assert text.strip() == (digits.run.path / "config.toml").read_text().strip()
    facts = " ".join(digits.page.text["dd"])
    assert f"torch {torch.__version__}" in facts and "0 for training, 0 for this report" in facts


# ------------------------------------------------------------ the sentence


def test_sentence_for_digits_against_exact_binomials_at_pixel_means(digits):
    train, test = (split.x.double().flatten(1).numpy() for split in (digits.dataset.train, digits.dataset.test))
    p = (train.sum(0) + train.mean()) / (len(train) + 1) / 16
    exact = scipy.stats.binom.logpmf(test, 16, p).sum(1)
    baseline = independent_baseline(digits.run.model, digits.dataset)
    assert baseline.value == pytest.approx(exact.mean(), abs=1e-9)
    assert baseline.standard_error == pytest.approx(exact.std(ddof=1) / 250**0.5, abs=1e-9)
    sentence = summary_sentence(digits.run.model, digits.scores, digits.dataset)
    ours = digits.scores.log_evidence
    assert re.findall(r"\d+\.\d", sentence) == [
        f"{number:.1f}" for number in (-ours.value, ours.standard_error, -exact.mean(), exact.std(ddof=1) / 250**0.5)
    ]
    assert "On 250 images" in sentence and "fewer is better" in sentence
    (lead,) = [text for text in digits.page.text["p"] if text.startswith("On 250 images")]
    assert lead.replace("\u00a0", " ") == sentence


def test_sentence_for_a_table_is_in_original_units(table):
    dataset = table.dataset
    train, test = (dataset.restore(split.x.double()).numpy() for split in (dataset.train, dataset.test))
    standard = (train - train.mean(0)) / train.std(0)
    mean = standard.mean() / (len(train) + 1) * np.ones(4)
    squares = (standard - mean) ** 2
    deviation = np.sqrt((squares.sum(0) + squares.mean()) / (len(train) + 1))
    fitted = scipy.stats.norm(train.mean(0) + mean * train.std(0), deviation * train.std(0))
    exact = fitted.logpdf(test).sum(1).mean()
    assert independent_baseline(table.run.model, dataset).value == pytest.approx(exact, abs=1e-4)
    sentence = summary_sentence(table.run.model, table.scores, dataset)
    assert f"{exact:.1f}".replace("-", "−") in sentence and "higher is better" in sentence


def test_a_report_of_few_rows_far_from_zero(tmp_path):
    """In original units, in double precision, however long a column's name; one test row has no variance."""
    x = np.random.default_rng(0).integers(-1, 2, (10, 2)) + np.array([1_700_000_000, 3])
    frame = pandas.DataFrame(x, columns=["time", "n" * 5_000])
    dataset = load_dataset(frame, kind={"time": "real"})
    model = VAE((2,), latent_dim=1, likelihood=likelihoods.Normal())
    run = fit(model, AmortizedGuide(model), dataset.train, epochs=1, out=tmp_path / "run", progress=False)
    write_report(run, dataset, num_samples=3)
    page = Page(run.path / "report.html")
    assert {"samples.png", "pairs.png"} <= {path.name for path in (run.path / "figures").iterdir()} and not page.open


def test_bernoulli_and_continuous_bernoulli_baselines():
    generator = torch.Generator().manual_seed(0)
    probability = torch.tensor([0.0, 0.02, 0.3, 0.5, 0.97])
    x = torch.rand(80, 5, generator=generator) ** (1 / (probability + 0.1))
    data = dataset_of(x)
    train, test = (split.x.double().numpy() for split in (data.train, data.test))
    mean = (train.sum(0) + train.mean()) / (len(train) + 1)

    def log_density(x, logit):
        normaliser = scipy.integrate.quad(lambda t: math.exp(logit * t), 0, 1)[0]
        return logit * x - math.log(normaliser)

    def mean_of(logit):
        return scipy.integrate.quad(lambda t: t * math.exp(log_density(t, logit)), 0, 1)[0]

    logits = [scipy.optimize.brentq(lambda logit, m=m: mean_of(logit) - m, -15, 15) for m in mean]
    exact = sum(log_density(test[:, d], logits[d]) for d in range(5)).mean()
    model = VAE((5,), 2, likelihood=likelihoods.ContinuousBernoulli())
    assert independent_baseline(model, data).value == pytest.approx(exact, abs=1e-5)

    binary = dataset_of(torch.bernoulli(probability.expand(80, 5), generator=generator))
    train, test = (split.x.double().numpy() for split in (binary.train, binary.test))
    mean = (train.sum(0) + train.mean()) / (len(train) + 1)
    exact = scipy.stats.bernoulli.logpmf(test, mean).sum(1).mean()
    model = VAE((5,), 2, likelihood=likelihoods.Bernoulli())
    assert independent_baseline(model, binary).value == pytest.approx(exact, abs=1e-9)


def test_baselines_of_counts():
    """Each column's own negative binomial or Poisson, by SciPy's density and optimiser."""
    generator = np.random.default_rng(0)
    x = np.stack([generator.negative_binomial(n, 0.3, 90) for n in (1, 4, 40)], 1)
    data = dataset_of(torch.from_numpy(x).float())
    train, test = (split.x.double().numpy() for split in (data.train, data.test))
    mean = (train.sum(0) + train.mean()) / (len(train) + 1)
    exact = 0.0
    for d, m in enumerate(mean):

        def log_prob(log_n, values, m=m):
            n = math.exp(log_n)
            return scipy.stats.nbinom.logpmf(values, n, n / (n + m))

        found = scipy.optimize.minimize_scalar(
            lambda log_n, d=d, log_prob=log_prob: -log_prob(log_n, train[:, d]).sum(), bounds=(-5, 15), method="bounded"
        )
        exact += log_prob(found.x, test[:, d]).mean()
    model = VAE((3,), 2, likelihood=likelihoods.NegativeBinomial())
    assert independent_baseline(model, data).value == pytest.approx(exact, abs=1e-4)
    poisson = scipy.stats.poisson.logpmf(test, mean).sum(1).mean()
    model = VAE((3,), 2, likelihood=likelihoods.Poisson())
    assert independent_baseline(model, data).value == pytest.approx(poisson, rel=1e-9)


def test_a_model_worse_than_the_baseline_is_told_so(digits):
    for value, told in ((-1000.0, True), (-10.0, False)):
        scores = dataclasses.replace(digits.scores, log_evidence=Estimate(value, 1.0))
        sentence = summary_sentence(digits.run.model, scores, digits.dataset)
        assert ("has not learned more" in sentence) is told


def test_scores_of_other_data_are_refused(digits):
    scores = dataclasses.replace(digits.scores, num_data=7)
    with pytest.raises(ValueError, match="expected scores of the 250 test data, got scores of 7"):
        write_report(digits.run, digits.dataset, evaluation=scores)


# ------------------------------------------------------------ other models and data


def test_pyro_functions_on_colour_pictures_without_labels_history_or_baseline(tmp_path):
    x = torch.randn(80, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    data = dataset_of(x)

    def model(x=None, *, num_data=None):
        weight = pyro.param("weight", lambda: 0.1 * torch.ones(1, 90))
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            mean = (z @ weight).unflatten(-1, (3, 6, 5))
            return pyro.sample("x", dist.Laplace(mean, 1.0).to_event(3), obs=x)

    def guide(x=None):
        slope = pyro.param("slope", lambda: torch.zeros(90, 1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1) @ slope, 1.0).to_event(1))

    run = fit(model, guide, data.train, epochs=1, batch_size=20, out=tmp_path, progress=False)
    run.history = []
    page = Page(write_report(run, data, num_samples=5, progress=False))
    assert page.text["h1"] == ["What the model learned from made"]
    text = " ".join(page.text["p"])
    assert "holds no history" in text and "(higher is better)." in text and "knowing how" not in text
    assert len(page.images) == 6
    tile = np.asarray(Image.open(tmp_path / "figures" / "reconstructions.png"))[..., :3]
    assert (tile[..., 0] != tile[..., 1]).any()


def test_two_latent_sites_leave_traversals_out_with_a_sentence(tmp_path):
    data = dataset_of(torch.randint(0, 4, (80, 3), generator=torch.Generator().manual_seed(0)).float())

    class Two(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(2, 3)

        def forward(self, x=None, *, num_data=None):
            with pyro.plate("data", num_data if x is None else len(x)):
                top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                low = pyro.sample("low", dist.Normal(top, 1.0).to_event(1))
                return pyro.sample("x", dist.Poisson(self.map(low).exp()).to_event(1), obs=x)

    model = Two()
    run = fit(model, AmortizedGuide(model), data.train, epochs=1, batch_size=20, out=tmp_path, progress=False)
    page = Page(write_report(run, data, num_samples=5, progress=False))
    assert "2 latent sites that depend on each other" in " ".join(page.text["p"])
    assert not (tmp_path / "figures" / "traversals.png").exists()


def test_a_model_that_recites_its_training_data_is_caught(tmp_path):
    x = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
    data = dataset_of(x, labels=torch.linspace(0, 1, 160))

    class Recite(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.tensor(-5.0))

        def forward(self, x=None, *, num_data=None):
            with pyro.plate("data", num_data if x is None else len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                row = (torch.special.ndtr(z[..., 0]) * 119).long()
                mean = data.train.x[row]
                return pyro.sample("x", dist.Normal(mean, self.log_scale.exp()).to_event(1), obs=x)

    model = Recite()
    run = fit(model, AmortizedGuide(model), data.train, epochs=1, batch_size=20, out=tmp_path, progress=False)
    recited = " ".join(Page(write_report(run, data, num_samples=5, progress=False)).text["p"])
    assert "Perhaps: the median distance" in recited


def test_draws_as_far_from_the_data_as_new_data_are_no_sign_of_memory(digits):
    assert any("No sign of it" in text for text in digits.page.text["p"])


# ------------------------------------------------------------ what it leaves alone


def figures(report):
    return {path.name: path.read_bytes() for path in (report.run.path / "figures").iterdir()}


def test_a_second_report_draws_the_same_figures_and_changes_nothing_else(digits):
    settings, state, drawn = dict(matplotlib.rcParams), torch.get_rng_state(), figures(digits)
    before = {path.name for path in digits.run.path.iterdir()}
    write_report(digits.run, digits.dataset, progress=False, evaluation=digits.scores)
    assert dict(matplotlib.rcParams) == settings and torch.equal(torch.get_rng_state(), state)
    assert not pyro.get_param_store().keys()
    assert {path.name for path in digits.run.path.iterdir()} == before
    assert figures(digits) == drawn


def test_a_report_that_fails_leaves_the_one_before(digits, monkeypatch):
    before = digits.path.read_bytes()
    monkeypatch.setattr("os.replace", _full)
    with pytest.raises(OSError, match="disk full"):
        write_report(digits.run, digits.dataset, progress=False, evaluation=digits.scores)
    assert digits.path.read_bytes() == before
    assert [path.name for path in digits.run.path.rglob(".*")] == [".lock"]


def _full(*_):
    raise OSError("disk full")


# ------------------------------------------------------------ in a browser


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ASK = """<script>addEventListener("load", () => { document.documentElement.dataset.widths =
JSON.stringify([innerWidth, document.documentElement.scrollWidth, ...[...document.images].map(i => i.naturalWidth)])
})</script></body>"""


OF_THE_BROWSER = ("google.com", "googleapis.com", "gvt1.com")  # what it asks for on its own, whatever it is told


class Recorder:
    """A proxy that has nothing to offer and remembers the first line of every request for a page."""

    def __enter__(self):
        self.requests = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def serve(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                request = connection.recv(4096).decode(errors="replace").partition("\r\n")[0]
                host = re.split(r"[/:]", request.split(" ")[1].removeprefix("http://"))[0]
                if not host.endswith(OF_THE_BROWSER):
                    self.requests.append(request)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def __exit__(self, *_):
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join()


def browse(page, folder, width):
    """The page's DOM after loading, with the images' widths, and what it asked of the network."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    with Recorder() as network:
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom "
            f"--window-size={width},900 --proxy-server=http://127.0.0.1:{network.port} "
            f"--user-data-dir={folder / 'profile'}"
        )
        done = subprocess.run([BROWSER, *flags.split(), path.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    match = re.search(r'data-widths="([^"]*)"', done.stdout)
    assert match, done.stdout[:1000]
    return json.loads(match[1]), network.requests


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_picture_fits_the_width_and_asks_nothing_of_the_network(report, tmp_path, width):
    assert report.page.source.count("</body>") == 1
    assert not any(host in report.page.source for host in OF_THE_BROWSER)
    (inner, scrolled, *widths), requests = browse(report.page.source.replace("</body>", ASK), tmp_path, width)
    assert widths == [Image.open(io.BytesIO(png)).width for png in report.page.pngs]
    assert scrolled <= inner
    assert requests == []


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_recorder_sees_a_page_that_does_ask(tmp_path):
    page = f'<!doctype html><body><img src="http://pictures.invalid/a.png">{ASK}'
    widths, requests = browse(page, tmp_path, 1200)
    assert widths[2:] == [0]
    assert requests == ["GET http://pictures.invalid/a.png HTTP/1.1"]


def test_sites_that_all_data_share_are_the_guides(tmp_path):
    """The decoder's weights are latent: pictures are of those of q(w), and the scores have rows of their own."""
    digits = load_dataset("digits")
    torch.manual_seed(0)
    model = BayesianVAE(digits.event_shape, len(digits.train), latent_dim=2, likelihood=likelihoods.Binomial(16))
    guide = AmortizedGuide(model, family={"w": families.DiagonalNormal(initial_scale=0.05)})
    run = fit(model, guide, digits.train, epochs=1, out=tmp_path / "run", progress=False)
    page = Page(write_report(run, digits, num_samples=3, progress=False))
    assert {"log evidence total", "log predictive"} <= {text.strip() for text in page.text["td"] + page.text["th"]}
    w = encodings(guide, digits.test)["w"].mean
    with torch.no_grad():
        subject = Coded(run, digits, run.evaluate(digits.test, num_samples=3, progress=False), 0)
        walked = subject.walk(torch.zeros(1, 2))
        torch.testing.assert_close(walked, model.observation(torch.zeros(1, 2), w).mean.cpu())

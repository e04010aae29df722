"""The page of a run: what stands on it, that it is whole and safe, and what is refused."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from run_records import HOSTILE, MAPS, write_run
from safetensors.numpy import save_file
from sklearn.decomposition import PCA
from tiny_models import base_model, tokenizer

from eval import report
from more_ds.config import RunConfig
from more_ds.map_names import Place, place_of
from more_ds.planner.hardware import gpu_like
from more_ds.reporting.curves import scores_by_task, training
from more_ds.reporting.embeddings import plane, read_embeddings, similarity
from more_ds.reporting.gates import collapse, gate_section, moved
from more_ds.reporting.predicted import measured, predicted
from more_ds.reporting.record import read_run


class Page(HTMLParser):
    """Elements, attributes and text of a page; every element that is opened is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def show(*arguments: str | Path, output: Path) -> str:
    assert report.main([*map(str, arguments), "--output", str(output)]) == 0
    return output.read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_run(folder / "mine")
    return folder


@pytest.fixture(scope="module")
def text(place: Path) -> str:
    return show(place / "mine", output=place / "page.html")


def test_nothing_on_the_page_runs_and_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    assert "script" not in page.tags
    assert HOSTILE in "".join(page.words)
    outward = [value for name, value in page.attributes if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith(("#", "data:")) for value in outward)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(http" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_charts_take_their_colours_from_the_page(text: str) -> None:
    assert text.count("<svg") >= 8
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", charts)


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    body = text[text.index(f"<h2>{heading}</h2>") :]
    body = body[body.index("<tbody>") : body.index("</tbody>")]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]


def test_the_ledger_by_hand(text: str) -> None:
    """Steps 3 and 6 are the first task's, 1, 4 and 7 the second's, 2, 5 and 8 the third's; four rows of ten each."""
    found = rows_of(text, "Tasks")
    assert [row[1:] for row in found] == [
        ["10", "8", "25.00", "0.80", "80", "16"],
        ["10", "12", "37.50", "1.20", "120", "24"],
        ["10", "12", "37.50", "1.20", "120", "24"],
    ]


def test_scores_have_errors_and_a_mean(text: str) -> None:
    found = rows_of(text, "Scores")
    assert [row[2] for row in found] == ["60.00", "61.00", "62.00", "61.00"]
    assert found[0][3] == "1.50"


def test_the_heat_map_shows_each_choice_at_each_evaluation(text: str) -> None:
    frames = re.findall(r'<div class="frame">(.*?)</div></div>', text, re.DOTALL)
    assert len(frames) == 2
    cells = [[int(value) for value in re.findall(r'<td style="--v:\d+%">(\d)</td>', frame)] for frame in frames]
    # By module: two layers of q_proj, then one of up_proj.
    assert cells == [[1, 2, 3] * 3, [1, 2, 3, 1, 4, 3, 4, 4, 4]]
    assert '<td style="--v:25%">1</td>' in frames[0]
    assert re.findall(r"<caption>(.*?)</caption>", frames[0]) == ["self_attn.q_proj", "mlp.up_proj"]


def test_a_conflict_of_gradients_has_the_other_colour(text: str) -> None:
    assert text.count('<td class="below" style="--v:25%">-0.25</td>') == 2
    body = text[text.index("<h2>Gradients of the tasks</h2>") :]
    assert body[: body.index("</table>")].count("<td></td>") == 3, "the corner, and the pair that is not known, twice"


def test_a_score_of_zero_is_shown_and_a_loss_that_is_none_is_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "zero")
    log = (folder / "metrics.jsonl").read_text()
    log = log.replace('"accuracy": 50.0', '"accuracy": 0.0').replace('"loss_auxiliary": 0.1', '"loss_auxiliary": 0.0')
    (folder / "metrics.jsonl").write_text(log)
    record = read_run(folder, "zero")
    assert "two: accuracy" in scores_by_task([record])
    assert "contrastive" not in training([record])


def test_collapse_is_said_out_loud(tmp_path: Path, text: str) -> None:
    assert "collapsed" not in text
    folder = write_run(tmp_path / "flat", ranks=[[2, 2, 2], [1, 1, 1], [1, 2, 3]])
    flat = gate_section(read_run(folder, "flat"))
    assert '<p class="warning" role="alert">The gates have collapsed: in 2 of 3 maps all 3 tasks use one rank.' in flat
    assert collapse({"a": [1], "b": [1]}, ["only"]) == []
    assert collapse({"a": [1, 1], "b": [1, 2]}, ["x", "y"]) == []


def test_moved_choices_by_hand() -> None:
    tables = [{"ranks": {"a": [1, 2], "b": [3, 4]}}, {"ranks": {"b": [3, 1], "a": [1, 2]}}]
    assert moved(tables) == [25.0]


def test_embeddings_against_scikit_learn(tmp_path: Path) -> None:
    found = read_embeddings(write_run(tmp_path / "run") / "best")
    assert list(found) == sorted(MAPS)
    unit = [own / np.linalg.norm(own, axis=1, keepdims=True) for own in found.values()]
    places, share = plane(list(found.values()))
    pca = PCA(n_components=2)
    expected = pca.fit_transform(np.concatenate(unit, axis=1))
    np.testing.assert_allclose(np.abs(places), np.abs(expected), atol=1e-12)
    np.testing.assert_allclose(share, pca.explained_variance_ratio_)
    assert (places[np.abs(places).argmax(0), [0, 1]] > 0).all()
    alike = similarity(list(found.values()))
    assert alike[0, 1] == pytest.approx(np.mean([own[0] @ own[1] for own in unit]))
    np.testing.assert_allclose(alike.diagonal(), 1.0)


def test_added_tasks_follow_the_first_ones(tmp_path: Path) -> None:
    parts = {"m.more_task.added_0": np.full((1, 2), 2.0), "m.more_task.weight": np.ones((2, 2))}
    save_file(parts, tmp_path / "adapter_model.safetensors")
    assert read_embeddings(tmp_path)["m"].tolist() == [[1, 1], [1, 1], [2, 2]]


def test_several_runs_over_each_other(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", scored=False)
    both = show(tmp_path / "a", f"other={tmp_path / 'b'}", output=tmp_path / "both.html")
    Page(both)
    assert [row[0] for row in rows_of(both, "Runs")] == ["a", "other"]
    assert re.findall(r"<summary>(All of (?!it)\w+)</summary>", both) == ["All of a", "All of other"]
    groups = re.findall(r'name="(flip\d)" checked', both)
    assert groups == ["flip0", "flip1"], "choosing a step of one run must not change the other's"


def test_the_same_run_makes_the_same_page(place: Path, text: str) -> None:
    assert show(place / "mine", output=place / "again.html") == text


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", scored=False)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "lo')
    assert "have not been scored yet" in show(folder, output=tmp_path / "page.html")
    assert read_run(folder, "a").last_step == 8


def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    assert report.main([str(folder)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_no_run_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "is no run: no config.json" in refused(tmp_path, capfd)
    folder = write_run(tmp_path / "a")
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("")
    assert "has no metrics yet" in refused(folder, capfd)
    (folder / "metrics.jsonl").write_text("loss 1.0\n")
    assert "is of another format" in refused(folder, capfd)
    (folder / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    assert "is of another format (KeyError: 'step')" in refused(folder, capfd)
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "plan.json").unlink()
    assert "is of another version: no plan.json" in refused(folder, capfd)
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(folder, capfd)
    assert report.main([str(folder), f"a={folder}"]) == 2
    assert "two runs have the same name: a, a" in capfd.readouterr().err


def test_speed_beside_the_planner(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    tokenizer(False).save_pretrained(tmp_path / "base")
    gpu = {"device": "NVIDIA A100-SXM4-80GB", "device_memory_gb": 85.1, "dtype": "bf16"}
    folder = write_run(tmp_path / "run", **gpu)
    config = RunConfig(model=str(tmp_path / "base"), suite=["glue"], train_batch_size=4, adapter={"r": 4})
    (folder / "config.json").write_text(json.dumps(config.__dict__))
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    record = read_run(folder, "run")
    found, planned = measured(record), predicted(record)
    assert found == {"seconds a step": 2.0, "tokens per second": 450.0, "peak memory, GB": 1.5}
    assert planned.keys() == found.keys()
    assert planned["tokens per second"] * planned["seconds a step"] == pytest.approx(4 * 10)
    assert 0 < planned["peak memory, GB"] < 5


def test_a_device_without_a_data_sheet_is_said(text: str) -> None:
    assert "Not predicted: the planner has no data sheet of this device: CPU." in text


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 42.3, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 85.0, "a100-80gb"),
        ("NVIDIA H200", 150.1, "h200-141gb"),
        ("NVIDIA GeForce RTX 4090", 25.3, "rtx-4090"),
        ("NVIDIA L4", 23.7, "l4-24gb"),
        ("NVIDIA L40S", 47.7, "l40s-48gb"),
        ("NVIDIA GeForce GTX 1080", 8.5, None),
        ("CPU", math.inf, None),
    ],
)
def test_a_devices_data_sheet(device: str, memory: float, name: str | None) -> None:
    found = gpu_like(device, memory)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", Place("layer 3", "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn", Place("layer 11", "attn.c_attn")),
        ("encoder.block.2.layer.0.SelfAttention.q", Place("encoder layer 2", "SelfAttention.q")),
        ("decoder.block.2.layer.1.EncDecAttention.k", Place("decoder layer 2", "EncDecAttention.k")),
        ("lm_head", Place("lm_head", "lm_head")),
    ],
)
def test_places_of_maps(name: str, place: Place) -> None:
    assert place_of(name) == place

"""The table of published checkpoints, and loading them in one word."""

import ast
import hashlib
import json
import logging
import re
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager

from sparse_detr import Predictor, build_model, get_config, list_configs, load_config, published
from sparse_detr.config import resolve_config
from sparse_detr.engine import Checkpointer
from sparse_detr.errors import UserError
from sparse_detr.published import Published

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "parity" / "cases"
CONFIGS = [name for name in list_configs() if name.split("/")[0] not in ("custom", "quick")]


# The table


def test_the_table_is_sound():
    entries = published.checkpoints()
    names = [entry.name for entry in entries]
    assert len(names) == len({*names}) and not {*names} & {*list_configs()}
    assert {entry.config for entry in entries} - {""} <= {*CONFIGS}
    for entry in entries:
        assert re.fullmatch(r"[\w.-]+", entry.name)
        assert entry.url.startswith("https://") and 35 < entry.ap < 60
        assert entry.needs_browser == ("google" in entry.url)
        assert entry.needs_browser or entry.url.endswith((".pth", ".zip"))


@pytest.mark.parametrize("name", CONFIGS)
def test_it_tells_what_the_config_tells(name):
    """AP in a config's docstring is that of one of its files."""
    aps = {entry.ap for entry in published.checkpoints() if entry.config == name}
    said = re.search(
        r"(\d\d\.\d) AP published", ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
    )
    if aps:
        assert said and float(said[1]) in aps


def test_configs_for_own_data_have_those_of_the_config_that_they_extend():
    for name in list_configs():
        if name.startswith("custom/") and not name.endswith("_timm"):
            source = published.find(name).config
            text = (ROOT / f"configs/{name}.py").read_text()
            assert f"from ..{source.replace('/', '.')} import model" in text, name


def test_the_page_is_the_table():
    page = (ROOT / "docs" / "model_zoo.md").read_text()
    assert published.by_config() in page
    assert published.by_repository() in page
    count = len({entry.config for entry in published.checkpoints()} - {""})
    assert f"for {count} configs" in (ROOT / "docs" / "features.md").read_text()


# Loading: nothing is downloaded here, the files are made in the published layout


@pytest.fixture
def table(monkeypatch, tmp_path):
    """``table(entry, ...)`` takes the place of the published one; the cache is empty."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for name in ("fvcore", "detectron2", "sparse_detr"):  # a run in an earlier test may have turned it away
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return lambda *entries: monkeypatch.setattr(published, "checkpoints", lambda: entries)


def entry(config, url, name="a_file", **more):
    return Published(name, config, 50.0, "owner/repository", str(url), **more)


def layout(case, config, folder):
    """A file with a published one's names and shapes, every number 0.25."""
    shapes = json.loads((CASES / f"{case}.json").read_text())["state_dict"]
    selection = get_config(config).model.transformer.query_selection
    queries = selection.num_queries + selection.get("num_one_to_many", 0)
    for key in shapes:
        if re.match(r"transformer\.tgt_embed\.|query_embed\.", key):
            shapes[key][0] = queries  # the cases have fewer
    path = folder / "checkpoint.pth"
    torch.save({"model": {key: torch.tensor(0.25).expand(shape) for key, shape in shapes.items()}}, path)
    return path


LAYOUTS = {
    "deformable_detr/deformable_detr_r50_two_stage_50ep": "deformable_detr/deformable_r50_two_stage",
    "sparse_detr/sparse_detr_r50_10_50ep": "sparse_detr/sparse_r50_rho0.1",
    "sparse_detr/sparse_detr_swint_10_50ep": "sparse_detr/sparse_swint_rho0.1",
    "dino/dino_r50_4scale_12ep": "dino/dino_full_eval_padded",
    "focus_detr/focus_detr_r50_4scale_12ep": "focus_detr/focus_full_eval_padded",
    "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep": "lite_detr/lite_dino_r50_h3l1_2p1x3",
    "lite_detr/lite_dino_r50_h2l2_2p1x3_36ep": "lite_detr/lite_dino_r50_h2l2_2p1x3_nogt",
    "h_deformable_detr/h_deformable_detr_r50_12ep": "h_deformable_detr/h_detr_full_eval",
}


def is_loaded(model):
    return all(
        (v == 0.25).all() for k, v in model.state_dict().items() if "position_index" not in k
    )  # Swin: fixed


@pytest.mark.parametrize("config", LAYOUTS)
def test_published_weights_in_one_word(config, table, tmp_path):
    table(entry(config, layout(LAYOUTS[config], config, tmp_path)))
    assert is_loaded(build_model(config, "published", device="cpu"))


SPARSE = "sparse_detr/sparse_detr_r50_10_50ep"


@pytest.fixture
def sparse(once, table):
    """A published Sparse DETR in the table."""
    folder = once("published", lambda folder: layout(LAYOUTS[SPARSE], SPARSE, folder))
    path = folder / "checkpoint.pth"
    table(entry(SPARSE, path), entry(SPARSE, "nowhere.pth", "another_file"))
    return path


@pytest.mark.parametrize("config", [SPARSE, f"configs/{SPARSE}.py", ROOT / f"configs/{SPARSE}.py"])
def test_the_config_may_be_a_file(config, sparse, caplog):
    with caplog.at_level(logging.INFO):
        assert is_loaded(Predictor(config, weights="published", device="cpu").model)
    assert f"published://{SPARSE}: 50.0 AP published by owner/repository, in {sparse}" in caplog.text


def test_a_run_starts_from_them_and_keeps_the_link(sparse):
    cfg = resolve_config(SPARSE, ["train.init_checkpoint=published"])
    assert cfg.train.init_checkpoint == f"published://{SPARSE}"
    model = instantiate(cfg.model)
    Checkpointer(model, fine_tune=True).load(cfg.train.init_checkpoint, checkpointables=[])
    assert is_loaded(model)


@pytest.mark.parametrize("link", [SPARSE, "a_file"])
def test_links_work_wherever_detectron2_loads(link, sparse):
    model = instantiate(get_config(SPARSE).model)
    DetectionCheckpointer(model).load(f"published://{link}")
    assert is_loaded(model)


def test_configs_for_own_data_start_from_them(table):
    table(*published.checkpoints())
    overrides = ["train.init_checkpoint=published", "model.num_classes=3"]
    cfg = resolve_config("custom/sparse_detr_r50", overrides)
    assert cfg.train.init_checkpoint == "published://custom/sparse_detr_r50"
    assert published.find("custom/sparse_detr_r50").config == "sparse_detr/sparse_detr_r50_30_50ep"


def test_links_are_fetched_once_into_the_cache(table, tmp_path, monkeypatch):
    import iopath.common.file_io as iopath

    fetched = []

    def download(url, folder, *, filename):
        fetched.append(url)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / filename).write_bytes(b"weights")
        return str(Path(folder) / filename)

    monkeypatch.setattr(iopath, "download", download)
    url = "https://host.invalid/some/folder/weights.pth"
    table(entry(SPARSE, url))
    for _ in range(2):
        path = PathManager.get_local_path(f"published://{SPARSE}")
        assert path == str(tmp_path / "cache" / "some" / "folder" / "weights.pth")
    assert fetched == [url]


# What cannot be had


def test_what_a_browser_must_fetch(table, tmp_path):
    url = "https://drive.google.com/file/d/1/view"
    table(entry(SPARSE, url, note="the authors'"))
    by_hand = tmp_path / "cache" / "sparse_detr" / "a_file.pth"
    with pytest.raises(UserError) as caught:
        build_model(SPARSE, "published", device="cpu")
    assert url in str(caught.value) and str(caught.value).endswith(
        f"in a browser and save the file as {by_hand}"
    )
    by_hand.parent.mkdir(parents=True)
    layout(LAYOUTS[SPARSE], SPARSE, tmp_path).rename(by_hand)
    assert is_loaded(build_model(SPARSE, "published", device="cpu"))


def test_no_network(table, tmp_path, monkeypatch):
    import iopath.common.file_io as iopath

    def download(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(iopath, "download", download)
    table(entry(SPARSE, "https://host.invalid/weights.zip"))
    by_hand = re.escape(str(tmp_path / "cache" / "sparse_detr" / "a_file.zip"))
    with pytest.raises(UserError, match=rf"cannot fetch .*no route to host.*save the file as {by_hand}"):
        build_model(SPARSE, "published", device="cpu")


def test_another_file_than_the_published_one(table, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": {}}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    table(entry(SPARSE, file, sha256=digest))
    assert PathManager.get_local_path(f"published://{SPARSE}") == str(file)
    table(entry(SPARSE, file, sha256="0" * 64))
    with pytest.raises(UserError, match=f"not the published file: its sha256 is {digest}"):
        build_model(SPARSE, "published", device="cpu")


def test_which_weights_are_meant_is_told(tmp_path):
    with pytest.raises(
        UserError, match="no published weights belong to 'lite_detr/lite_dino_swint.*There are some"
    ):
        build_model("lite_detr/lite_dino_swint_h3l1_2p1x3_36ep", "published", device="cpu")
    with pytest.raises(UserError, match="and a loaded config is none: name one, as in published://dino/"):
        build_model(get_config(SPARSE), "published", device="cpu")
    own = tmp_path / "own.py"
    own.write_text(f"from sparse_detr import get_config\ncfg = get_config({SPARSE!r})\n")
    with pytest.raises(UserError, match="own.py is none: name one"):
        resolve_config(own, ["train.init_checkpoint=published"])
    assert load_config(own, ["train.init_checkpoint=published://a"]).train.init_checkpoint == "published://a"
    for name in ("a", ""):
        with pytest.raises(UserError, match=f"no published weights belong to '{name}'"):
            PathManager.get_local_path(f"published://{name}")


# Zip files, as Focus-DETR's


def test_a_zip_is_read_for_the_weights_in_it(tmp_path):
    model, again = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    torch.save({"model": model.state_dict()}, tmp_path / "inside.pth")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(tmp_path / "inside.pth", "folder/inside.pth")
        archive.writestr("__MACOSX/folder/._inside.pth", b"")
        archive.writestr("README", b"")
    Checkpointer(again).load(str(tmp_path / "packed.zip"), checkpointables=[])
    assert torch.equal(model.weight, again.weight)
    (tmp_path / "inside.pth").rename(tmp_path / "torchs.zip")
    Checkpointer(again).load(str(tmp_path / "torchs.zip"), checkpointables=[])

    with zipfile.ZipFile(tmp_path / "packed.zip", "a") as archive:
        archive.writestr("second.pth", b"")
    with pytest.raises(UserError, match="packed.zip holds 2 .pth files, expected one: unpack it"):
        Checkpointer(again).load(str(tmp_path / "packed.zip"))


# detrex's moving average, as its trainer stores it: the published AP is the average's


def test_detrexs_moving_average_is_what_is_evaluated(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    model = torch.nn.BatchNorm1d(2)
    average = {"weight": torch.full((2,), 3.0), "running_mean": torch.full((2,), 5.0)}
    torch.save({"model": model.state_dict(), "ema_state": average}, tmp_path / "weights.pth")
    again = torch.nn.BatchNorm1d(2)
    with caplog.at_level(logging.INFO):
        Checkpointer(again).load(str(tmp_path / "weights.pth"), checkpointables=[])
    assert again.weight.tolist() == [3, 3] and again.running_mean.tolist() == [5, 5]
    assert again.running_var.tolist() == [1, 1]
    assert "taking the moving average" in caplog.text
    torch.save({"model": model.state_dict(), "ema_state": {}}, tmp_path / "weights.pth")
    Checkpointer(again).load(str(tmp_path / "weights.pth"), checkpointables=[])
    assert again.weight.tolist() == [1, 1]


# detrex's Deformable DETR: names as in its code, under which its converted and its own weights are published

_DETREX = (
    (r"^neck\.(conv|norm)s\.3\.", r"neck.extra_convs.0.\1."),
    (r"^neck\.(conv|norm)s\.(\d)\.", r"neck.convs.\2.\1."),
    (r"^transformer\.level_embed$", "transformer.level_embeds"),
    (r"^transformer\.query_selection\.position_(proj|norm)\.", r"transformer.pos_trans_\1."),
    (r"pos_trans_proj", "pos_trans"),
    (r"^transformer\.query_selection\.reference_points\.", "transformer.reference_points."),
    (r"^transformer\.proposal_head\.projection\.", "transformer.enc_output."),
    (r"^transformer\.proposal_head\.norm\.", "transformer.enc_output_norm."),
    (r"\.layers\.(\d)\.attention\.", r".layers.\1.attentions.0."),
    (r"\.layers\.(\d)\.norm\.", r".layers.\1.norms.0."),
    (r"(\.encoder\.layers\.\d)\.ffn\.norm\.", r"\1.norms.1."),
    (r"\.self_attention\.", ".attentions.0.attn."),
    (r"\.cross_attention\.", ".attentions.1."),
    (r"\.self_norm\.", ".norms.0."),
    (r"\.cross_norm\.", ".norms.1."),
    (r"(\.decoder\.layers\.\d)\.ffn\.norm\.", r"\1.norms.2."),
    (r"\.ffn\.linear1\.", ".ffns.0.layers.0.0."),
    (r"\.ffn\.linear2\.", ".ffns.0.layers.1."),
)


@pytest.mark.parametrize("name", ["r50_50ep", "r50_refine_50ep", "r50_two_stage_50ep"])
def test_detrexs_deformable_detr(name, tmp_path):
    config = get_config(f"deformable_detr/deformable_detr_{name}", ["model.transformer.embed_dim=32"])
    model, again = instantiate(config.model), instantiate(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    transformer, weights = model.transformer, {}
    for key, value in model.state_dict().items():
        for pattern, replacement in _DETREX:
            key = re.sub(pattern, replacement, key)
        weights[key] = value
    for key in [k for k in weights if re.match(r"transformer\.(heads|proposal_head|query_selection)\.", k)]:
        del weights[key]
    if "two_stage" not in name:
        selection = transformer.query_selection
        weights["query_embedding.weight"] = torch.cat(
            [selection.position.weight, selection.content.weight], 1
        )
    for kind in ("class", "box"):
        heads = list(getattr(transformer.heads, f"{kind}_heads"))
        heads = heads * 6 if len(heads) == 1 else heads
        if transformer.proposal_head is not None:
            heads.append(getattr(transformer.proposal_head, f"{kind}_head"))
        for index, head in enumerate(heads):
            for rest, value in head.state_dict().items():
                their = f"{kind.replace('box', 'bbox')}_embed.{index}.{rest}"
                weights[their] = value
                if "r50_50ep" != name:
                    weights[f"transformer.decoder.{their}"] = value
    torch.save({"model": weights}, tmp_path / "detrex.pth")
    Checkpointer(again).load(str(tmp_path / "detrex.pth"), checkpointables=[])
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())

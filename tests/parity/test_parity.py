"""The published implementations' own numbers: outputs, decisions, losses, gradients."""

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.parity.replay import replay
from tests.parity.replay.case import Case

ROOT = Path(__file__).resolve().parents[2]


CASES = sorted(p for p in (Path(__file__).parent / "cases").rglob("*.json") if p.with_suffix(".npz").exists())


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_case(path):
    case = Case.load(path, torch.float64)
    replay(case)
    assert case.checks
    failed = [f"{c.name}: {c.error:.1e} > {c.tolerance:.1e}" for c in case.checks if not c.passed]
    assert not failed, "\n".join(failed)


def case_named(name):
    return next(p for p in CASES if p.stem == name)


def load(name, dtype=torch.float64):
    return Case.load(case_named(name), dtype)


def leave_out(case, *patterns, but=()):
    """Takes arrays out of a case, as if it had been stored without them."""
    for name in list(case.arrays):
        if name not in but and any(fnmatch(name, pattern) for pattern in patterns):
            del case.arrays[name]


INPUTS = ("rows", "*_pos", "*mask", "target_*", "dn_label_*", "dn_box_*", "*.boxes*", "topk_proposals")


@pytest.mark.parametrize(
    "name",
    ["op_core", "op_msdeform_ref2", "op_dam", "cdn_basic", "labels", "kda_box_refs", "encoder_block_h3l1"]
    + ["sparse_feats_rho0.2_noaux", "dino_feats_train", "focus_feats_train"],
)
def test_a_case_may_leave_arrays_out(name):
    """Every second result is missing: the others are compared."""
    case = load(name)
    results = [x for x in case.arrays if not any(fnmatch(x, pattern) for pattern in INPUTS)]
    leave_out(case, *results[::2])
    replay(case)  # raises if one of the others is not compared
    assert case.checks and all(check.passed for check in case.checks)
    assert not {check.name for check in case.checks} & set(results[::2])


def test_an_array_that_nothing_is_compared_with_is_an_error():
    case = load("op_core")
    case.arrays["outputs"] = case.arrays["output"]
    with pytest.raises(ValueError, match=r"op_core: arrays \['outputs'\] were not compared"):
        replay(case)


def test_what_is_needed_to_compare_is_asked_for():
    case = load("sparse_feats_rho0.2_noaux")
    del case.arrays["rows"]
    with pytest.raises(ValueError, match="the array 'rows', an input, is missing"):
        replay(case)


def test_lite_dino_trains_without_any_object():
    """No object, no denoising queries, no ``dn_*``: all losses but the class losses are zero."""
    case = load("lite_dino_r50_h2l2_2p1x3_nogt")
    leave_out(case, "dn_*", "target_*", "grad*", "eval_*", "total_loss", "matches")
    case.arrays.update(target_boxes0=np.zeros((0, 4)), target_labels0=np.zeros(0))  # and none of image 1
    case.arrays["matches"] = np.zeros((0, 4), dtype=np.int64)
    case.arrays["loss_values"] = np.zeros(len(case.meta["losses"]))
    case.meta.update(denoising={"K": 0}, dn_meta={"pad_size": 0, "num_dn_group": 1})
    replay(case)
    wrong = {check.name: check.error for check in case.checks if not check.passed}
    assert set(wrong) == {f"loss:loss_ce{x}" for x in ("", "_0", "_1", "_2", "_3", "_4", "_interm")}
    logits = torch.from_numpy(case.arrays["pred_logits"]).double()
    background = 0.75 * logits.sigmoid() ** 2 * F.softplus(logits)
    assert wrong["loss:loss_ce"] == pytest.approx(float(background.sum()), rel=1e-5)
    assert {"dn_meta", "train_pred_boxes", "loss:loss_ce_dn_4"} <= {check.name for check in case.checks}


def dense_with_encoder_heads():
    """The Sparse DETR case without its scoring network, and with a head behind its first layer."""
    case = load("sparse_feats_rho0.2_noaux")
    case.config.update(rho=0.0, use_enc_aux_loss=True)
    shapes = case.meta["state_dict"]
    for name in list(shapes):
        if "enc_mask_predictor" in name:
            del shapes[name]
        elif name.startswith(("class_embed.3.", "bbox_embed.3.")):
            shapes[name.replace("embed.3.", "embed.4.")] = shapes[name]
    leave_out(case, "*", but=("rows", "spatial_shapes", "valid_ratios", "src_rows", "target_boxes0"))
    return case


def test_a_dense_encoder_with_heads(monkeypatch):
    """Tokens and places in the list of chosen tokens are the same where all tokens are chosen."""
    seen, compare = {}, Case.compare

    def recorded(self, name, value, *args, **kwargs):
        seen[name] = value.detach().numpy()
        compare(self, name, value, *args, **kwargs)

    places = np.array([0, 7, 100, 1000])
    with monkeypatch.context() as patch:
        patch.setattr(Case, "compare", recorded)
        first = dense_with_encoder_heads()
        first.arrays["aux_enc_pos"] = places
        first.arrays["aux_enc_token"] = np.stack([places, places])
        replay(first)
    assert {check.name for check in first.checks} == {"spatial_shapes", "valid_ratios", "src_rows"}
    assert seen["aux_enc_boxes"].shape == (1, 2, 4, 4)

    tokens = np.stack([places, places[::-1]])
    again = dense_with_encoder_heads()
    again.arrays["aux_enc_token"] = tokens
    for name in ("aux_enc_logits", "aux_enc_boxes"):
        again.arrays[name] = np.stack([seen[name][:, 0], seen[name][:, 1, ::-1]], axis=1)
    replay(again)
    assert "aux_enc_logits" in {check.name for check in again.checks}
    assert all(check.passed for check in again.checks)
    tokens[1, 0] += 1
    again.checks.clear()
    replay(again)
    assert {check.name for check in again.checks if not check.passed} == {"aux_enc_logits", "aux_enc_boxes"}


def run_tool(*args):
    return subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools" / "parity.py", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_tool_reports_and_fails_on_a_wrong_case(tmp_path):
    """One good case, one whose stored output was changed, one that cannot be read, one of another system."""
    source = case_named("op_core")
    for name, change in (("good", 0.0), ("wrong", 1e-3)):
        (tmp_path / f"{name}.json").write_text(source.read_text())
        with np.load(source.with_suffix(".npz")) as arrays:
            arrays = dict(arrays)
        arrays["output"] = arrays["output"] + change
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "unknown.json").write_text('{"case": "x", "system": "salient"}')
    for name in ("broken", "unknown"):
        np.savez(tmp_path / f"{name}.npz")
    done = run_tool(tmp_path, "--json", tmp_path / "result.json")
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1] == "parity: 1 passed, 3 failed"
    results = {Path(r["path"]).stem: r for r in json.loads((tmp_path / "result.json").read_text())}
    assert results["good"]["passed"] and not results["wrong"]["passed"]
    assert [f["array"] for f in results["wrong"]["failed"]] == ["output"]
    assert "JSONDecodeError" in results["broken"]["error"]
    assert "system 'salient' is not replayed here; known: deformable_detr, " in results["unknown"]["error"]


def test_float32_stays_within_its_noise_floors():
    names = ("op_core", "op_msdeform_ref2", "op_msdeform_ref4", "deformable_r50_two_stage")
    done = run_tool("--dtype", "float32", *[p for p in CASES if p.stem in names])
    assert done.returncode == 0, done.stdout


def test_no_case_is_no_success(tmp_path):
    done = run_tool(tmp_path)
    assert done.returncode == 1 and "no cases found" in done.stdout

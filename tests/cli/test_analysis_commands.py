"""postil spectrum, shrink and report on a trained run, from the shell's side."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest

from postil.adapter.peft_files import load_adapter


def test_spectrum_of_an_adapter(postil: Any, adapter: Path, base: Path, tmp_path: Path) -> None:
    done = postil("spectrum", adapter, "--base", base, "--intruders", "--plot", tmp_path / "s.svg")
    assert done.code == 0, done
    assert "model.layers.0.self_attn.q_proj" in done.out
    for head in ("of |W|", "entropy", "participation", "99% of σ²", "intruders"):
        assert head in done.out
    assert "8 matrices; effective rank (entropy)" in done.out
    assert len(xml.fromstring((tmp_path / "s.svg").read_text()).findall(".//{*}polyline")) == 8


def test_spectrum_as_json(postil: Any, adapter: Path) -> None:
    found = json.loads(postil("spectrum", adapter, "--json").out)
    assert len(found) == 8
    assert {tuple(one["shape"]) for one in found} == {(32, 32), (16, 32)}
    assert len(found[0]["singular_values"]) == 8
    assert 1 <= found[0]["energy_rank_99"] <= 8
    assert found[0]["base_norm"] is None


def test_shrink_measures_what_it_changed(postil: Any, adapter: Path, base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = postil("shrink", adapter, "--rank", "2", "--out", out, "--base", base, "--target", rows)
    assert done.code == 0, done
    assert done.out.rstrip().endswith(str(out))
    for said in ("8 modules, rank 8 to 2", "ΔW moved by", "target: ", "general: ", "nats/token"):
        assert said in done.out
    small = load_adapter(out)
    assert set(small.ranks.values()) == {2}
    assert set(small.card["shrunk"]["measured"]) == {"target", "general"}
    assert small.card["shrunk"]["measured"]["target"]["rows"] == 20


def test_a_rank_above_the_adapters_is_said(postil: Any, adapter: Path, tmp_path: Path) -> None:
    done = postil("shrink", adapter, "--rank", "16", "--out", tmp_path / "same")
    assert done.code == 0
    assert "--rank 16 is above every rank of this adapter, and a rank never grows: nothing was cut" in done.err


def test_shrink_by_energy(postil: Any, adapter: Path, tmp_path: Path) -> None:
    done = postil("shrink", adapter, "--keep", "99%", "--out", tmp_path / "small")
    assert done.code == 0, done
    assert max(load_adapter(tmp_path / "small").ranks.values()) <= 8


def test_slips_of_shrink(refusal: Any, adapter: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert "give either a rank or the share" in refusal("shrink", adapter, "--out", out)
    assert "give a share such as 99%" in refusal("shrink", adapter, "--out", out, "--keep", "most")
    assert "give it with --base" in refusal("shrink", adapter, "--rank", "2", "--out", out, "--target", rows)
    assert "name a new directory" in refusal("shrink", adapter, "--rank", "2", "--out", adapter)
    assert not out.exists()


def test_a_report_of_the_run(postil: Any, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = postil("report", made / "run", "--out", out)
    assert (done.code, done.out) == (0, f"{out}\n")
    text = out.read_text()
    assert "Not judged yet" in text
    assert "held out" in text
    assert "effective rank by layer" in text
    shutil.copytree(made / "run", tmp_path / "run")
    inner = postil("report", tmp_path / "run/adapter")
    assert (inner.code, inner.out) == (0, f"{(tmp_path / 'run/report.html').resolve()}\n")


def test_slips_of_report_and_spectrum(refusal: Any, made: Path, tmp_path: Path, base: Path) -> None:
    assert "say where the page goes" in refusal("report", made / "run", made / "run")
    assert "is no run" in refusal("report", tmp_path, "--out", tmp_path / "x.html")
    assert "give the directory or name of its base" in refusal("spectrum", base)


@pytest.mark.parametrize("words", [("spectrum", "gone"), ("shrink", "gone", "--rank", "2", "--out", "x")])
def test_a_missing_adapter(refusal: Any, words: tuple[str, ...]) -> None:
    assert "gone does not exist" in refusal(*words)

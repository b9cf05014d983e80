"""KV policies by name: on the command line, in its table, and in the report of an output folder."""

from __future__ import annotations

import base64
import json
import re
import zlib
from fractions import Fraction

import pytest
import torch
from command_line import runner
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.cli.commands import app
from graphopt.cli.kv_policies import figures_of, measure_policies
from graphopt.errors import SourceError, UsageError
from graphopt.evaluate.kv_policy import measure_policy, policy_layers
from graphopt.evaluate.policy_spec import PolicySpec
from graphopt.execute.interpreter import Runner
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.kv_policies import Ema, PageBudget, Quest, SnapKV
from graphopt.ir.kv_policies.attention_cnn import weight_shapes
from graphopt.ir.kv_policies.checkpoint import PredictorCheckpoint
from graphopt.pass_manager.recipe import parse_named_options
from graphopt.report.evaluations import Evaluation, evaluations_section
from graphopt.report.pictures import heat_map
from graphopt.support.progress import silent


def spec_of(text):
    ((kind, options),) = parse_named_options(text, "KV policy", "policy")
    return PolicySpec.of(kind, options)


def test_a_budget_is_a_share_of_a_text_or_a_number_of_tokens():
    spec = spec_of("quest{budget=1/8,page=16}")
    assert spec.budget == Fraction(1, 8)
    assert spec.policy(8192) == Quest(PageBudget(16, pages=64, sink=4, local=4))
    assert spec.policy(4100).budget.tokens == 512  # whole pages
    assert spec_of("quest{budget=0.0625,sink=16,local=32}").policy(4096).budget.pages == 16
    spec = spec_of("ema{budget=256,alpha=0.5,calibrate=5,page=8,dense_layers=2}")
    assert spec.dense_layers == 2
    assert spec.policy(99) == Ema(PageBudget(8, 32, 8, 8), calibrate_every=5, alpha=0.5)
    assert spec_of("snapkv{budget=512,window=8}").policy(99) == SnapKV(
        PageBudget(16, 32, 4, 4), window=8
    )
    ahead = spec_of("expected-attention{budget=512,frequencies=[1,0.5]}").policy(99)
    assert ahead.frequencies == (1.0, 0.5)
    assert spec_of("dense").policy(4096).kind == "dense"
    assert spec_of("quest{budget=512,dense=kv.1}").dense == ("kv.1",)
    assert spec_of("quest{budget=512,dense=[kv.1,layers.3]}").dense == ("kv.1", "layers.3")
    assert spec.text == "ema{budget=256,alpha=0.5,calibrate=5,page=8,dense_layers=2}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qest{budget=1/8}", "quest"),
        ("quest{budget=1/8,dens=kv.0}", "dense"),
        ("quest", "quest has no budget"),
        ("quest{budget=0}", "A budget of '0'"),
        ("quest{budget=1.5}", "A budget of '1.5'"),
        ("quest{budget=eighth}", "A budget of 'eighth'"),
        ("quest{budget=1/8,pages=3}", "page"),
        ("quest{budget=1/8,page=wide}", "page=wide is no int"),
        ("quest{budget=1/8,calibrate=5}", "calibrate"),
        ("quest{budget=1/8,page=[8,16]}", "page=.*is no int"),
        ("quest{budget=[8,16]}", "A budget of"),
        ("quest{budget=1/8", "KV policy 'quest.*expected"),
        ("quest{budget=100}", "no multiple of the page"),
        ("quest{budget=64}", "below sink plus local"),
        ("ema{budget=1/8,alpha=2}", "2"),
        ("predictor{budget=1/8}", "is learned, and has no checkpoint"),
        ("quest{budget=1/8,checkpoint=file}", "checkpoint"),
    ],
)
def test_what_is_no_policy_is_refused(text, message):
    with pytest.raises(UsageError) as refused:
        spec_of(text).policy(4096)
    assert re.search(message, f"{refused.value.message} {refused.value.remedy}")


def test_a_learned_policy_has_the_weights_of_a_checkpoint(tmp_path):
    weights = {name: torch.ones(shape) for name, shape in weight_shapes(2).items()}
    path = tmp_path / "weights"
    PredictorCheckpoint(weights, page=4, group=2, history=64, channels=2, about={}).write(path)
    spec = spec_of(f'predictor{{budget=1/4,page=4,sink=4,local=8,checkpoint="{path}"}}')
    policy = spec.policy_for(tiny_program(), 64, torch.device("cpu"))
    assert policy.weights.keys() == weights.keys()
    spec = spec_of(f'predictor{{budget=1/4,page=8,sink=8,local=8,checkpoint="{path}"}}')
    with pytest.raises(UsageError, match="trained for pages of 4 tokens"):
        spec.policy_for(tiny_program(), 64, torch.device("cpu"))


def test_layers_that_stay_dense_have_names():
    program = tiny_program(layers=4)
    following, left = policy_layers(program, 1, ["kv.2", "layers.3"])
    assert [layer.index for layer in following] == [1]
    assert left[1:] == [("layers.2", "it is to stay dense"), ("layers.3", "it is to stay dense")]
    with pytest.raises(UsageError, match=r"dense='kv\.4' is no attention of tiny.*`kv\.3`"):
        policy_layers(program, 0, ["kv.4"])
    with pytest.raises(SourceError, match="No attention of tiny can follow a KV policy"):
        policy_layers(program, 3, ["kv.3"])


def test_a_folder_with_a_policy_is_measured_with_others(tmp_path):
    """What is attached selects in steps alone: neither windows nor other policies see it."""
    plain = tiny_program(cache=True, layers=2)
    attached = with_policies(
        plain, dict.fromkeys(plain.states, SnapKV(PageBudget(4, 3, 1, 1), window=2))
    )
    ids = torch.randint(5, 90, (1, 64), generator=torch.Generator().manual_seed(1))
    spec = spec_of("ema{budget=1/4,page=4,sink=4,local=8}")
    found = []
    for name, program in (("attached", attached), ("plain", plain)):
        go.emit(program, tmp_path / name, emit=("torch",))
        model = open_language_model(str(tmp_path / name), "program")
        figures = measure_policies(model, [spec], ids, 0, None, "", None, silent)
        found.append([(one.policy, one.perplexity, one.recall) for one in figures])
    assert found[0] == found[1]
    assert found[0][0][1] != found[0][1][1]
    with pytest.raises(UsageError, match="measured on programs, and tiny runs as torch"):
        model = open_language_model(str(tmp_path / "attached"), "torch")
        measure_policies(model, [spec], ids, 0, None, "", None, silent)


@pytest.mark.slow
def test_eval_says_that_windows_are_read_without_the_policy_that_is_attached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    (tmp_path / "text").write_text("all work and no play. " * 40)
    recipe = "attach-kv-policy{budget=64,page=16,sink=16,local=32,verdict=ignore}"
    command = runner()
    options = ["-o", "out", "--emit", "torch", "--passes", recipe, "--no-verify"]
    done = command.invoke(app, ["compile", "tiny", *options])
    assert done.exit_code == 0, done.output
    for model, says in (("out", True), ("tiny", False)):
        done = command.invoke(app, ["eval", model, "--text", "text", "--seqlen", "32"])
        assert done.exit_code == 0, done.output
        words = " ".join(done.output.split())
        assert ("Its steps select keys by page-range" in words) == says


def test_the_report_shows_recall_by_budget_and_which_pages_are_read():
    program = tiny_program(layers=2)
    ids = torch.randint(5, 90, (1, 64), generator=torch.Generator().manual_seed(1))
    runner = Runner(program)
    figures = [figures_of(None, measure_policy(runner, ids, None))]
    for budget in ("1/4", "1/2"):
        spec = spec_of(f"ema{{budget={budget},page=4,sink=4,local=8}}")
        figures.append(figures_of(spec, measure_policy(runner, ids, spec.policy(64))))
    one = Evaluation(model="<m>", form="program", device="cpu", text="t", kv_policies=figures)
    html = evaluations_section([Evaluation.model_validate(one.model_dump(mode="json"))])
    assert html.count('class="heat"') == 4 and html.count("<polyline") == 2
    assert "Recall of ema by budget" in html and "&lt;m&gt;" in html
    assert f"{figures[1].recall:.3f} at 16" in html
    assert evaluations_section([Evaluation(model="m", form="onnx", device="cpu")]).count("KV") == 0


def test_a_heat_map_is_a_picture_of_its_shares():
    shares = [[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]]
    html = heat_map(shares, 'of "all"')
    assert "of &quot;all&quot;" in html
    png = base64.b64decode(re.search(r"base64,([^\"]*)", html).group(1))
    assert png.startswith(b"\x89PNG") and png[16:24] == (3).to_bytes(4) + (2).to_bytes(4)
    start = png.index(b"IDAT") + 4
    rows = zlib.decompress(png[start : start + int.from_bytes(png[start - 8 : start - 4])])
    assert [[rows[13 * y + 4 + 4 * x] for x in range(3)] for y in range(2)] == [
        [round(255 * share) for share in row] for row in shares
    ]


@pytest.mark.slow
def test_the_command_measures_policies_and_puts_them_into_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    command = runner()
    done = command.invoke(app, ["compile", "tiny", "-o", "out", "--no-verify"])
    assert done.exit_code == 0, done.output
    policy = "ema{budget=1/2,page=8,sink=8,local=8}"
    options = ["--text", "text", "--windows", "2", "--seqlen", "128", "--needles", "3"]
    options += ["--kv-policy", f"{policy},quest{{budget=1/2,page=8,sink=8,local=8}}"]
    done = command.invoke(
        app, ["eval", "tiny", *options, "--kv-policy", "dense", "--report", "out", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["kv_policies"]
    assert [one["policy"] for one in found][:2] == ["dense", policy]
    assert [one["budget_tokens"] for one in found] == [None, 64, 64, None]
    assert found[3]["perplexity"] == pytest.approx(found[0]["perplexity"], rel=1e-5)
    assert all(one["needles"]["tasks"] == 3 for one in found)
    html = (tmp_path / "out/report.html").read_text()
    assert html.count("<h2>KV policies</h2>") == 1 and html.count('class="heat"') == 6
    done = command.invoke(app, ["eval", "tiny", *options[:6], "--kv-policy", policy])
    assert done.exit_code == 0, done.output
    assert "×dense" in done.stdout and policy in done.stdout
    assert "selects nothing" not in done.stderr
    few = "ema{budget=16,page=8,sink=8,local=8}"
    done = command.invoke(app, ["eval", "tiny", *options[:6], "--kv-policy", few])
    assert f"{few} selects nothing: its 16 tokens are sink and local" in done.stderr
    for wrong, said in (
        (["--needles", "3"], "--needles is how many passkeys"),
        (["--kv-policy", "quest{budget=1/4}"], "below sink plus local"),
    ):
        done = command.invoke(app, ["eval", "tiny", *options[:6], *wrong])
        assert done.exit_code == 2 and said in done.stderr

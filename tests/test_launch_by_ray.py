"""Ranks as actors of a Ray cluster: a local one, where Ray is installed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import runner
from rank_commands import FAILING_PASS
from tiny_models import save_tiny

from graphopt.cli.commands import app
from graphopt.cli.launch_by_ray import environments, launch_by_ray
from graphopt.errors import GraphoptError, UsageError


def test_ranks_are_counted_host_by_host() -> None:
    hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.1"]
    told = environments(hosts, "10.0.0.1", 29400, on_gpus=False)
    assert [one["RANK"] for one in told] == ["0", "1", "2"]
    assert [one["LOCAL_RANK"] for one in told] == ["0", "0", "1"]
    assert [one["LOCAL_WORLD_SIZE"] for one in told] == ["2", "1", "2"]
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in told} == {("10.0.0.1", "29400")}
    # Ray shows every actor its own GPU alone.
    told = environments(hosts, "10.0.0.1", 29400, on_gpus=True)
    assert {(one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"]) for one in told} == {("0", "1")}


@pytest.fixture(scope="module")
def ray() -> Any:
    return pytest.importorskip("ray", reason="Ray is not installed: pip install 'graphopt[ray]'")


@pytest.mark.slow
def test_without_a_cluster_it_is_said_how_to_start_one(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not ray.is_initialized()
    with pytest.raises(GraphoptError, match="No Ray cluster was found") as told:
        launch_by_ray(["eval"], 2, "cpu")
    assert "ray start --head" in told.value.remedy


@pytest.fixture(scope="module")
def cluster(ray: Any) -> Iterator[None]:
    options = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False}
    with contextlib.chdir("/"):  # which is in front of its workers' path
        ray.init(address="local", logging_level="ERROR", **options)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_actors_share_a_command(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the dog. " * 20)
    arguments = ["eval", str(tmp_path / "tiny"), "--text", str(tmp_path / "text.txt")]
    arguments += ["--seqlen", "128", "--device", "cpu", "--json"]
    alone = json.loads(runner().invoke(app, arguments).stdout)
    assert launch_by_ray(arguments, 2, "cpu") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["perplexity"] == alone["perplexity"]
    # A rank that fails ends both, by its reason.
    (tmp_path / "fail.py").write_text(FAILING_PASS, encoding="utf-8")
    failing = ["compile", str(tmp_path / "tiny"), "--plugin", str(tmp_path / "fail.py")]
    failing += ["--passes", "fail", "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert launch_by_ray(failing, 2, "cpu") == 1
    assert "error: Rank 1: The lamp is out." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_cluster_does_not_have_is_refused(cluster: None) -> None:
    with pytest.raises(UsageError, match="3 ranks take 3 CPUs, and the Ray cluster has 2"):
        launch_by_ray(["eval"], 3, "cpu")
    with pytest.raises(UsageError, match="no GPU that would say how many ranks"):
        launch_by_ray(["eval"], None, "auto")


@pytest.mark.slow
def test_a_rank_that_is_lost_ends_the_command(cluster: None, tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    (tmp_path / "fail.py").write_text(FAILING_PASS, encoding="utf-8")
    failing = ["compile", str(tmp_path / "tiny"), "--plugin", str(tmp_path / "fail.py")]
    failing += ["--passes", "fail{how=kill}", "-o", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(GraphoptError, match="The Ray cluster lost a rank"):
        launch_by_ray(failing, 2, "cpu")

"""The files of deploy/, as far as they can be checked without running what they are for."""

from __future__ import annotations

import configparser
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvant.config import EngineConfig
from kvant.server.config import KEYS_VARIABLE, ServerConfig
from kvant.server.metrics import Metrics
from tests.server.test_metrics import FACTS, STATS, finished

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "kvant.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]


def _unit() -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "kvant.service", encoding="utf-8")
    return unit


def _series() -> set[str]:
    """Names of all samples that a scrape can have."""
    metrics = Metrics("m")
    metrics.attach(FACTS, lambda: STATS)
    metrics.http("/", 200, 0.1)
    metrics.finished(finished())
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


def _expressions() -> list[str]:
    targets = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
    return targets + [each.get("definition", "") for each in DASHBOARD["templating"]["list"]]


def test_panels_have_ids_of_their_own() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    cells = [
        cell
        for place in places
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)


def test_the_dashboard_asks_for_series_that_exist() -> None:
    asked = set(re.findall(r"(?:kvant:|process_)\w+", " ".join(_expressions())))
    assert len(asked) > 25
    assert asked <= _series()


def test_every_panel_is_of_the_chosen_source_and_model() -> None:
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "model_name"}
    for panel in PANELS:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
        for target in panel.get("targets", ()):
            selectors = re.findall(r"kvant:\w+(\{[^}]*\})?", target["expr"])
            assert selectors and all('model_name=~"$model_name"' in each for each in selectors)


def test_quantiles_are_of_buckets() -> None:
    for expression in _expressions():
        assert ("histogram_quantile" in expression) == ("_bucket" in expression)
        assert "histogram_quantile" not in expression or "by (le" in expression


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_yaml_can_be_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    assert "untested" in text.partition("\n")[0].lower()


@pytest.mark.parametrize(
    "name", ["Dockerfile", "Dockerfile.dockerignore", "kvant.service", "kvant.env"]
)
def test_what_was_never_run_says_so(name: str) -> None:
    lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("# Untested") for line in lines[:2])


def test_options_in_deploy_files_exist() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    given = " ".join(
        [
            *compose["services"]["kvant"]["command"],
            *re.findall(r"^ENTRYPOINT.*", docker, flags=re.MULTILINE),
            (DEPLOY / "kvant.env").read_text(encoding="utf-8"),
        ]
    )
    options = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]+)", given)}
    known = {field.name for config in (ServerConfig, EngineConfig) for field in fields(config)}
    assert options and options <= known
    assert KEYS_VARIABLE in compose["services"]["kvant"]["environment"]
    assert KEYS_VARIABLE + "=" in given


def test_nobody_is_killed_while_draining() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    grace = compose["services"]["kvant"]["stop_grace_period"]
    limit = ServerConfig().drain_timeout
    assert int(grace.removesuffix("s")) > limit
    assert int(_unit()["Service"]["TimeoutStopSec"]) > limit


def test_mounted_files_are_there() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    mounts = [
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
    ]
    assert all((DEPLOY / mount).exists() for mount in mounts if mount.startswith("."))


def test_the_image_gets_what_it_is_built_from() -> None:
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", docker, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == {line.removeprefix("!") for line in ignore.split() if line.startswith("!")}
    assert all((DEPLOY.parent / source).exists() for source in copied)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    text = (DEPLOY / "kvant.service").read_text(encoding="utf-8")
    unit = tmp_path / "kvant.service"
    unit.write_text(text.replace("/opt/kvant/bin/kvant", "/bin/true"), encoding="utf-8")
    done = subprocess.run([program, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
